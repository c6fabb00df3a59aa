"""`micro_batch_size: auto`, and what is said where memory runs out."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_params import model_params, train_params
from small_run import ALONE, curve, new_model, train_small
from small_vocabulary import TOKENIZER
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.shapes.gpt2 import GPT2Section
from pipelib.schema import parse
from pipelib.training.batches import check_shares
from pipelib.training.inputs import RANDOM_WEIGHTS
from pipelib.training.launch.distributed import World
from pipelib.training.launch.job import Job
from pipelib.training.memory import USABLE, Footprint, Memory
from pipelib.training.micro_batch import resolve_micro_batch_size
from pipelib.training.objectives import NextToken
from pipelib.training.params import SpikeParams, TrainParams
from pipelib.training.pretraining import PretrainJob
from pipelib.training.schedule import Cadence


def params(**changes: Any) -> TrainParams:
    return train_params(**{"max_tokens": 64 * 4, "warmup_steps": 1, "micro_batch_size": "auto", **changes})


def room_for(rows: int) -> int:
    """Bytes that hold a micro-batch of so many rows, and not one more."""
    return int(Footprint(model_params(), TOKENIZER.size, params()).memory(rows).total / USABLE) + 1


@pytest.mark.parametrize(("rows", "chosen"), [(1, 1), (2, 2), (3, 3), (5, 4), (11, 6), (12, 12), (99, 12)])
def test_the_largest_divisor_that_fits(rows: int, chosen: int) -> None:
    footprint = Footprint(model_params(), TOKENIZER.size, params(global_batch_tokens=12 * 16))
    room = int(footprint.memory(rows).total / USABLE) + 1
    assert footprint.rows_that_fit(room) == chosen
    assert footprint.rows_that_fit(footprint.memory(1).total // 2) == 0
    two = replace(footprint, world_size=2)
    share = [rows for rows in (1, 2, 3, 6) if two.memory(rows).total <= USABLE * room]
    assert two.rows_that_fit(room) == max(share, default=0)


def test_what_a_parameter_and_a_logit_take() -> None:
    def memory(rows: int = 2, world_size: int = 1, **changes: Any) -> Memory:
        return Footprint(model_params(), TOKENIZER.size, params(**changes), world_size).memory(rows)

    parameters = memory().weights // 4
    assert memory().gradients == 4 * parameters
    assert memory(compile=True).gradients == 8 * parameters, "a compiled backward pass adds to the gradients so far"
    assert memory(rows=4, compile=True).gradients == 4 * parameters, "one micro-step adds to nothing"
    assert memory(rows=1, world_size=2).gradients == 8 * parameters, "DDP's buckets"
    assert memory(rows=2, world_size=2).gradients == 4 * parameters
    logits = 2 * 16 * TOKENIZER.padded_size
    assert memory().logits == memory(precision="bf16").logits == 12 * logits
    assert memory(compile=True).logits == 8 * logits
    assert memory(compile=True, precision="bf16").logits == memory(compile=True, precision="fp16").logits == 4 * logits
    assert memory(precision="fp16").copies == memory(precision="bf16").copies > memory().copies == 0


def try_on_gpu(monkeypatch: pytest.MonkeyPatch, room: int, *, global_rows: int = 4) -> tuple[int | str, list[int]]:
    """The micro-batch that a GPU settles on that can hold this many rows, and the rows of every backward pass."""
    tried: list[int] = []

    def backward(_: object, batch: Sequence[Tensor], *__: object) -> None:
        rows = len(batch[0])
        tried.append(rows)
        if rows > room:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")

    monkeypatch.setattr("pipelib.training.micro_batch.warmup_backward", backward)
    monkeypatch.setattr(World, "runs_ahead", True)
    footprint = Footprint(model_params(), TOKENIZER.size, params(global_batch_tokens=16 * global_rows))
    settled = resolve_micro_batch_size(
        footprint, NextToken(new_model()), torch.nn.Linear(1, 1), ALONE, 10**12, restored=0
    )
    return settled.micro_batch_size, tried


@pytest.mark.parametrize(("room", "rows", "tried"), [(4, 4, [4]), (3, 2, [4, 2, 2]), (2, 2, [4, 2, 2]), (1, 1, [4, 2])])
def test_a_gpu_tries_two_micro_steps_where_there_are_two(
    monkeypatch: pytest.MonkeyPatch, room: int, rows: int, tried: list[int]
) -> None:
    assert try_on_gpu(monkeypatch, room) == (rows, tried)


def test_other_errors_of_a_trial_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("pipelib.training.micro_batch.warmup_backward", broken)
    monkeypatch.setattr(World, "runs_ahead", True)
    footprint = Footprint(model_params(), TOKENIZER.size, params())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        resolve_micro_batch_size(footprint, NextToken(new_model()), torch.nn.Linear(1, 1), ALONE, 10**12, restored=0)


def free(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Have this machine hold so many rows."""
    monkeypatch.setattr(Footprint, "free_per_rank", lambda *_: room_for(rows))


def test_it_is_chosen_said_and_kept_by_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free(monkeypatch, 2)
    train_small(folder, params(micro_batch_size=2), checkpoint_every=2)
    fixed = (folder / "work/train.csv").read_bytes()
    shutil.rmtree(folder / "work")
    capsys.readouterr()

    train_small(folder, params(), checkpoint_every=2)
    assert "2 micro-steps of 2 rows on each of 1 rank," in capsys.readouterr().out
    assert (folder / "work/train.csv").read_bytes() == fixed
    last = folder / "work/checkpoints/step_00000004"
    assert torch.load(last / "state.pt", weights_only=True)["train"]["micro_batch_size"] == 2

    shutil.rmtree(last)
    free(monkeypatch, 4)  # more memory is no reason to go on otherwise
    train_small(folder, params(), checkpoint_every=2)
    assert "2 micro-steps of 2 rows" in capsys.readouterr().out
    assert (folder / "work/train.csv").read_bytes() == fixed
    shutil.rmtree(folder / "work")
    train_small(folder, params())
    assert "1 micro-step of 4 rows" in capsys.readouterr().out


def out_of_memory(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """Have the forward pass ask for more than there is."""
    hidden = GPT2.hidden

    def too_much(self: GPT2, inputs: Tensor, *others: Any) -> Tensor:
        if inputs.shape[0] > 1 and torch.is_grad_enabled():
            if error == "torch, on a CPU":
                torch.empty(2**55)
            raise torch.OutOfMemoryError("CUDA out of memory") if error == "torch, on a GPU" else MemoryError
        return hidden(self, inputs, *others)

    monkeypatch.setattr(GPT2, "hidden", too_much)


@pytest.mark.parametrize("error", ["torch, on a CPU", "torch, on a GPU", "Python"])
def test_running_out_of_memory_names_what_would_fit(folder: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    out_of_memory(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        train_small(folder, params(micro_batch_size=4))
    assert "a micro-batch of 4 rows of 16 tokens needs about" in str(caught.value)
    assert "train.micro_batch_size: 2 would fit, with about" in str(caught.value)
    assert "train.activation_checkpointing: true needs less too" in str(caught.value)
    assert not curve(folder)

    free(monkeypatch, 1)
    with pytest.raises(UserError, match=r"train\.micro_batch_size: 1 would fit"):
        train_small(folder, params(micro_batch_size=4))
    monkeypatch.setattr(Footprint, "free_per_rank", lambda *_: 1000)
    with pytest.raises(UserError, match="no smaller micro-batch would fit"):
        train_small(folder, params(micro_batch_size=4))


@pytest.mark.parametrize("rows", ["auto", 4])
def test_a_model_that_does_not_fit_by_itself_is_told_what_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int | str
) -> None:
    def too_large(*_: object) -> GPT2:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT2, "to", too_large)
    monkeypatch.setattr(Footprint, "free_per_rank", lambda *_: 1000)
    with pytest.raises(
        UserError, match=r"rows? of 16 tokens needs about .* and 1\.0 [kK]i?B were free, .* no smaller micro-batch"
    ):
        train_small(folder, params(micro_batch_size=rows))


def test_ranks_read_the_job_that_the_launcher_wrote(tmp_path: Path) -> None:
    model = GPT2Section(**vars(model_params()), init_from="scratch")
    rule = SpikeParams(window=4, deviations=6.0, batches=2, rollbacks=3)
    for train in (params(), params(micro_batch_size=4, spike=rule, hellaswag_every=7)):
        job = PretrainJob(
            train=train,
            cadence=Cadence(1, 5),
            record="",
            code="",
            resumed_with_other_code=False,
            model=model,
            tokens="data/tokens",
            benchmarks="data/benchmarks",
            initial=RANDOM_WEIGHTS,
        )
        job.write(tmp_path)
        assert Job.read(tmp_path) == job


def test_other_errors_stay_what_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("the shapes do not fit")

    monkeypatch.setattr(GPT2, "hidden", broken)
    with pytest.raises(RuntimeError, match="the shapes do not fit"):
        train_small(folder, params())


def test_ranks_that_cannot_share_a_step_are_refused_without_a_number_too() -> None:
    check_shares(params(), 4)
    with pytest.raises(UserError, match=r"3 ranks .* cannot share the 4 rows of a step equally, .* lost; start fewer"):
        check_shares(params(), 3)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("autp", "it must be a whole number or auto."),
        (0, "must be greater than 0."),
        (1.5, "it must be a whole number."),
    ],
)
def test_only_a_number_or_auto(value: object, problem: str) -> None:
    values = {**vars(params()), "sample_prompts": [], "micro_batch_size": value}
    problems: list[str] = []
    parse(TrainParams, values, "train", problems)
    assert len(problems) == 1
    assert problems[0].startswith(f"train.micro_batch_size: {value!r}")
    assert problems[0].endswith(problem)
