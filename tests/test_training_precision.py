"""fp16 with a loss scale: gradients that do not depend on it, steps that overflow, and a resume that is exact."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_params import model_params, train_params
from small_run import ALONE, CURVES, curve, differing, new_model, train_small
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.device import autocast
from pipelib.model.families.gpt2 import GPT2
from pipelib.tokens.shards import read_manifest
from pipelib.training import loss_scale as module
from pipelib.training.batches import make_loader
from pipelib.training.loss_scale import FIRST_SCALE, LossScale, NoLossScale, loss_scale
from pipelib.training.objectives import NextToken
from pipelib.training.optimizer import make_optimizer
from pipelib.training.step import StepResult, take_step
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

FINITE, INFINITE = torch.tensor(True), torch.tensor(False)


def scale_of(scale: LossScale) -> float:
    value: float = scale.state_dict()["scale"].item()
    return value


def test_only_fp16_is_scaled() -> None:
    for precision in ("fp32", "bf16"):
        assert type(loss_scale(precision, torch.device("cpu"))) is NoLossScale
    assert scale_of(loss_scale("fp16", torch.device("cpu"))) == FIRST_SCALE  # type: ignore[arg-type]


def test_the_scale_follows_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROWTH_STEPS", 3)
    ours = LossScale(torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for good in (True, True, True, True, False, True, True, False, False, True, True, True):
        parameter.grad = theirs.scale(torch.ones(1)) * (1.0 if good else math.inf)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(good))
        assert scale_of(ours) == theirs.get_scale()


def test_the_scale_stops_at_1() -> None:
    scale = LossScale(torch.device("cpu"))
    assert [scale.update(INFINITE).item() for _ in range(18)] == [True] * 16 + [False] * 2
    assert scale_of(scale) == 1.0


def step(folder: Path, scale: NoLossScale, precision: str) -> tuple[StepResult, Any]:
    params = train_params(precision=precision)
    model = new_model()
    optimizer, objective = make_optimizer(model, params), NextToken(model)
    batches = make_loader(params, folder / "tokens", read_manifest(folder / "tokens"), ALONE)[0].micro_batches(0)
    return take_step(objective, objective, optimizer, batches, 1e-2, params, ALONE, scale=scale), model


def test_losses_norms_and_weights_do_not_depend_on_the_scale(folder: Path) -> None:
    """In fp32 nothing is rounded by a power of two, so the bits must be equal."""
    plain, model = step(folder, NoLossScale(), "fp32")
    scaled, other = step(folder, LossScale(torch.device("cpu")), "fp32")
    assert torch.equal(plain.loss, scaled.loss)
    assert torch.equal(plain.grad_norm, scaled.grad_norm)
    assert differing(model, other) == []


def test_small_gradients_survive_in_fp16() -> None:
    """With 50,257 tokens, one that is no target gets about 1e-8 from each of 4,096 targets, below fp16's smallest number."""
    tokens = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(1))

    def gradients(scale: NoLossScale, precision: str) -> Tensor:
        model = GPT2(model_params(), GPT2_TOKENIZER.size)
        model.initialise(7)
        with autocast(torch.device("cpu"), precision):
            loss = NextToken(model)(tokens[:, :-1], tokens[:, 1:]) / 4096
        scale.scaled(loss).backward()  # type: ignore[no-untyped-call]
        scale.unscale(model.parameters())
        assert model.wte.weight.grad is not None
        return model.wte.weight.grad[1000:50257]

    exact = gradients(NoLossScale(), "fp32")
    assert not gradients(NoLossScale(), "fp16").any()
    assert (gradients(LossScale(torch.device("cpu")), "fp16") - exact).norm() < 0.01 * exact.norm()


def test_a_training_in_fp16_stays_near_fp32_and_resumes_bit_for_bit(folder: Path) -> None:
    exact = train_small(folder, train_params(max_tokens=640))
    losses = [row["loss"] for row in curve(folder)]
    shutil.rmtree(folder / "work")
    params = train_params(max_tokens=640, precision="fp16", sample_every=5, validate_every=5)
    whole = train_small(folder, params)
    assert differing(exact, whole)
    assert np.abs(np.array([row["loss"] for row in curve(folder)]) - losses).max() < 0.05
    curves = {name: (folder / "work" / name).read_bytes() for name in CURVES}
    shutil.rmtree(folder / "work")
    train_small(folder, params, checkpoint_every=6)
    shutil.rmtree(folder / "work/checkpoints/step_00000010")
    assert differing(train_small(folder, params, checkpoint_every=6), whole) == []
    assert {name: (folder / "work" / name).read_bytes() for name in CURVES} == curves


def overflow(monkeypatch: pytest.MonkeyPatch, above: float) -> None:
    """Have gradients overflow where the scale is above this."""
    unscale = LossScale.unscale

    def overflowing(self: LossScale, parameters: Any) -> None:
        parameters = list(parameters)
        if self.state_dict()["scale"] > above:
            parameters[0].grad[0] = math.inf
        unscale(self, parameters)

    monkeypatch.setattr(LossScale, "unscale", overflowing)


def test_steps_that_overflow_are_skipped_and_the_training_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, above=FIRST_SCALE / 8)
    train_small(folder, train_params(precision="fp16"), checkpoint_every=2)
    norms = [row["grad_norm"] for row in curve(folder)]
    assert [math.isfinite(norm) for norm in norms[:5]] == [False, False, False, True, True]
    assert all(math.isfinite(row["loss"]) for row in curve(folder))
    saved = torch.load(folder / "work/checkpoints/step_00000040/state.pt", weights_only=True)
    assert saved["loss_scale"] == {"scale": torch.tensor(FIRST_SCALE / 8), "good_steps": torch.tensor(37)}


def test_gradients_that_overflow_without_a_scale_stop_the_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(monkeypatch, above=0.0)
    with pytest.raises(UserError, match=r"step 17 has a finite loss and gradient norm (inf|nan)"):
        train_small(folder, train_params(precision="fp16"))


def test_a_loss_that_is_not_finite_stops_a_training_in_fp16_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = NextToken.forward
    monkeypatch.setattr(NextToken, "forward", lambda self, *batch: forward(self, *batch) * math.nan)
    with pytest.raises(UserError, match="step 1 has loss nan on rank 0"):
        train_small(folder, train_params(precision="fp16", validate_every=40))


def test_a_checkpoint_of_bf16_has_no_scale(folder: Path) -> None:
    train_small(folder, train_params(max_tokens=128, warmup_steps=1, precision="bf16"), checkpoint_every=1)
    saved: dict[str, Tensor] = torch.load(folder / "work/checkpoints/step_00000002/state.pt", weights_only=True)
    assert "loss_scale" not in saved
