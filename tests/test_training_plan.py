"""What cannot be trained is refused before it starts: data too short, ranks that do not divide, settings of machines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_params import train_params
from small_run import ALONE, train_small

from pipelib.errors import UserError
from pipelib.tokens.shards import read_manifest
from pipelib.training.batches import check_shares, fit_tokens, make_loader
from pipelib.training.launch.launch import join
from pipelib.training.launch.machines import find_machines, process_count


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"max_tokens": 16384, "global_batch_tokens": 16384}, 1, r"have 6,144 tokens, 383 rows of 16, .* needs 1024"),
        (
            {"max_epochs": 0.02, "warmup_steps": 2},
            1,
            r"max_epochs = 0.02, .* 6,144 tokens, .* after 1 steps, .* \(warmup_steps: .*\); raise train.max_epochs, or add",
        ),
        ({"max_epochs": 0.005}, 1, r"after 0 steps, .* \(max_tokens: 0 is less than one step"),
        ({}, 3, r"3 ranks with train.micro_batch_size = 2 cannot share the 4 rows"),
        ({"micro_batch_size": 1}, 8, r"8 ranks with train.micro_batch_size = 1 cannot share the 4 rows"),
    ],
)
def test_a_plan_that_does_not_fit_the_data_is_refused(
    folder: Path, changes: dict[str, Any], ranks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_shares(fit_tokens(train_params(**changes), read_manifest(folder / "tokens")), ranks)


def test_a_training_ends_after_the_passes_that_are_allowed(folder: Path) -> None:
    manifest, said = read_manifest(folder / "tokens"), []  # 383 rows, 4 a step
    for epochs, steps in ((1.0, 95), (2.0, 191), (2.006, 192), (9.0, 192)):
        asked = train_params(max_tokens=64 * 192 + 1, max_epochs=epochs)
        fitted = fit_tokens(asked, manifest, said.append)
        assert fitted == (asked if steps == 192 else replace(asked, max_tokens=64 * steps))
    assert said[1:] == [
        "train: train.max_epochs = 2, and the training shards have 6,144 tokens, so the training ends after 12,224 of "
        "train.max_tokens = 12,289"
    ]


def test_a_second_epoch_is_announced_when_it_begins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_small(folder, train_params(max_tokens=64 * 100, max_epochs=2.0))
    said = [line for line in capsys.readouterr().err.splitlines() if "epoch 2" in line]
    # 383 rows, 4 a step
    assert said == ["step 96: epoch 2 of 1.04 begins, so rows repeat from here on"]
    _, plan = make_loader(train_params(), folder / "tokens", read_manifest(folder / "tokens"), ALONE)
    seen = np.concatenate([plan.rows(step) for step in range(95)])
    assert len(set(seen)) == len(seen)
    assert set(plan.rows(95)) & set(seen)


@pytest.mark.parametrize("wish", ["two", "0", "-1", "1.5"])
def test_a_number_of_ranks_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("PIPELIB_NPROC", wish)
    with pytest.raises(UserError, match=f"PIPELIB_NPROC={wish} is not valid"):
        process_count()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process_count() == 2
    monkeypatch.setenv("PIPELIB_NPROC", "3")
    with pytest.raises(UserError, match=r"PIPELIB_NPROC=3 is more than the 2 GPU\(s\) here"):
        process_count()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"PIPELIB_NNODES": "2"},
            r"PIPELIB_NNODES=2 machines need PIPELIB_RDZV_ENDPOINT=HOST:PORT to connect, and it is \(not set\)",
        ),
        (
            {"PIPELIB_NNODES": "2", "PIPELIB_RDZV_ENDPOINT": "node01"},
            r"HOST:PORT to connect, and it is node01; set it to the address of the first machine",
        ),
        ({"PIPELIB_NNODES": "0"}, r"PIPELIB_NNODES=0 is not valid: it must be a whole number, 1 or more"),
        ({"PIPELIB_MAX_RESTARTS": "-1"}, r"PIPELIB_MAX_RESTARTS=-1 is not valid: it must be a whole number, 0 or more"),
    ],
)
def test_settings_of_machines_that_are_none_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        find_machines()


def test_joining_a_training_on_one_machine_is_refused() -> None:
    with pytest.raises(
        UserError, match="--join is for a training on several machines, but PIPELIB_NNODES is not 2 or more"
    ):
        join(lambda: pytest.fail("there is nothing to look for"))
