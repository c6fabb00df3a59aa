"""Nothing but data and parameters decides a weight: not a kill, not a look at the training, not what saves memory."""

import csv
import gc
import itertools
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_params import model_params, train_params
from small_run import (
    ALONE,
    CURVES,
    SmallProject,
    curve,
    differing,
    random_model,
    small_trainer,
    train_small,
)
from small_vocabulary import TOKENIZER

from pipelib.errors import UserError
from pipelib.evaluation import samples
from pipelib.model.families.gpt2 import GPT2, Block
from pipelib.training import loop, training_log
from pipelib.training.launch.distributed import World
from pipelib.training.state import DeviceHours
from pipelib.training.step import StepResult, take_step

SEED = int(os.environ.get("PIPELIB_TEST_SEED") or random.SystemRandom().randrange(10**6))


# ---- What changes nothing -------------------------------------------------------------------------------------------


def test_looking_at_a_training_does_not_change_it(folder: Path) -> None:
    params = train_params(max_tokens=1280)
    undisturbed = train_small(folder, params)
    losses = (folder / "work/train.csv").read_bytes()
    shutil.rmtree(folder / "work")
    torch.manual_seed(99)
    looked_at = train_params(max_tokens=1280, validate_every=3, sample_every=7)
    assert differing(train_small(folder, looked_at, log_every=1, checkpoint_every=4), undisturbed) == []
    assert (folder / "work/train.csv").read_bytes() == losses


def test_no_step_waits_for_pythons_garbage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collecting: list[bool] = []

    def step(*arguments: Any) -> StepResult:
        collecting.append(gc.isenabled())
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", step)
    train_small(folder, train_params(max_tokens=128, warmup_steps=1))
    assert collecting == [False, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_line_of_progress_says_what_gpu_memory_was_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for taken, end in ((0, " left"), (12_345_678_901, " left | 12.3 GB of GPU memory")):
        monkeypatch.setattr(training_log, "peak_gpu_memory", lambda taken=taken: taken)
        train_small(folder, train_params(max_tokens=64, warmup_steps=0))
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("step 1/1"))
        assert line.endswith(end)
        shutil.rmtree(folder / "work")


def test_activation_checkpointing_changes_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    blocks = 0

    def count(*_: object) -> None:
        nonlocal blocks
        blocks += 1

    monkeypatch.setattr(Block, "forward", lambda self, *a, forward=Block.forward: count() or forward(self, *a))
    for wanted in (False, True):
        blocks = 0
        params = train_params(activation_checkpointing=wanted, max_tokens=1280)
        model = train_small(folder, params)
        curves = {name: (folder / "work" / name).read_bytes() for name in CURVES}
        runs.append((model, curves, blocks))
        shutil.rmtree(folder / "work")
    (plain, plain_curves, plain_blocks), (checkpointed, curves, checkpointed_blocks) = runs
    assert curves == plain_curves
    assert differing(checkpointed, plain) == []
    assert checkpointed_blocks == plain_blocks + 20 * 2 * 2  # each block once more in each of 2 micro-steps of 20 steps


@pytest.mark.long
def test_activation_checkpointing_goes_with_two_ranks_and_compile(tmp_path: Path) -> None:
    changes = {"activation_checkpointing": True, "compile": True, "max_tokens": 640}
    project = SmallProject.make(tmp_path, **{f"train__{key}": value for key, value in changes.items()})
    project.run(ranks=2)
    with (tmp_path / "curves/train.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    for name in ("tokens", "vocabulary"):
        (tmp_path / name).symlink_to(tmp_path / "data" / name)
    train_small(tmp_path, train_params(max_tokens=640))
    assert len(losses) == 10
    assert losses == pytest.approx([row["loss"] for row in curve(tmp_path)], rel=1e-5)


def test_another_seed_gives_another_model(folder: Path) -> None:
    first = train_small(folder, train_params(max_tokens=128, warmup_steps=1))
    shutil.rmtree(folder / "work")
    assert differing(first, train_small(folder, train_params(max_tokens=128, warmup_steps=1, seed=8)))


# ---- Resuming -------------------------------------------------------------------------------------------------------


def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(folder: Path) -> None:
    params = train_params()
    whole = train_small(folder, params)
    curves = {name: (folder / "work" / name).read_bytes() for name in CURVES}
    assert all(curve.count(b"\n") > 2 for curve in curves.values())
    shutil.rmtree(folder / "work")

    train_small(folder, params, checkpoint_every=25)
    shutil.rmtree(folder / "work/checkpoints/step_00000040")  # as if killed before it, with the curves ahead of it
    with (folder / "work/train.csv").open("a") as file:
        file.write("41,2624,9.3")  # a line torn by the kill
    resumed = train_small(folder, params, checkpoint_every=25, log_every=3)
    assert differing(resumed, whole) == []
    assert {name: (folder / "work" / name).read_bytes() for name in CURVES} == curves


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own code
def test_compiled_with_two_threads_it_ends_with_the_same_bits_again(folder: Path) -> None:
    torch.set_num_threads(2)
    try:
        batch = {"global_batch_tokens": 1024, "sequence_length": 128, "micro_batch_size": 8, "validate_tokens": 1024}
        params, shape = (
            train_params(compile=True, max_tokens=10240, **batch),
            model_params(n_embd=64, context_length=128),
        )
        first = train_small(folder, params, shape=shape)
        shutil.rmtree(folder / "work")
        assert differing(train_small(folder, params, shape=shape), first) == []
    finally:
        torch.set_num_threads(1)


def test_going_on_without_determinism_on_a_gpu_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    trainer = small_trainer(folder, train_params(deterministic=False))
    gpu = World(0, 1, torch.device("cuda"))
    for step, world, words in ((0, gpu, 0), (5, ALONE, 0), (5, gpu, 1)):
        trainer.state.step, trainer.world = step, world
        trainer._announce()
        said = capsys.readouterr().out
        assert said.count("train.deterministic: true prevents it") == words
        assert ("NVIDIA H100, fp32" in said) == (world is gpu)


def test_no_samples_need_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelib.vocabulary.tokenizer.reference", None)
    assert samples.write_samples(random_model(model_params()), TOKENIZER, (), "fp32", seed=0) == []


def test_the_hours_of_all_processes_count(folder: Path) -> None:
    train_small(folder, train_params(), checkpoint_every=25)
    first, last = (
        torch.load(folder / f"work/checkpoints/step_{step:08d}/state.pt", weights_only=True)["hours"]["hours"]
        for step in (25, 40)
    )
    assert 0 < first < last < 1
    hours = DeviceHours(world_size=2)
    hours.load_state_dict({"hours": 2.0})
    assert 2 < hours.total < 3
    hours.load_state_dict({"hours": 5.0})  # the training went back within this process, whose hours count all the same
    assert 2 < hours.total < 3


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own code
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_killed_and_stopped_at_random_steps_it_ends_with_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    chance = random.Random(SEED)
    params = train_params(compile=compiled)
    whole = train_small(folder, params)
    curves = {name: (folder / "work" / name).read_bytes() for name in CURVES}
    shutil.rmtree(folder / "work")
    resumed: GPT2 | None = None
    messages: list[str] = []
    while resumed is None:
        countdown, how = itertools.count(chance.randint(1, 25), -1), chance.choice(["kill", "stop"])

        def step(*arguments: Any, countdown: Iterator[int] = countdown, how: str = how) -> StepResult:
            result = take_step(*arguments)
            if next(countdown) == 0:
                if how == "kill":
                    raise Killed
                signal.raise_signal(signal.SIGTERM)
            return result

        monkeypatch.setattr(loop, "take_step", step)
        cadence = {"checkpoint_every": chance.randint(2, 9), "log_every": chance.randint(1, 9)}
        try:
            resumed = train_small(folder, params, **cadence)
        except (Killed, UserError) as end:
            messages.append(str(end))
    assert all(not message or message.startswith("stopped by SIGTERM after step") for message in messages)
    assert differing(resumed, whole) == [], f"PIPELIB_TEST_SEED={SEED}: {messages}"
    assert {name: (folder / "work" / name).read_bytes() for name in CURVES} == curves, f"PIPELIB_TEST_SEED={SEED}"


def test_a_training_killed_before_its_first_checkpoint_leaves_no_row_twice(folder: Path) -> None:
    params = train_params(max_tokens=1280)
    train_small(folder, params)
    curves = {name: (folder / "work" / name).read_bytes() for name in CURVES}
    shutil.rmtree(folder / "work/checkpoints")
    train_small(folder, params)
    assert {name: (folder / "work" / name).read_bytes() for name in CURVES} == curves
