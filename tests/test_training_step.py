"""One step, and many: the losses are those of a plain implementation, and a bad step changes nothing."""

import copy
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_params import train_params
from small_run import ALONE, curve, differing, new_model, train_small
from small_vocabulary import TOKENIZER
from torch import Tensor, nn

from pipelib.errors import UserError
from pipelib.model.families.gpt2 import GPT2
from pipelib.tokens.loader import Batch, Loader
from pipelib.tokens.shards import read_manifest
from pipelib.training.batches import TensorBatch, make_loader
from pipelib.training.launch.distributed import World
from pipelib.training.learning_rate import learning_rate_at
from pipelib.training.objectives import NextToken
from pipelib.training.optim.adamw import AdamW
from pipelib.training.optimizer import Optimizer, make_optimizer
from pipelib.training.params import TrainParams
from pipelib.training.step import StepResult, take_step


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
    assert losses[0] == pytest.approx(math.log(TOKENIZER.size), abs=0.1)
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
    decaying, others = AdamW(model, train_params(weight_decay=0.3)).groups
    assert (decaying.weight_decay, others.weight_decay) == (0.3, 0.0)
    assert {names[id(parameter)] for parameter in others.parameters} == {
        name for name in names.values() if name.endswith("bias") or "ln_" in name
    }
    assert len(decaying.parameters) + len(others.parameters) == len(names)


def test_adamw_is_torchs_class_and_reads_its_state() -> None:
    """Three steps, the second of them skipped; the third one after the class's state was loaded."""
    params = train_params(weight_decay=0.3)
    model, twin = new_model(), new_model()
    ours = AdamW(model, params)
    groups = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in AdamW(twin, params).groups]
    theirs = torch.optim.AdamW(groups, betas=(params.beta1, params.beta2), eps=params.eps, fused=True)
    for number, finite in enumerate([True, False, True]):
        generator = torch.Generator().manual_seed(number)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = 0.01 * (number + 1)
        theirs.found_inf = torch.tensor(1.0 - finite)  # type: ignore[attr-defined]
        theirs.step()
        ours.step(0.01 * (number + 1), torch.tensor(finite))
        assert differing(model, twin) == []
        ours = AdamW(model, params)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


def test_a_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    """It takes longer than the first steps of a small model."""
    program = """
import sys
from pathlib import Path
from small_params import train_params
from small_run import train_small, write_tokens
write_tokens(Path("tokens"))
train_small(Path(), train_params(max_tokens=640))
assert "torch._dynamo" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)


def test_loss_of_the_model_is_torchs_cross_entropy() -> None:
    model = new_model()
    tokens = torch.randint(0, TOKENIZER.size, (3, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model.logits(model.hidden(inputs))[..., : TOKENIZER.size]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 16)
    assert torch.allclose(model.token_losses(inputs, targets), expected, atol=1e-5)
    assert NextToken(model)(inputs, targets).item() == pytest.approx(expected.sum().item(), rel=1e-5)


def test_a_step_without_all_its_rows_is_no_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Loader.micro_batches
    monkeypatch.setattr(Loader, "micro_batches", lambda self, step: whole(self, step)[:1])
    with pytest.raises(AssertionError, match="step 1 has 32 tokens"):
        train_small(folder, train_params())


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


# ---- A plain implementation -----------------------------------------------------------------------------------------


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
    logits = norm(x, "ln_f") @ weights["wte"][: TOKENIZER.size].T
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


# ---- A step that is not finite --------------------------------------------------------------------------------------


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
