"""Checkpoints: what is in them, which are kept, and what becomes of a damaged one."""

import errno
import io
import math
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_params import model_params, train_params
from small_run import (
    curve,
    new_model,
    train_small,
)
from small_vocabulary import TOKENIZER
from torch import nn

from pipelib.errors import UserError, user_message
from pipelib.files import read_json, write_json
from pipelib.model.shapes.gpt2 import GPT2Section
from pipelib.tokens.shards import read_manifest
from pipelib.tracking.run import NullRun
from pipelib.training.checkpoint import Checkpoints, Stateful, checkpoint_bytes, most_checkpoints
from pipelib.training.inputs import RANDOM_WEIGHTS
from pipelib.training.launch import launch as launch_module
from pipelib.training.memory import Footprint
from pipelib.training.optimizer import make_optimizer
from pipelib.training.params import SpikeParams, TrainParams
from pipelib.training.pretraining import pretrain
from pipelib.training.schedule import Cadence
from pipelib.training.state import TrainState


def test_the_checkpoint_holds_all_that_survives(folder: Path) -> None:
    train_small(folder, train_params())
    saved = torch.load(folder / "work/checkpoints/step_00000040/state.pt", weights_only=True)
    assert saved.keys() == {"model", "optimizer", "train", "spikes", "hours", "rng"}
    assert saved["spikes"] == {"found": [], "recent": []}
    assert saved["train"] == {"step": 40, "tokens": 2560, "world_size": 1, "micro_batch_size": 2}
    meta = read_json(folder / "work/checkpoints/step_00000040/meta.json")
    assert (meta["step"], meta["tokens"], meta["model"]) == (40, 2560, model_params().decides())
    assert meta["data"] == read_manifest(folder / "tokens").fingerprint


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_found(folder: Path) -> None:
    train_small(folder, train_params(), checkpoint_every=10)
    (checkpoint,) = (folder / "work/checkpoints").glob("step_00000030")
    identity = {key: read_json(checkpoint / "meta.json")[key] for key in ("model", "train", "data")}
    counters = TrainState()
    checkpoints = Checkpoints(checkpoint.parent, identity)
    assert checkpoints.load_latest({"train": counters}, agree=lambda _: checkpoint.name) == counters.step == 30
    assert checkpoints.load_latest({"train": counters}, agree=lambda _: "") == 0
    assert checkpoints.load_latest({"train": counters}) == counters.step == 40


# ---- Damage ---------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_meta(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_json(folder / "meta.json", {**read_json(folder / "meta.json"), **changes})

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (lambda folder: flip_a_bit(folder / "state.pt"), "is damaged"),
    "cut short": (lambda folder: cut_short(folder / "state.pt"), "is damaged"),
    "no weights": (lambda folder: (folder / "state.pt").unlink(), "is incomplete"),
    "no meta.json": (lambda folder: (folder / "meta.json").unlink(), "is incomplete"),
    "meta.json torn": (lambda folder: (folder / "meta.json").write_text('{"version"'), "has an unreadable meta.json"),
    "meta.json a list": (lambda folder: (folder / "meta.json").write_text("[]"), "has an unreadable meta.json"),
    "no hash": (change_meta(sha256=None), "is damaged"),
    "no step": (change_meta(step="20"), "has a meta.json without a step"),
    "other data's": (change_meta(data="other"), "belongs to another run, with another data"),
    "another model's": (change_meta(model={"n_layer": 9}), "belongs to another run, with another model"),
    "another version": (change_meta(version=99), "has format 99 and this code reads 2"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, reason = DAMAGE[case]
    model, counters = nn.Linear(3, 3), TrainState()
    identity = {"model": {"architecture": "gpt2", "n_layer": 1}, "data": "mine"}
    checkpoints = Checkpoints(tmp_path, identity)
    weights = {}
    for counters.step in (10, 20):
        nn.init.normal_(model.weight)
        weights[counters.step] = model.weight.detach().clone()
        checkpoints.save(counters.step, {"model": model, "train": counters}, {})
    checkpoints.wait()
    spoil(tmp_path / "step_00000020")

    fresh, counted = nn.Linear(3, 3), TrainState()
    assert Checkpoints(tmp_path, identity).load_latest({"model": fresh, "train": counted}) == 10
    assert counted.step == 10
    assert torch.equal(fresh.weight, weights[10])
    assert f"step_00000020 {reason}" in capsys.readouterr().out


def test_where_every_checkpoint_is_bad_the_training_starts_anew(tmp_path: Path) -> None:
    counters = TrainState()
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(10, {"train": counters}, {})
    checkpoints.wait()
    flip_a_bit(tmp_path / "step_00000010/state.pt")
    assert checkpoints.load_latest({"train": counters}) == 0


def test_a_checkpoint_that_is_only_half_written_is_passed_over_and_replaced(tmp_path: Path) -> None:
    counters = TrainState()
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(10, {"train": counters}, {})
    half = tmp_path / ".step_00000020.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert checkpoints.load_latest({"train": counters}) == 10
    checkpoints.save(20, {"train": counters}, {})
    checkpoints.wait()
    assert not half.exists()
    assert checkpoints.load_latest({"train": counters}) == 20


def test_a_checkpoint_that_cannot_be_written_stops_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train_small(folder, train_params(), checkpoint_every=5, log_every=1)
    assert "the disk is full" in (user_message(caught.value) or "")
    assert not list((folder / "work/checkpoints").glob("step_*"))
    assert curve(folder)[-1]["step"] <= 10  # at the next save at the latest


# ---- Which are kept -------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    reach=st.integers(0, 25),
    every=st.integers(3, 10),
    stopped_at=st.none() | st.integers(1, 60),
    losses=st.lists(st.none() | st.floats(1, 9), min_size=8, max_size=8),
)
def test_no_more_checkpoints_are_on_disk_than_a_disk_is_asked_for(
    reach: int, every: int, stopped_at: int | None, losses: list[float | None]
) -> None:
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), {}, reach) as checkpoints:
        steps = sorted({*range(every, 9 * every, every), *([stopped_at] if stopped_at else [])})
        for step, loss in zip(steps, [*losses, None, None], strict=False):
            checkpoints.save(step, {}, {}, loss)
            checkpoints.wait()
            being_written = 1
            assert len(list(Path(folder).iterdir())) + being_written <= most_checkpoints(reach, every)


def test_the_disk_that_train_demands_is_the_one_that_plan_names() -> None:
    model = model_params()
    spike = SpikeParams(window=100, deviations=6.0, batches=1, rollbacks=10)

    def bytes_of(train: TrainParams, checkpoint_every: int) -> int:
        return checkpoint_bytes(Footprint(model, TOKENIZER.size, train), checkpoint_every)

    copy = Footprint(model, TOKENIZER.size, train_params()).checkpoint
    assert bytes_of(train_params(), 250) == 4 * copy
    assert bytes_of(train_params(spike=spike), 250) == 5 * copy
    assert bytes_of(train_params(spike=replace(spike, batches=100)), 10) == 14 * copy


def test_a_training_that_resumes_has_the_space_of_its_checkpoints_already(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be refused on a disk that had room for all of them at its start."""
    asked: list[int] = []

    def refuse(_: Path, needed: int, __: str) -> None:
        asked.append(needed)
        raise UserError("enough")

    monkeypatch.setattr(launch_module, "require_free_space", refuse)
    shape = GPT2Section(**asdict(model_params()), init_from="scratch")
    build: Any = SimpleNamespace(work=folder / "work", run=NullRun(), code={}, resumed_with_other_code=False)
    for size in (0, 1000):
        (folder / "work/checkpoints/step_00000001").mkdir(parents=True, exist_ok=True)
        (folder / "work/checkpoints/step_00000001/state.pt").write_bytes(bytes(size))
        with pytest.raises(UserError, match="enough"):
            pretrain(build, shape, train_params(), Cadence(1, 5), folder / "tokens", folder, RANDOM_WEIGHTS, {})
    assert asked[0] == checkpoint_bytes(Footprint(shape, TOKENIZER.size, train_params()), 5) == asked[1] + 1000


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {5: None, 10: 3.0, 15: 2.0, 20: None, 25: 2.0, 30: math.nan, 35: 2.5, 100: None}
    for step, loss in losses.items():
        with Checkpoints(tmp_path, {"data": "mine"}) as checkpoints:  # each in a run that was resumed
            checkpoints.save(step, {"train": TrainState()}, {}, loss)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000015", "step_00000035", "step_00000100"]
    metas = {path.name: read_json(path / "meta.json") for path in tmp_path.iterdir()}
    assert {meta["best"] for meta in metas.values()} == {"step_00000015"}
    assert [metas[name]["val_loss"] for name in sorted(metas)] == [2.0, 2.5, None]


def test_one_that_a_spike_may_go_back_to_is_kept(tmp_path: Path) -> None:
    counters = TrainState()
    with Checkpoints(tmp_path, {}, reach=12) as checkpoints:
        for counters.step in (0, 5, 10, 15, 20, 25):
            checkpoints.save(counters.step, {"train": counters}, {})
        checkpoints.wait()
        assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_000000{n}" for n in (10, 15, 20, 25)]
        assert checkpoints.load_latest({"train": counters}, at_most=26 - 12) == counters.step == 10
        checkpoints.drop_after(10)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


def test_another_runs_checkpoint_is_never_the_best(tmp_path: Path) -> None:
    for data, step, loss in (("other", 5, 1.0), ("mine", 10, 3.0), ("mine", 15, None)):
        with Checkpoints(tmp_path, {"data": data}) as checkpoints:
            checkpoints.save(step, {"train": TrainState()}, {}, loss)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000010", "step_00000015"]


def test_a_checkpoint_is_of_the_moment_of_its_save_whatever_comes_while_it_is_written(tmp_path: Path) -> None:
    model, written = new_model(), threading.Event()
    optimizer = make_optimizer(model, train_params())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    finite = torch.tensor(True)
    optimizer.step(1e-2, finite)
    states: dict[str, Stateful] = {"model": model, "optimizer": optimizer}
    expected = io.BytesIO()
    torch.save({name: state.state_dict() for name, state in states.items()}, expected)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, states, {}, before=lambda: assert_event(written))
        assert not list(tmp_path.glob("step_*"))
        optimizer.step(1e-2, finite)
        written.set()
    assert (tmp_path / "step_00000001/state.pt").read_bytes() == expected.getvalue()  # torch.save's own bytes


def assert_event(event: threading.Event) -> None:
    assert event.wait(60)
