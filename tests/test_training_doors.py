"""What comes in by the doors of a training: another optimizer, another objective. The page does not know which."""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_chat import base_model, encoded, facts
from small_params import MUON, model_params, train_params, write_params
from small_run import ALONE, DIFFERENT, curve, train_small, write_tokens
from small_vocabulary import TOKENIZER
from torch import Tensor, nn

from pipelib.finetuning.objective import Answers
from pipelib.finetuning.packing import ConversationRows
from pipelib.model.decoder import build
from pipelib.params import load_params
from pipelib.schema import ParamsError
from pipelib.training import optim
from pipelib.training.batches import TensorBatch
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import NextToken, Objective
from pipelib.training.optimizer import make_optimizer
from pipelib.training.params import DEFAULTS, TrainParams, known_optimizers
from pipelib.training.step import take_step
from pipelib.vocabulary.chat import ASSISTANT, Message

TOYS = Path(__file__).with_name("toy_optimizer")
OPTIMIZERS = sorted(path.stem for folder in (*optim.__path__, TOYS) for path in Path(folder).glob("[a-z]*.py"))
NEEDS: dict[str, dict[str, Any]] = {"sgd": {"max_lr": 0.5}, "muon": {"max_lr": 0.02, "muon": MUON}}
"""What they need beside their name."""


@pytest.fixture(autouse=True)
def toy_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """sgd.py beside the optimizers of the project."""
    monkeypatch.setattr(optim, "__path__", [*optim.__path__, str(TOYS)])


# ---- Optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_with_any_optimizer_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    params = train_params(max_tokens=1280, optimizer=name, **NEEDS.get(name, {}))
    models = []
    for run in ("whole", "resumed"):
        (tmp_path / run).mkdir()
        write_tokens(tmp_path / run / "tokens")
        models.append(train_small(tmp_path / run, params, checkpoint_every=7))
    checkpoints = tmp_path / "resumed" / "work" / "checkpoints"
    shutil.rmtree(max(path for path in checkpoints.iterdir() if path.is_dir()))
    models.append(train_small(tmp_path / "resumed", params, checkpoint_every=7))
    for tensors in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(tensors[0], tensors[1])
        assert torch.equal(tensors[0], tensors[2])
    rows = curve(tmp_path / "whole")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_adamw_goes_without_saying() -> None:
    """A training of before there was a choice is one with AdamW: its fingerprint stays."""
    assert "optimizer" not in train_params().decides()
    assert train_params(optimizer="sgd").decides() == {**train_params().decides(), "optimizer": "sgd"}
    assert train_params().decides().keys() == asdict(train_params()).keys() - DEFAULTS.keys()


def test_an_unknown_optimizer_is_refused(tmp_path: Path) -> None:
    assert known_optimizers() == OPTIMIZERS
    write_params(tmp_path, train__optimizer="adamv")
    with pytest.raises(ParamsError, match=r"train\.optimizer: 'adamv' is not one of adamw, .*; did you mean adamw\?"):
        load_params(tmp_path / "params.yaml")
    write_params(tmp_path, train__optimizer=None)
    with pytest.raises(ParamsError, match=r"train\.optimizer: None is empty; it must be text"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    params, model = train_params(optimizer=name, **NEEDS.get(name, {})), nn.Linear(3, 3)
    optimizer = make_optimizer(model, params)
    for value, finite in ((1.0, True), (float("nan"), False)):
        before = [tensor.clone() for tensor in tensors_of((model.state_dict(), optimizer.state_dict()))]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step(0.1, torch.tensor(finite))
        after = tensors_of((model.state_dict(), optimizer.state_dict()))
        assert finite == any(not torch.equal(*pair) for pair in zip(before, after, strict=False))


def tensors_of(state: Any) -> list[Tensor]:
    """Every tensor in a state."""
    if isinstance(state, Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for item in inner for tensor in tensors_of(item)]


# ---- Objectives ------------------------------------------------------------------------------------------------------


class EvenTokens(Objective):
    """Predict the tokens with even numbers only: rows have different numbers of targets."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.logits(self.model.hidden(inputs).flatten(0, 1))
        losses = F.cross_entropy(logits.float(), targets.flatten(), reduction="none")
        return (losses * (targets.flatten() % 2 == 0)).sum()

    def target_count(self, targets: Tensor) -> int:
        return int((targets % 2 == 0).sum())


class Keep:
    """An optimizer that keeps the gradients of its last step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def step(self, learning_rate: float, finite: Tensor) -> None:  # noqa: ARG002
        assert finite
        self.gradients = [
            parameter.grad.clone() for parameter in self._model.parameters() if parameter.grad is not None
        ]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        pass


@dataclass(frozen=True)
class OneOfTwo(World):
    """A rank that knows what the other one adds to a sum."""

    other: float = 0.0

    def sum(self, value: Tensor) -> Tensor:
        return value + self.other

    def all_gather(self, value: Tensor) -> Tensor:
        return value[None]

    def sync_when(self, wanted: bool, model: nn.Module) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Four rows; all targets of the second are odd, and no two have as many even ones."""
    tokens = torch.randint(0, 500, (4, 17), generator=torch.Generator().manual_seed(2))
    tokens[1] |= 1
    tokens[3, :9] &= ~1
    return tokens[:, :-1], tokens[:, 1:]


def gradients(
    objective: Objective, batches: Sequence[TensorBatch], params: TrainParams, world: World = ALONE
) -> tuple[float, list[Tensor]]:
    """The loss of a step, and the gradients before they are clipped."""
    keep = Keep(objective.model)
    result = take_step(objective, objective, keep, batches, 0.1, replace(params, grad_clip_norm=1e9), world)
    return result.loss.item(), keep.gradients


def test_an_objective_counts_its_own_targets(rows: tuple[Tensor, Tensor]) -> None:
    """However a step is cut into micro-batches, and shared among ranks, each target that counts weighs the same."""
    inputs, targets = rows
    model = build(model_params(), TOKENIZER.size)
    model.initialise(1)
    objective, params = EvenTokens(model), train_params()
    counts = [objective.target_count(row) for row in targets]
    assert counts[1] == 0
    assert len(set(counts)) == 4
    losses = model.token_losses(inputs, targets)[targets % 2 == 0]
    (losses.sum() / sum(counts)).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    for size in (1, 2, 4):
        batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        loss, found = gradients(objective, batches, params)
        assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    halves = []
    for mine in (slice(0, 2), slice(2, 4)):
        batches = list(zip(inputs[mine].split(1), targets[mine].split(1), strict=True))
        others = sum(counts) - sum(counts[mine])
        halves.append(gradients(objective, batches, params, OneOfTwo(0, 2, torch.device("cpu"), other=others)))
    assert (halves[0][0] + halves[1][0]) / 2 == pytest.approx(losses.mean().item(), rel=1e-5)
    for one, two, other in zip(halves[0][1], halves[1][1], expected, strict=True):
        torch.testing.assert_close((one + two) / 2, other, rtol=1e-4, atol=1e-7)


def test_packed_answers_count_the_same_for_any_accumulation_and_ranks() -> None:
    """In float64 the gradients of a step are those of each conversation in a row of its own, to 1e-10."""
    told = facts(30)
    told[0] = [told[0][0], Message(ASSISTANT, "In Duri, or in Mela.")]
    dataset, _ = encoded(told, TOKENIZER)
    packed = ConversationRows.of(dataset, np.arange(len(dataset)), 96, 0, packing=True)
    numbers = np.array([number for row in packed._rows[:4] for number in row])
    single = ConversationRows.of(dataset, numbers, 96, 0, packing=False)
    inputs, targets, positions = map(torch.from_numpy, packed.batch(np.arange(4)))
    whole = tuple(map(torch.from_numpy, single.batch(np.arange(len(single)))))
    model, params = base_model("qwen3", TOKENIZER.size).double(), train_params()
    loss, expected = gradients(Answers(model, packed=False), [whole], params)
    objective = Answers(model, packed=True)

    def micro_batches(rows: slice, size: int) -> list[TensorBatch]:
        return list(zip(*(part[rows].split(size) for part in (inputs, targets, positions)), strict=True))

    for size in (1, 2, 4):
        again, found = gradients(objective, micro_batches(slice(4), size), params)
        assert again == pytest.approx(loss, rel=1e-12)
        assert max((one - other).abs().max() for one, other in zip(found, expected, strict=True)) < 1e-10
    counts = [objective.target_count(targets[half]) for half in (slice(0, 2), slice(2, 4))]
    assert counts[0] != counts[1]
    halves = [
        gradients(objective, micro_batches(half, 1), params, OneOfTwo(0, 2, torch.device("cpu"), other=other))[1]
        for half, other in zip((slice(0, 2), slice(2, 4)), reversed(counts), strict=True)
    ]
    for one, two, other in zip(*halves, expected, strict=True):
        assert ((one + two) / 2 - other).abs().max() < 1e-10


def test_where_no_target_counts_the_step_is_not_taken(rows: tuple[Tensor, Tensor]) -> None:
    model = build(model_params(), TOKENIZER.size)
    model.initialise(1)
    keep = Keep(model)
    batches = [(rows[0][1:2], rows[1][1:2])]
    with pytest.raises(AssertionError):
        take_step(EvenTokens(model), EvenTokens(model), keep, batches, 0.1, train_params(), ALONE)


def test_a_training_takes_another_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint belongs to its objective: the second training does not resume from the first one's."""
    write_tokens(tmp_path / "tokens")
    params = train_params(max_tokens=1280)
    even = train_small(tmp_path, params, objective_of=EvenTokens)
    every = train_small(tmp_path, params, objective_of=NextToken)
    assert "belongs to another run, with another objective" in capsys.readouterr().out
    tokens = torch.randint(0, DIFFERENT, (4, 17), generator=torch.Generator().manual_seed(3))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        odd = [model.token_losses(inputs, targets)[targets % 2 == 1].mean().item() for model in (even, every)]
    assert odd[0] > odd[1] + 0.3, "what was not trained for was not learnt"
