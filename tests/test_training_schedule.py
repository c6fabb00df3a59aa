"""Schedules of the learning rate, and longer trainings that go on from the trunk of a shorter one."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from small_params import train_params, write_params
from small_run import write_tokens

from pipelib.files import files_under
from pipelib.params import load_params
from pipelib.schema import ParamsError
from pipelib.stage import Build
from pipelib.tokens.shards import read_manifest
from pipelib.tracking.run import NullRun, Run
from pipelib.training.inputs import RANDOM_WEIGHTS
from pipelib.training.learning_rate import learning_rate_at
from pipelib.training.pretraining import pretrain
from pipelib.training.schedule import SAVE, Cadence, Schedule

# ---- Rates -----------------------------------------------------------------------------------------------------------

RECIPE = {"max_tokens": 6400, "global_batch_tokens": 64, "warmup_steps": 4, "max_lr": 1e-2, "min_lr": 1e-3}
"""100 steps."""


@pytest.mark.parametrize(
    ("schedule", "cooldown", "step", "rate"),
    [
        ("linear", None, 0, 2.5e-3),
        ("linear", None, 4, 1e-2),
        ("linear", None, 52, 5.5e-3),
        ("linear", None, 99, 1e-3 + 9e-3 / 96),
        ("wsd", 0.4, 3, 1e-2),
        ("wsd", 0.4, 60, 1e-2),
        ("wsd", 0.4, 61, 1e-2 - 9e-3 / 40),
        ("wsd", 0.4, 80, 5.5e-3),
        ("wsd", 0.4, 99, 1e-3 + 9e-3 / 40),
        ("wsd", 0.96, 4, 1e-2),
    ],
)
def test_rates_of_other_schedules(schedule: str, cooldown: float | None, step: int, rate: float) -> None:
    params = train_params(**RECIPE, schedule=schedule, cooldown=cooldown)
    assert learning_rate_at(step, params) == pytest.approx(rate, rel=1e-9)


def test_the_state_before_the_cooldown_is_saved() -> None:
    params = train_params(**RECIPE, schedule="wsd", cooldown=0.4)
    schedule = Schedule.of(params, Cadence(log_every=10**6, checkpoint_every=10**6))
    assert [step for step in range(1, 101) if SAVE in schedule.due(step)] == [60, 100]


def test_defaults_are_left_out_of_what_decides() -> None:
    assert {"schedule", "cooldown", "muon"}.isdisjoint(train_params().decides())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__schedule": "wsd"}, r"train\.cooldown: null, but schedule: wsd needs it, .* 0\.4 is a good start"),
        ({"train__cooldown": 0.4}, r"train\.cooldown: 0\.4 would be ignored, since the schedule is cosine"),
        ({"train__schedule": "wsd", "train__cooldown": 1.5}, r"train\.cooldown: 1\.5 must be at most 1"),
        (
            {"train__schedule": "wsd", "train__cooldown": 0.95},
            r"train\.cooldown: 0\.95 of 40 steps begins before the 4 steps of warmup end",
        ),
        (
            {"train__schedule": "wsd", "train__cooldown": 0.01},
            r"train\.cooldown: 0\.01 of 40 steps is less than one step, so the rate would never fall",
        ),
        ({"train__schedule": "cosin"}, r"train\.schedule: 'cosin' is not one of .*did you mean cosine"),
    ],
)
def test_a_cooldown_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_params(tmp_path, **changes)
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")


# ---- Going on --------------------------------------------------------------------------------------------------------


def train(
    folder: Path, max_tokens: int, cooldown: float, run: Run | None = None, **changes: object
) -> dict[str, bytes]:
    """Run the stage's work in `folder`, with the shards in its parent; the model and the curves."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "outs").mkdir(parents=True)
    write_params(
        folder, train__schedule="wsd", train__max_tokens=max_tokens, train__cooldown=cooldown, train__sample_every=5,
        **changes,
    )  # fmt: skip
    params = load_params(folder / "params.yaml")
    build = Build(folder / "outs", folder, run or NullRun(), {"code": "1"}, resumed_with_other_code=False)
    tokens = folder.parent / "tokens"
    inputs = {"train": params.train.decides(), "data": read_manifest(tokens).fingerprint}
    pretrain(build, params.model, params.train, Cadence(1, 7), tokens, folder, RANDOM_WEIGHTS, inputs)
    files = [path for path in files_under(folder / "outs") if "speed" not in path.parts and "pipelib" not in path.name]
    assert files
    return {path.relative_to(folder / "outs").as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder; shards are beside it."""
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PIPELIB_NPROC", "1")
    write_tokens(tmp_path / "tokens")
    return tmp_path / "state"


def kept(state: Path) -> list[str]:
    return sorted(path.name for path in state.glob("trunks/*/step_*"))


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def test_a_longer_training_goes_on_from_the_trunk_with_the_bytes_of_one_that_was_never_cut(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "short", 1280, 0.5)
    assert kept(state) == ["step_00000010"]
    capsys.readouterr()
    longer = train(tmp_path / "long", 2560, 0.25)
    said = capsys.readouterr().out
    assert "which a shorter training left before its cooldown" in said
    assert "training resumes after step 10:" in said
    assert kept(state) == ["step_00000030"], "the later trunk takes the place of the earlier one"
    shutil.rmtree(state)
    whole = train(tmp_path / "whole", 2560, 0.25)
    assert "shorter training" not in capsys.readouterr().out
    assert "model.safetensors" in {Path(name).name for name in whole}
    assert len([name for name in whole if name.startswith("curves/")]) == 5
    assert differing(longer, whole) == []


@pytest.mark.long
def test_a_trunk_is_not_taken_where_it_does_not_fit(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other data, another rate, another seed, or a training whose own cooldown begins before the trunk ends."""
    train(tmp_path / "first", 1280, 0.5)
    for changes in ({"train__max_lr": 2e-2}, {"train__seed": 8}, {"train__max_tokens": 960}):
        tokens = int(str(changes.pop("train__max_tokens", 2560)))
        train(tmp_path / "other", tokens, 0.5, **changes)
        assert "shorter training" not in capsys.readouterr().out
    write_tokens(tmp_path / "tokens", different=50)
    train(tmp_path / "data", 2560, 0.25)
    assert "shorter training" not in capsys.readouterr().out
    assert len(list(state.glob("trunks/*"))) == 4
    monkeypatch.setenv("PIPELIB_RESUME", "fresh")
    train(tmp_path / "data", 2560, 0.25)
    assert "shorter training" not in capsys.readouterr().out


@pytest.mark.long
def test_a_shorter_training_leaves_the_trunk_of_a_longer_one_as_it_is(tmp_path: Path, state: Path) -> None:
    train(tmp_path / "long", 1280, 0.5)
    before = {path: path.read_bytes() for path in state.glob("trunks/*/step_*/*.csv")}
    train(tmp_path / "short", 768, 0.5)
    assert kept(state) == ["step_00000010"]
    assert before == {path: path.read_bytes() for path in state.glob("trunks/*/step_*/*.csv")}
    longer = train(tmp_path / "longer", 2560, 0.25)
    shutil.rmtree(state)
    assert differing(longer, train(tmp_path / "whole", 2560, 0.25)) == []


def test_what_is_not_in_the_key_decides_nothing_before_the_cooldown(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`min_lr` is a tenth of `max_lr` before, and the sum and difference of the two would round."""
    changes: dict[str, object] = {"train__min_lr": 0.0, "train__max_epochs": 3.0}
    train(tmp_path / "short", 1280, 0.5)
    longer = train(tmp_path / "long", 2560, 0.25, **changes)
    assert "shorter training" in capsys.readouterr().out
    shutil.rmtree(state)
    assert differing(longer, train(tmp_path / "whole", 2560, 0.25, **changes)) == []


def test_the_record_of_a_longer_training_has_all_points(tmp_path: Path, state: Path) -> None:  # noqa: ARG001
    points: dict[str, list[int]] = {}

    class Note(NullRun):
        def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            assert step is not None
            for name in metrics:
                points.setdefault(name, []).append(step)

    train(tmp_path / "short", 1280, 0.5)
    run = Note()
    train(tmp_path / "long", 2560, 0.25, run=run)
    assert points["train/loss"] == list(range(1, 41))
    assert points["val_loss"] == [0, 10, 20, 30, 40]
    assert points["update_size/matrices"] == [10, 20, 30, 40]


@pytest.mark.long
def test_a_damaged_trunk_is_not_used(tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "short", 1280, 0.5)
    (found,) = state.glob("trunks/*/step_*/checkpoint/state.pt")
    content = bytearray(found.read_bytes())
    content[-100] ^= 1
    found.unlink()
    found.write_bytes(content)
    longer = train(tmp_path / "long", 2560, 0.25)
    assert "is damaged: its bytes are not those that were saved, so it is not used" in capsys.readouterr().out
    shutil.rmtree(state)
    assert differing(longer, train(tmp_path / "whole", 2560, 0.25)) == []
