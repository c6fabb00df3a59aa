"""`train.spike`: a step whose loss jumps is undone and its batch left out, whatever else happens to the run."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_params import train_params
from small_run import ALONE, curve, train_small
from torch import Tensor

from pipelib.errors import UserError
from pipelib.schema import parse
from pipelib.tokens.shards import read_manifest
from pipelib.training import loop
from pipelib.training.batches import fit_tokens, make_loader
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import NextToken
from pipelib.training.params import SpikeParams, TrainParams
from pipelib.training.spikes import Spikes

RULE = SpikeParams(window=4, deviations=8.0, batches=1, rollbacks=2)


def params(**changes: Any) -> TrainParams:
    return train_params(**{"max_tokens": 64 * 12, "spike": RULE, "validate_every": 6, "sample_every": 12, **changes})


def bad_batches(monkeypatch: pytest.MonkeyPatch, folder: Path, *numbers: int, by: float = 5.0) -> None:
    """Have the loss of these batches be worse by so much: what such text would do."""
    loader, _ = make_loader(params(), folder / "tokens", read_manifest(folder / "tokens"), ALONE)
    bad = [inputs for number in numbers for inputs, _ in loader.micro_batches(number)]
    forward = NextToken.forward

    def worse(self: NextToken, inputs: Tensor, targets: Tensor) -> Tensor:
        hit = any(torch.equal(inputs, one) for one in bad)
        return forward(self, inputs, targets) * (by if hit else 1.0)

    monkeypatch.setattr(NextToken, "forward", worse)


def files(folder: Path) -> dict[str, bytes]:
    """The curves, but for the speed, which differs each time."""
    return {path.name: path.read_bytes() for path in (folder / "work").glob("*.csv") if path.name != "speed.csv"}


def test_nothing_is_left_out_where_nothing_jumps(folder: Path) -> None:
    train_small(folder, params(spike=None))
    losses = (folder / "work/train.csv").read_bytes()
    assert "spikes.csv" not in files(folder)
    shutil.rmtree(folder / "work")
    train_small(folder, params())
    assert (folder / "work/train.csv").read_bytes() == losses
    assert files(folder)["spikes.csv"] == b"step,loss,limit,batches\n"


@pytest.mark.parametrize("by", [5.0, math.nan])
def test_the_result_is_that_of_a_training_without_the_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by: float, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_batches(monkeypatch, folder, 8, by=by)
    model = train_small(folder, params(), checkpoint_every=5)
    assert "skips batch 8 (rollback 1 of at most 2)" in capsys.readouterr().err
    rows = curve(folder)
    assert [row["step"] for row in rows] == [*range(1, 13)]
    assert max(row["loss"] for row in rows) < 11
    assert files(folder)["spikes.csv"].decode().splitlines()[1].startswith("9,")
    assert files(folder)["spikes.csv"].endswith(b",8\n")

    shutil.rmtree(folder / "work")
    monkeypatch.undo()
    monkeypatch.setattr(Spikes, "batch_of", lambda _, step: step + (step >= 8))
    expected = train_small(folder, params(spike=None))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), expected.parameters(), strict=True))
    assert curve(folder) == rows


class Killed(BaseException):
    """Stands for a kill."""


def test_it_depends_neither_on_cadence_nor_on_kills(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = params(spike=SpikeParams(window=4, deviations=8.0, batches=2, rollbacks=2))
    bad_batches(monkeypatch, folder, 6, 12)
    seen = []
    for checkpoint_every, log_every, runs_ahead, kills in (
        (10**6, 1, False, ()),
        (2, 3, True, ()),
        (3, 2, False, (8, 13)),
    ):
        monkeypatch.setattr(World, "runs_ahead", runs_ahead)
        calls = itertools.count(1)
        take_step = loop.take_step

        def step(*arguments: Any, calls: Any = calls, kills: tuple[int, ...] = kills, real: Any = take_step) -> Any:
            if next(calls) in kills:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "take_step", step)
            for _ in range(len(kills)):
                with pytest.raises(Killed):
                    train_small(folder, rule, checkpoint_every=checkpoint_every, log_every=log_every)
            model = train_small(folder, rule, checkpoint_every=checkpoint_every, log_every=log_every)
        seen.append((files(folder), [parameter.detach().clone() for parameter in model.parameters()]))
        shutil.rmtree(folder / "work")
    assert len(seen[0][0]["spikes.csv"].splitlines()) == 3
    for curves, weights in seen[1:]:
        assert curves == seen[0][0]
        assert all(torch.equal(one, two) for one, two in zip(weights, seen[0][1], strict=True))


def test_after_so_many_a_jump_stays_and_what_is_not_finite_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = params(spike=SpikeParams(window=4, deviations=8.0, batches=1, rollbacks=1))
    with monkeypatch.context() as patch:
        bad_batches(patch, folder, 5, 9)
        train_small(folder, rule, checkpoint_every=5)
    assert max(row["loss"] for row in curve(folder)) > 20
    assert len(files(folder)["spikes.csv"].splitlines()) == 2
    shutil.rmtree(folder / "work")
    bad_batches(monkeypatch, folder, 5, 9, by=math.nan)
    with pytest.raises(UserError, match="step 9 has loss nan on rank 0"):  # batch 9, since 5 was left out
        train_small(folder, rule, checkpoint_every=5)


def test_batches_are_taken_in_order_without_those_left_out() -> None:
    spikes = Spikes(RULE)
    spikes.load_state_dict({"found": [[4, 9.0, 5.0, [2, 3]], [6, 9.0, 5.0, [7]]], "recent": [1.0]})
    assert [spikes.batch_of(step) for step in range(6)] == [0, 1, 4, 5, 6, 8]
    again = Spikes(RULE)
    again.load_state_dict(spikes.state_dict())
    assert again.state_dict() == spikes.state_dict()


def test_the_limit_is_the_mean_and_so_many_deviations() -> None:
    spikes = Spikes(SpikeParams(window=4, deviations=2.0, batches=2, rollbacks=9))
    for step, loss in enumerate((9.0, 1.0, 3.0, 1.0, 3.0), start=1):  # the first is out of the window by then
        assert spikes.detect(step, loss, finite=True) is None
    assert spikes.detect(6, 4.0, finite=True) is None  # 2 + 2 · 1
    spike = spikes.detect(7, 5.4, finite=True)  # of 3, 1, 3, 4: 2.75 + 2 · 1.09
    assert spike is not None
    assert spike.limit == pytest.approx(2.75 + 2 * math.sqrt(1.1875))
    assert spike.batches == (5, 6)


def test_what_it_may_leave_out_counts_as_data(folder: Path) -> None:
    manifest = read_manifest(folder / "tokens")  # 95 batches
    for asked in (93, 94):
        assert fit_tokens(params(max_tokens=64 * asked, max_epochs=1.0), manifest).max_tokens == 64 * 93


def test_a_rule_that_cannot_hold_is_refused() -> None:
    problems: list[str] = []
    parse(SpikeParams, {"window": 1, "deviations": 0, "batches": 1}, "train.spike", problems)
    assert [line.split(":")[0].split(" ")[0] for line in problems] == [
        "train.spike.deviations",
        "train.spike.rollbacks",
    ]
    problems.clear()
    parse(SpikeParams, {"window": 1, "deviations": 6, "batches": 1, "rollbacks": 3}, "train.spike", problems)
    assert problems[0].startswith("train.spike.window: 1: one loss has no standard deviation")
