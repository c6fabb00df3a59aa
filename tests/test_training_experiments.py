"""`train.experiments`: each computes the same thing, none is used unless it is asked for; and validation compiled for a GPU."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_params import train_params
from small_run import curve, differing, new_model, train_small
from torch import Tensor

from pipelib.model.device import autocast
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import NextToken
from pipelib.training.params import ExperimentParams

NONE = {"bf16_residual": False, "separate_qkv": False, "max_autotune": False}


def gradients(precision: str = "fp32", **on: bool) -> tuple[Tensor, Tensor]:
    """The loss of one batch, and all of its gradients."""
    model = new_model()
    for name, value in on.items():
        setattr(model, name, value)
    tokens = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(1))
    with autocast(torch.device("cpu"), precision):
        loss = NextToken(model)(tokens[:, :-1], tokens[:, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_three_products_give_what_one_gives() -> None:
    (loss, grads), (separate, others) = gradients(), gradients(separate_qkv=True)
    assert separate.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(others, grads, rtol=1e-4, atol=1e-5)


def test_a_residual_stream_in_bf16_is_near_one_in_fp32() -> None:
    (loss, grads), (rounded, others) = gradients("bf16"), gradients("bf16", bf16_residual=True)
    assert not torch.equal(grads, others)
    assert rounded.item() == pytest.approx(loss.item(), rel=1e-3)
    assert (others - grads).norm() < 0.02 * grads.norm()


def test_a_training_uses_what_is_asked_for(folder: Path) -> None:
    plain = train_small(folder, train_params(max_tokens=640))
    losses = [row["loss"] for row in curve(folder)]
    assert not plain.separate_qkv
    shutil.rmtree(folder / "work")
    none = train_small(folder, train_params(max_tokens=640, experiments=ExperimentParams(**NONE)))
    assert differing(plain, none) == []
    shutil.rmtree(folder / "work")
    tried = ExperimentParams(**{**NONE, "separate_qkv": True, "bf16_residual": True})
    model = train_small(folder, train_params(max_tokens=640, precision="bf16", experiments=tried))
    assert model.separate_qkv
    assert model.bf16_residual
    assert [row["loss"] for row in curve(folder)] == pytest.approx(losses, abs=0.05)


def test_a_residual_stream_in_bf16_needs_products_in_bf16() -> None:
    tried = ExperimentParams(**{**NONE, "bf16_residual": True})
    (problem,) = train_params(experiments=tried).problems()
    assert problem.startswith("experiments.bf16_residual: true needs precision: bf16, not fp32")
    assert list(train_params(precision="bf16", experiments=tried).problems()) == []


def test_null_decides_as_before_the_parameter_existed() -> None:
    assert "experiments" not in train_params().decides()
    assert train_params(experiments=ExperimentParams(**NONE)).decides()["experiments"] == NONE


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What torch.compile is asked to compile from now on; it compiles nothing."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def compile_nothing(target: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append((getattr(target, "__name__", type(target).__name__), options))
        return target

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return asked


@pytest.mark.parametrize("autotune", [False, True])
def test_autotuning_is_a_mode_of_the_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, autotune: bool) -> None:
    asked = compilations(monkeypatch)
    tried = ExperimentParams(**{**NONE, "max_autotune": autotune})
    train_small(folder, train_params(max_tokens=64, warmup_steps=0, compile=True, experiments=tried))
    assert asked == [("NextToken", {"mode": "max-autotune-no-cudagraphs" if autotune else None})]


@pytest.mark.parametrize(("validate_every", "compiled"), [(10, True), (20, False)])
def test_on_a_gpu_validation_is_compiled_if_there_are_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, validate_every: int, compiled: bool
) -> None:
    expected = train_small(folder, train_params(validate_every=validate_every))
    losses = (folder / "work/validation.csv").read_bytes()
    shutil.rmtree(folder / "work")
    asked = compilations(monkeypatch)
    monkeypatch.setattr(World, "runs_ahead", True)
    model = train_small(folder, train_params(validate_every=validate_every, compile=True))
    assert ("token_losses", {"dynamic": False}) in asked or not compiled
    assert len(asked) == 1 + compiled, "once for the training, and once for all validations"
    assert differing(model, expected) == []
    assert (folder / "work/validation.csv").read_bytes() == losses
