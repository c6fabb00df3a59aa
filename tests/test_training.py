"""Training is what it says: a plain loop gives the same losses, and nothing but data and parameters decides a weight."""

import csv
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import (
    ALONE,
    CHECKOUT,
    SmallProject,
    curve,
    model_params,
    one_thread,  # noqa: F401 (a fixture)
    train_params,
    train_small,
    write_tokens,
)
from torch import Tensor, nn

from pipelib.errors import UserError
from pipelib.files import read_json, write_json
from pipelib.model.gpt import GPT, Block, initialise
from pipelib.tokens.loader import Batch
from pipelib.tokens.shards import read_manifest
from pipelib.training.checkpoint import KEPT, Checkpoints, Counters
from pipelib.training.launch import process_count
from pipelib.training.loop import check_plan, make_loader, take_step
from pipelib.training.optim import learning_rate_at, make_optimizer
from pipelib.training.params import TrainParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a small training finds its tokens."""
    write_tokens(tmp_path / "tokens")
    return tmp_path


def new_model(seed: int = 7, **shape: int) -> GPT:
    model = GPT(model_params(**shape))
    initialise(model, seed)
    return model


def differing(first: nn.Module, second: nn.Module) -> list[str]:
    """Tensors that are not equal bit for bit."""
    other = second.state_dict()
    return [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])]


# ---- One step --------------------------------------------------------------------------------------------------------


def test_one_batch_can_be_learnt_by_heart(folder: Path) -> None:
    params = train_params(max_lr=3e-2, weight_decay=0.0)
    model = new_model(n_embd=32)
    optimizer = make_optimizer(model, params)
    batches = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)[0].micro_batches(0)
    losses = [take_step(model, optimizer, batches, 1e-2, params, ALONE)[0].item() for _ in range(120)]
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
        loss, norm = take_step(model, optimizer, batches, 1e-2, params, ALONE)
        seen[size] = torch.tensor([loss.item(), norm.item()])
    assert torch.allclose(seen[4], seen[2], rtol=0, atol=1e-5)
    assert torch.allclose(seen[4], seen[1], rtol=0, atol=1e-5)


def test_the_gradient_is_clipped_and_its_norm_is_noted_before(folder: Path) -> None:
    params = train_params(grad_clip_norm=1e-3)
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batches = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)[0].micro_batches(0)
    _, norm = take_step(model, optimizer, batches, 1.0, params, ALONE)
    moved = [(parameter - old).flatten() for parameter, old in zip(model.parameters(), before, strict=True)]
    assert norm.item() > 0.1
    assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_only_matrices_decay() -> None:
    model = new_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = make_optimizer(model, train_params(weight_decay=0.3)).param_groups
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


def plain_training(model: GPT, steps: Iterable[list[Batch]], params: TrainParams) -> list[float]:
    """The losses of a training with torch's AdamW, one tensor at a time, and whole batches."""
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
    for step, batches in enumerate(steps):
        rate = 1e-2 * (step + 1) / 4 if step < 4 else 5.5e-3 + 4.5e-3 * math.cos(math.pi * (step - 4) / 36)
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
    params = train_params()
    train_small(folder, params)
    loader, _ = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)
    expected = plain_training(new_model(), map(loader.micro_batches, range(40)), params)
    found = [row["loss"] for row in curve(folder)]
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


def test_two_ranks_have_the_losses_of_one(tmp_path: Path) -> None:
    project = SmallProject.make(tmp_path, max_tokens=1280)
    tables = []
    for ranks in (1, 2):
        rows = project.run(ranks)["curves/train.csv"].decode().splitlines()[1:]
        tables.append(np.array([row.split(",") for row in rows], float))
        project.begin_anew()
    one, two = tables
    assert one.shape == two.shape == (20, 5)
    assert np.allclose(one, two, rtol=1e-5, atol=0)
    assert one[0, 2] - one[-1, 2] > 0.5


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


def test_activation_checkpointing_changes_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    blocks = 0

    def count(*_: object) -> None:
        nonlocal blocks
        blocks += 1

    monkeypatch.setattr(Block, "forward", lambda self, x, forward=Block.forward: count() or forward(self, x))
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


FOUR_RANKS = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from small_run import model_params, train_params
from pipelib.tokens.shards import read_manifest
from pipelib.tracking import NullRun
from pipelib.training.distributed import World
from pipelib.training.hardware import Peak
from pipelib.training.loop import Cadence, train
from pipelib.training.recorder import NullRecorder, Recorder

folder, params = Path(sys.argv[1]), train_params(micro_batch_size=1, max_tokens=1280)
torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1)])  # imports what each rank would take a second for
children = []
for rank in (3, 2, 1, 0):
    if rank and (child := os.fork()):
        children.append(child)
        continue
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    recorder = Recorder(folder, NullRun(), params, 1, lambda: Peak(1e12, "")) if rank == 0 else NullRecorder()
    cadence, tokens, world = Cadence(10**6, 15), folder / "tokens", World(rank, 4, torch.device("cpu"))
    train(model_params(), params, cadence, tokens, read_manifest(tokens), folder, world, recorder)
    dist.destroy_process_group()
    if rank:
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_a_resumed_training_of_four_ranks_equals_an_uninterrupted_one_bit_for_bit(folder: Path) -> None:
    # DDP sums in other groups after its first step, and three ranks or more then round otherwise; two never do.
    last = folder / "checkpoints/step_00000020"
    sources = [str(CHECKOUT / "src"), str(CHECKOUT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources), "CUDA_VISIBLE_DEVICES": ""}
    weights = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", FOUR_RANKS, str(folder)], env=environment, check=True, timeout=120)
        weights.append(torch.load(last / "state.pt", weights_only=True)["model"])
        shutil.rmtree(last)  # so that the second one goes on from step 15
        (folder / "meeting").unlink(missing_ok=True)
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
    assert saved.keys() == {"model", "optimizer", "train", "rng"}
    assert saved["train"] == {"step": 40, "tokens": 2560}
    meta = read_json(folder / "work/checkpoints/step_00000040/meta.json")
    assert (meta["step"], meta["tokens"], meta["model"]) == (40, 2560, asdict(model_params()))
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
    "another run's": (change_meta(data="other"), "belongs to another run"),
    "another version": (change_meta(version=99), "has format 99 and this code reads 1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    spoil, reason = DAMAGE[case]
    model, counters = nn.Linear(3, 3), Counters()
    checkpoints = Checkpoints(tmp_path, {"data": "mine"})
    weights = {}
    for counters.step in (10, 20):
        nn.init.normal_(model.weight)
        weights[counters.step] = model.weight.detach().clone()
        checkpoints.save(counters.step, {"model": model, "train": counters}, {})
    spoil(tmp_path / "step_00000020")

    fresh, counted = nn.Linear(3, 3), Counters()
    assert Checkpoints(tmp_path, {"data": "mine"}).load_latest({"model": fresh, "train": counted}) == 10
    assert counted.step == 10
    assert torch.equal(fresh.weight, weights[10])
    assert f"step_00000020 {reason}" in capsys.readouterr().out


def test_where_every_checkpoint_is_bad_the_training_starts_anew(tmp_path: Path) -> None:
    counters = Counters()
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(10, {"train": counters}, {})
    flip_a_bit(tmp_path / "step_00000010/state.pt")
    assert checkpoints.load_latest({"train": counters}) == 0


def test_a_checkpoint_that_is_only_half_written_is_passed_over_and_replaced(tmp_path: Path) -> None:
    counters = Counters()
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(10, {"train": counters}, {})
    half = tmp_path / ".step_00000020.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert checkpoints.load_latest({"train": counters}) == 10
    checkpoints.save(20, {"train": counters}, {})
    assert not half.exists()
    assert checkpoints.load_latest({"train": counters}) == 20


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    for step in (5, 10, 15, 100):
        checkpoints.save(step, {"train": Counters()}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000015", "step_00000100"][-KEPT:]


# ---- What cannot be trained ------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_training_and_is_in_no_checkpoint(folder: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+ has loss .* the weights are lost.* Lower train.max_lr") as caught:
        train_small(folder, train_params(max_lr=1e30), checkpoint_every=1)
    failed = int(str(caught.value).split()[1])
    saved = sorted((folder / "work/checkpoints").glob("step_*"))
    assert [int(path.name.removeprefix("step_")) for path in saved] == list(range(1, failed))[-KEPT:]
    tensors = itertools.chain(*(torch.load(path / "state.pt", weights_only=True)["model"].values() for path in saved))
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert all(math.isfinite(value) for row in curve(folder) for value in row.values())


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


@pytest.mark.parametrize("wish", ["two", "0", "-1", "1.5"])
def test_a_number_of_ranks_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("PIPELIB_NPROC", wish)
    with pytest.raises(UserError, match=f"PIPELIB_NPROC={wish} is not a"):
        process_count()


def test_loss_of_the_model_is_torchs_cross_entropy() -> None:
    model = new_model()
    tokens = torch.randint(0, 50257, (3, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model.logits(model.hidden(inputs))[..., :50257]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 16)
    assert torch.allclose(model.token_losses(inputs, targets), expected, atol=1e-5)
    assert model(inputs, targets).item() == pytest.approx(expected.mean().item(), abs=1e-5)
