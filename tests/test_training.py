"""Training is what it says: a plain loop gives the same losses, and nothing but data and parameters decides a weight."""

import csv
import errno
import gc
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import (  # noqa: F401
    ALONE,
    CHECKOUT,
    SmallProject,
    curve,
    model_params,
    one_thread,
    random_model,
    small_trainer,
    train_params,
    train_small,
    write_tokens,
)
from torch import Tensor, nn

from pipelib.errors import UserError, user_message
from pipelib.evaluation import samples
from pipelib.files import plural, read_json, write_json
from pipelib.model.families.gpt2 import GPT2, Block
from pipelib.model.shapes.gpt2 import GPT2Section
from pipelib.tokens.loader import Batch, Loader
from pipelib.tokens.shards import read_manifest
from pipelib.training import loop, training_log
from pipelib.training.batches import TensorBatch, check_plan, make_loader
from pipelib.training.checkpoint import Checkpoints, Stateful, checkpoint_bytes, most_checkpoints
from pipelib.training.inputs import RANDOM_WEIGHTS
from pipelib.training.launch import launch as launch_module
from pipelib.training.launch.distributed import World
from pipelib.training.launch.launch import join, launch
from pipelib.training.launch.machines import find_machines, process_count
from pipelib.training.learning_rate import learning_rate_at
from pipelib.training.memory import Footprint
from pipelib.training.objectives import NextToken
from pipelib.training.optimizer import Optimizer, make_optimizer
from pipelib.training.params import SpikeParams, TrainParams
from pipelib.training.schedule import Cadence
from pipelib.training.state import DeviceHours, TrainState
from pipelib.training.step import StepResult, take_step
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

SEED = int(os.environ.get("PIPELIB_TEST_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a small training finds its tokens."""
    write_tokens(tmp_path / "tokens")
    return tmp_path


def new_model(seed: int = 7, **shape: int) -> GPT2:
    model = GPT2(model_params(**shape), GPT2_TOKENIZER.size)
    model.initialise(seed)
    return model


def differing(first: nn.Module, second: nn.Module) -> list[str]:
    """Tensors that are not equal bit for bit."""
    other = second.state_dict()
    return [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])]


# ---- One step --------------------------------------------------------------------------------------------------------


def step_of(
    model: GPT2, optimizer: Optimizer, batches: list[TensorBatch], params: TrainParams, rate: float = 1e-2
) -> StepResult:
    """One step towards the next token."""
    objective = NextToken(model)
    return take_step(objective, objective, optimizer, batches, rate, params, ALONE)


class Descent:
    """Plain gradient descent, as an optimizer of ours."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())

    def step(self, learning_rate: float, finite: Tensor) -> None:
        assert finite
        with torch.no_grad():
            for parameter in self.parameters:
                assert parameter.grad is not None
                parameter -= learning_rate * parameter.grad

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        assert not state


def test_one_batch_can_be_learnt_by_heart(folder: Path) -> None:
    params = train_params(max_lr=3e-2, weight_decay=0.0)
    model = new_model(n_embd=32)
    optimizer = make_optimizer(model, params)
    batches = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)[0].micro_batches(0)
    losses = [step_of(model, optimizer, batches, params).loss.item() for _ in range(120)]
    assert losses[0] == pytest.approx(math.log(50257), abs=0.1)
    assert losses[-1] < 0.1


def test_micro_batches_change_nothing_but_the_memory(folder: Path) -> None:
    seen = {}
    for size in (4, 2, 1):
        params = train_params(micro_batch_size=size)
        model = new_model()
        optimizer = make_optimizer(model, params)
        loader, _ = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)
        batches = loader.micro_batches(0)
        assert len(batches) == params.gradient_accumulation_steps(1) == 4 // size
        result = step_of(model, optimizer, batches, params)
        seen[size] = torch.stack((result.loss, result.grad_norm))
    assert torch.allclose(seen[4], seen[2], rtol=0, atol=1e-5)
    assert torch.allclose(seen[4], seen[1], rtol=0, atol=1e-5)


def test_the_gradient_is_clipped_and_its_norm_is_noted_before(folder: Path) -> None:
    params = train_params(grad_clip_norm=1e-3)
    model = new_model()
    optimizer = Descent(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batches = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)[0].micro_batches(0)
    norm = step_of(model, optimizer, batches, params, rate=1.0).grad_norm
    moved = [(parameter - old).flatten() for parameter, old in zip(model.parameters(), before, strict=True)]
    assert norm.item() > 0.1
    assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_only_matrices_decay() -> None:
    model = new_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = make_optimizer(model, train_params(weight_decay=0.3))._adamw.param_groups  # type: ignore[attr-defined]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {names[id(parameter)] for parameter in others["params"]} == {
        name for name in names.values() if name.endswith("bias") or "ln_" in name
    }
    assert len(decaying["params"]) + len(others["params"]) == len(names)
    assert (decaying["betas"], decaying["eps"]) == ((0.9, 0.95), 1e-8)


GPT2_124M = {
    "max_tokens": 9_999_745_024, "global_batch_tokens": 524_288, "warmup_steps": 715, "max_lr": 6e-4, "min_lr": 6e-5,
}  # fmt: skip
"""19,073 steps."""
SMALL = {"max_tokens": 2560, "global_batch_tokens": 64, "warmup_steps": 4, "max_lr": 1e-2, "min_lr": 1e-3}
"""40 steps, so 36 of them on the cosine."""


@pytest.mark.parametrize(
    ("recipe", "step", "rate"),
    [
        (SMALL, 0, 2.5e-3),
        (SMALL, 1, 5.0e-3),
        (SMALL, 3, 1.0e-2),
        (SMALL, 4, 1.0e-2),  # cos 0 = 1
        (SMALL, 13, 8.681980515e-3),  # 0.001 + 0.0045 · (1 + cos 45°)
        (SMALL, 22, 5.5e-3),  # cos 90° = 0
        (SMALL, 31, 2.318019485e-3),  # 0.001 + 0.0045 · (1 + cos 135°)
        (SMALL, 39, 1.017123859e-3),  # 0.001 + 0.0045 · (1 + cos 175°)
        (GPT2_124M, 0, 8.391608392e-7),  # 0.0006 / 715
        (GPT2_124M, 714, 6.0e-4),
        (GPT2_124M, 715, 6.0e-4),
        (GPT2_124M, 9894, 3.3e-4),  # half-way between 715 and 19,073
        (SMALL | {"warmup_steps": 0}, 0, 1.0e-2),
    ],
)
def test_learning_rates(recipe: dict[str, Any], step: int, rate: float) -> None:
    assert learning_rate_at(step, train_params(**recipe)) == pytest.approx(rate, rel=1e-9)


def test_the_last_step_of_the_published_recipe_has_nearly_the_least_rate() -> None:
    params = train_params(**GPT2_124M)
    assert params.max_steps == 19_073
    assert 6e-5 < learning_rate_at(19_072, params) < 6.00001e-5


# ---- A plain implementation ------------------------------------------------------------------------------------------


def plain_loss(weights: dict[str, Tensor], inputs: Tensor, targets: Tensor, n_layer: int, n_head: int) -> Tensor:
    """GPT-2's loss with everything written out: (B, T) -> a scalar."""
    width = weights["wte"].shape[1]
    mask = torch.tril(torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool))

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        query, key, value = linear(x, f"{name}.c_attn").split(width, dim=-1)
        heads = []
        for columns in torch.arange(width).view(n_head, -1):
            scores = query[..., columns] @ key[..., columns].transpose(1, 2) / math.sqrt(len(columns))
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ value[..., columns])
        return linear(torch.cat(heads, dim=-1), f"{name}.c_proj")

    def mlp(x: Tensor, name: str) -> Tensor:
        x = linear(x, f"{name}.c_fc")
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return linear(x, f"{name}.c_proj")

    x = weights["wte"][inputs] + weights["wpe"][: inputs.shape[1]]
    for layer in range(n_layer):
        x = x + attention(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn")
        x = x + mlp(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp")
    logits = norm(x, "ln_f") @ weights["wte"][:50257].T
    return -logits.log_softmax(dim=-1).gather(-1, targets[..., None]).mean()


def plain_training(
    model: GPT2, steps: Iterable[list[Batch]], rates: Sequence[float], params: TrainParams
) -> list[float]:
    """The losses of a training with torch's AdamW, one tensor at a time, and whole batches, at the given rates."""
    weights = {
        name.replace("wte.weight", "wte").replace("wpe.weight", "wpe"): tensor.detach().clone().requires_grad_()
        for name, tensor in model.state_dict().items()
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [tensor for tensor in weights.values() if tensor.dim() == 2], "weight_decay": 0.1},
            {"params": [tensor for tensor in weights.values() if tensor.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    losses = []
    for rate, batches in zip(rates, steps, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*batches, strict=True))
        loss = plain_loss(weights, inputs, targets, model.params.n_layer, model.params.n_head)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((tensor.grad**2).sum() for tensor in weights.values()))  # type: ignore[misc,arg-type]
        for tensor in weights.values():
            tensor.grad *= min(1.0, params.grad_clip_norm / (norm.item() + 1e-6))  # type: ignore[operator]
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_a_plain_implementation(folder: Path) -> None:
    params = train_params(max_tokens=6400)
    rates = [2.5e-3, 5e-3, 7.5e-3, 1e-2, *(5.5e-3 + 4.5e-3 * math.cos(math.pi * n / 96) for n in range(96))]
    train_small(folder, params)
    loader, _ = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)
    expected = plain_training(new_model(), map(loader.micro_batches, range(100)), rates, params)
    found = [row["loss"] for row in curve(folder)]
    assert len(found) == 100
    assert found[0] - found[-1] > 1.0  # it did learn
    assert np.abs(np.array(found) - expected).max() < 1e-4


def test_bf16_stays_near_fp32(folder: Path) -> None:
    exact = train_small(folder, train_params())
    losses = [row["loss"] for row in curve(folder)]
    shutil.rmtree(folder / "work")
    rounded = train_small(folder, train_params(precision="bf16"))
    assert differing(exact, rounded)
    assert {tensor.dtype for tensor in rounded.state_dict().values()} == {torch.float32}
    assert np.abs(np.array([row["loss"] for row in curve(folder)]) - losses).max() < 0.05


def table(folder: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """train.csv of `train_ranks`: a row a step."""
    return np.loadtxt(folder / "train.csv", delimiter=",", skiprows=1)


def test_losses_and_norms_depend_neither_on_the_ranks_nor_on_the_micro_batches(folder: Path) -> None:
    tables = []
    for world_size, micro_batch_size in ((1, 4), (1, 1), (2, 1), (4, 1)):
        train_ranks(folder, world_size, max_tokens=3200, micro_batch_size=micro_batch_size)
        tables.append(table(folder))
        shutil.rmtree(folder / "checkpoints")
    assert tables[0].shape == (50, 5)
    assert tables[0][0, 2] - tables[0][-1, 2] > 0.5  # it did learn
    for other in tables[1:]:
        assert np.allclose(other, tables[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(4, 2, marks=pytest.mark.long)])
def test_another_number_of_ranks_goes_on_and_says_what_is_not_exact(folder: Path, before: int, after: int) -> None:
    assert "bit-identical" not in train_ranks(folder, before, max_tokens=1280)
    whole = table(folder)
    shutil.rmtree(folder / "checkpoints/step_00000020")
    said = train_ranks(folder, after, max_tokens=1280)
    assert f"had {plural(before, 'rank')} and resumes with {after}: each step has the same batch" in said
    assert "not bit-identical" in said
    assert "training resumes after step 15" in said
    resumed = table(folder)
    assert np.array_equal(resumed[:15], whole[:15])
    assert np.allclose(resumed, whole, rtol=1e-5, atol=0)


# ---- What changes nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"validate_every": 3}, {"sample_every": 7}, {"log_every": 1}, {"checkpoint_every": 4}],
    ids=lambda change: next(iter(change)),
)
def test_looking_at_a_training_does_not_change_it(folder: Path, change: dict[str, int]) -> None:
    cadence = {name: change[name] for name in change if name in ("log_every", "checkpoint_every")}
    params = train_params(max_tokens=1280)
    undisturbed = train_small(folder, params)
    losses = (folder / "work/train.csv").read_bytes()
    shutil.rmtree(folder / "work")
    torch.manual_seed(99)
    changed = train_params(**{"max_tokens": 1280, **{name: change[name] for name in change if name not in cadence}})
    assert differing(train_small(folder, changed, **cadence), undisturbed) == []
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
    options: dict[str, Any] = {"activation_checkpointing": True, "max_tokens": 640}
    project = SmallProject.make(tmp_path, **options, compile=True)
    project.run(ranks=2)
    with (tmp_path / "curves/train.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    (tmp_path / "tokens").symlink_to(tmp_path / "data/tokens")
    train_small(tmp_path, train_params(max_tokens=640))
    assert len(losses) == 10
    assert losses == pytest.approx([row["loss"] for row in curve(tmp_path)], rel=1e-5)


def test_another_seed_gives_another_model(folder: Path) -> None:
    first = train_small(folder, train_params(max_tokens=128, warmup_steps=1))
    shutil.rmtree(folder / "work")
    assert differing(first, train_small(folder, train_params(max_tokens=128, warmup_steps=1, seed=8)))


# ---- Going on --------------------------------------------------------------------------------------------------------

CURVES = ("train.csv", "validation.csv", "samples.csv")


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


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_found(folder: Path) -> None:
    train_small(folder, train_params(), checkpoint_every=10)
    (checkpoint,) = (folder / "work/checkpoints").glob("step_00000030")
    identity = {key: read_json(checkpoint / "meta.json")[key] for key in ("model", "train", "data")}
    counters = TrainState()
    checkpoints = Checkpoints(checkpoint.parent, identity)
    assert checkpoints.load_latest({"train": counters}, agree=lambda _: checkpoint.name) == counters.step == 30
    assert checkpoints.load_latest({"train": counters}, agree=lambda _: "") == 0
    assert checkpoints.load_latest({"train": counters}) == counters.step == 40


def test_a_step_without_all_its_rows_is_no_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Loader.micro_batches
    monkeypatch.setattr(Loader, "micro_batches", lambda self, step: whole(self, step)[:1])
    with pytest.raises(AssertionError, match="step 1 has 32 tokens"):
        train_small(folder, train_params())


def test_going_on_without_determinism_on_a_gpu_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = small_trainer(folder, train_params(deterministic=False))
    gpu = World(0, 1, torch.device("cuda"))
    for step, world, words in ((0, gpu, 0), (5, ALONE, 0), (5, gpu, 1)):
        trainer.state.step, trainer.world = step, world
        trainer._announce()
        assert capsys.readouterr().out.count("train.deterministic: true prevents it") == words


def test_no_samples_need_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelib.vocabulary.tokenizer.reference", None)
    assert samples.write_samples(random_model(model_params()), GPT2_TOKENIZER, (), "fp32", seed=0) == []


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


RANKS = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from small_run import model_params, train_params
from pipelib.errors import UserError, user_message
from pipelib.model.families.gpt2 import GPT2
from pipelib.tokens.shards import read_manifest
from pipelib.tracking.run import NullRun
from pipelib.training.launch.distributed import World
from pipelib.training.hardware import Peak
from pipelib.training.build import build_trainer
from pipelib.training.objectives import NextToken
from pipelib.training.schedule import Cadence
from pipelib.training.training_log import MainLog, NullLog

folder, world_size, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
poisoned_rank, poisoned_call, checkpoint_every = (options.pop(name) for name in ("rank", "call", "checkpoint_every"))
params, calls, forward = train_params(**options), 0, NextToken.forward
torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])  # imports what each rank would take a second for

def poison(self, inputs, targets):
    global calls
    calls += 1
    return forward(self, inputs, targets) * (float("nan") if calls == poisoned_call else 1.0)

def run(rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    log = MainLog(folder, NullRun(), params, 1, lambda: Peak(1e12, "")) if rank == 0 else NullLog()
    cadence, tokens = Cadence(10**6, checkpoint_every), folder / "tokens"
    world = World(rank, world_size, torch.device("cpu"))
    if rank == poisoned_rank:
        NextToken.forward = poison
    try:
        build_trainer(model_params(), params, cadence, tokens, read_manifest(tokens), folder, world, log).run()
    except UserError as error:
        print(f"rank {rank}: {error}", flush=True)
    dist.destroy_process_group()

children = []
for rank in reversed(range(world_size)):
    if rank and (child := os.fork()):
        children.append(child)
        continue
    run(rank)
    if rank:
        os._exit(0)
sys.exit(max((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), default=0))
"""


def train_ranks(
    folder: Path, world_size: int, *, checkpoint_every: int = 15, rank: int = -1, call: int = -1, **changes: Any
) -> str:
    """Train with several ranks on `folder/tokens` and in `folder`, and what they print.

    Args:
        rank: one whose loss is not a number
        call: at its call of the model of this number; the first one is `World.warm_up`'s.
    """
    options = {"rank": rank, "call": call, "checkpoint_every": checkpoint_every, "micro_batch_size": 1, **changes}
    sources = [str(CHECKOUT / "src"), str(CHECKOUT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources), "CUDA_VISIBLE_DEVICES": ""}
    (folder / "meeting").unlink(missing_ok=True)
    command = [sys.executable, "-c", RANKS, str(folder), str(world_size), json.dumps(options)]
    done = subprocess.run(command, env=environment, timeout=180, text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout


def test_a_resumed_training_of_four_ranks_equals_an_uninterrupted_one_bit_for_bit(folder: Path) -> None:
    # DDP sums in other groups after its first step, and three ranks or more then round otherwise; two never do.
    last = folder / "checkpoints/step_00000020"
    weights = []
    for _ in range(2):
        train_ranks(folder, 4, max_tokens=1280)
        weights.append(torch.load(last / "state.pt", weights_only=True)["model"])
        shutil.rmtree(last)  # so that the second one goes on from step 15
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_a_training_killed_before_its_first_checkpoint_leaves_no_row_twice(folder: Path) -> None:
    params = train_params(max_tokens=1280)
    train_small(folder, params)
    curves = {name: (folder / "work" / name).read_bytes() for name in CURVES}
    shutil.rmtree(folder / "work/checkpoints")
    train_small(folder, params)
    assert {name: (folder / "work" / name).read_bytes() for name in CURVES} == curves


def test_the_checkpoint_holds_all_that_survives(folder: Path) -> None:
    train_small(folder, train_params())
    saved = torch.load(folder / "work/checkpoints/step_00000040/state.pt", weights_only=True)
    assert saved.keys() == {"model", "optimizer", "train", "spikes", "hours", "rng"}
    assert saved["spikes"] == {"found": [], "recent": []}
    assert saved["train"] == {"step": 40, "tokens": 2560, "world_size": 1, "micro_batch_size": 2}
    meta = read_json(folder / "work/checkpoints/step_00000040/meta.json")
    assert (meta["step"], meta["tokens"], meta["model"]) == (40, 2560, model_params().decides())
    assert meta["data"] == read_manifest(folder / "tokens").fingerprint


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
        return checkpoint_bytes(Footprint(model, GPT2_TOKENIZER.size, train), checkpoint_every)

    copy = Footprint(model, GPT2_TOKENIZER.size, train_params()).checkpoint
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
    build: Any = SimpleNamespace(work=folder / "work")
    for size in (0, 1000):
        (folder / "work/checkpoints/step_00000001").mkdir(parents=True, exist_ok=True)
        (folder / "work/checkpoints/step_00000001/state.pt").write_bytes(bytes(size))
        with pytest.raises(UserError, match="enough"):
            launch(build, shape, train_params(), Cadence(1, 5), folder / "tokens", folder, RANDOM_WEIGHTS)
    assert asked[0] == checkpoint_bytes(Footprint(shape, GPT2_TOKENIZER.size, train_params()), 5) == asked[1] + 1000


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


def test_a_checkpoint_that_cannot_be_written_stops_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train_small(folder, train_params(), checkpoint_every=5, log_every=1)
    assert "the disk is full" in (user_message(caught.value) or "")
    assert not list((folder / "work/checkpoints").glob("step_*"))
    assert curve(folder)[-1]["step"] <= 10  # at the next save at the latest


# ---- What cannot be trained ------------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """An objective whose loss or gradient is not finite."""

    def __init__(self, objective: NextToken, what: str) -> None:
        super().__init__()
        self.objective, self.what = objective, what

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.objective(inputs, targets)
        if self.what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss
        return loss * math.nan if self.what == "loss" else loss + math.inf


@pytest.mark.parametrize("what", ["loss", "gradient", "loss alone"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer_state(folder: Path, what: str) -> None:
    params = train_params()
    batches = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)[0].micro_batches(0)
    states = []
    for poison in (False, True):
        model = new_model()
        optimizer, objective = make_optimizer(model, params), NextToken(model)
        take_step(objective, objective, optimizer, batches, 1e-2, params, ALONE)
        if poison:
            bad = take_step(Poisoned(objective, what), objective, optimizer, batches, 1e-2, params, ALONE)
            assert not (bad.loss + bad.grad_norm).isfinite()
        state = [optimizer.state_dict()["state"][index] for index in range(len(list(model.parameters())))]
        states.append([*model.state_dict().values(), *(value.clone() for entry in state for value in entry.values())])
        take_step(
            objective, objective, optimizer, batches, 1e-2, params, ALONE
        )  # and the next one is as if there had been none
        states[-1] += [value.clone() for value in model.state_dict().values()]
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_loss_that_is_not_finite_stops_the_training_and_is_in_no_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, runs_ahead: bool
) -> None:
    monkeypatch.setattr(World, "runs_ahead", runs_ahead)
    calls, forward = itertools.count(1), NextToken.forward

    def poisoned(self: NextToken, inputs: Tensor, targets: Tensor) -> Tensor:
        return forward(self, inputs, targets) * (math.nan if next(calls) == 2 * 13 else 1.0)  # in step 13's second half

    monkeypatch.setattr(NextToken, "forward", poisoned)
    params = train_params(validate_every=40)
    with pytest.raises(UserError) as caught:
        train_small(folder, params, checkpoint_every=5, log_every=9)
    rows = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)[1].rows(12)
    assert str(caught.value).startswith("step 13 has loss nan on rank 0 and gradient norm nan at learning rate 0.008")
    assert f"its batch was rows {', '.join(map(str, rows))} on rank 0. The last checkpoint is " in str(caught.value)
    assert f"{folder / 'work/checkpoints/step_00000010'}, from before this step" in str(caught.value)
    saved = sorted((folder / "work/checkpoints").glob("step_*"))
    assert [path.name for path in saved] == ["step_00000005", "step_00000010"]
    assert next(calls) == 2 * (15 if runs_ahead else 13) + 1  # seen before the next checkpoint, at the latest
    assert all(math.isfinite(value) for row in curve(folder) for value in row.values())


def test_a_rank_whose_loss_is_not_finite_is_named_by_every_rank(folder: Path) -> None:
    said = train_ranks(folder, 2, rank=1, call=1 + 2 * 3, checkpoint_every=2)  # 2 micro-steps a step
    _, plan = make_loader(train_params(), folder / "tokens", read_manifest(folder / "tokens"), ALONE)
    rows = ", ".join(map(str, plan.rows(2)[1::2]))
    for rank in (0, 1):
        assert f"rank {rank}: step 3 has loss nan on rank 1 and gradient norm nan" in said
    assert (
        said.count(f"its batch was rows {rows} on rank 1. The last checkpoint is {folder}/checkpoints/step_00000002")
        == 2
    )


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"max_tokens": 16384, "global_batch_tokens": 16384}, 1, r"have 6,144 tokens, 383 rows of 16, .* needs 1024"),
        ({"max_tokens": 64 * 192, "max_epochs": 2.0}, 1, r"is 2.005 passes .* allow it with train.max_epochs: 2.006"),
        ({}, 3, r"3 ranks with train.micro_batch_size = 2 cannot share the 4 rows"),
        ({"micro_batch_size": 1}, 8, r"8 ranks with train.micro_batch_size = 1 cannot share the 4 rows"),
    ],
)
def test_a_plan_that_does_not_fit_the_data_is_refused(
    folder: Path, changes: dict[str, Any], ranks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_plan(train_params(**changes), read_manifest(folder / "tokens"), ranks)


def test_the_epochs_that_the_message_names_are_enough(folder: Path) -> None:
    manifest = read_manifest(folder / "tokens")
    check_plan(train_params(max_tokens=64 * 192, max_epochs=2.006), manifest, 1)


def test_a_second_epoch_is_announced_when_it_begins(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_small(folder, train_params(max_tokens=64 * 100, max_epochs=2.0))
    said = [line for line in capsys.readouterr().err.splitlines() if "epoch 2" in line]
    # 383 rows, 4 a step
    assert said == ["step 96: epoch 2 of 1.04 begins, so rows repeat from here on; train.max_epochs = 2 allows it"]
    _, plan = make_loader(train_params(), folder / "tokens", read_manifest(folder / "tokens"), ALONE)
    seen = np.concatenate([plan.rows(step) for step in range(95)])
    assert len(set(seen)) == len(seen)
    assert set(plan.rows(95)) & set(seen)


@pytest.mark.parametrize("wish", ["two", "0", "-1", "1.5"])
def test_a_number_of_ranks_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("PIPELIB_NPROC", wish)
    with pytest.raises(UserError, match=f"PIPELIB_NPROC={wish} is not a"):
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
        ({"PIPELIB_NNODES": "2"}, r"PIPELIB_NNODES=2 machines need a place to meet, .*=\(not set\) is not HOST:PORT"),
        (
            {"PIPELIB_NNODES": "2", "PIPELIB_RDZV_ENDPOINT": "node01"},
            r"ENDPOINT=node01 is not HOST:PORT; give the first machine's",
        ),
        ({"PIPELIB_NNODES": "0"}, r"PIPELIB_NNODES=0 is not a whole number of at least 1"),
        ({"PIPELIB_MAX_RESTARTS": "-1"}, r"PIPELIB_MAX_RESTARTS=-1 is not a whole number of at least 0"),
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


def test_loss_of_the_model_is_torchs_cross_entropy() -> None:
    model = new_model()
    tokens = torch.randint(0, 50257, (3, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model.logits(model.hidden(inputs))[..., :50257]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 16)
    assert torch.allclose(model.token_losses(inputs, targets), expected, atol=1e-5)
    assert NextToken(model)(inputs, targets).item() == pytest.approx(expected.sum().item(), rel=1e-5)
