"""Comparing runs: the paired interval is right, runs are found wherever they are, and what is unknown is said."""

import hashlib
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_params import PARAMS

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.evaluation.items import ItemScores, item_ids, write_items
from pipelib.inspection.bootstrap import mean, measures, paired_difference
from pipelib.inspection.runs import find_run

# ---- Paired bootstrap ------------------------------------------------------------------------------------------------


def make_scores(shift: float, seed: int = 0, ids: bytes = b"item", texts: int = 300) -> dict[str, Any]:
    """Losses of two items a text that share its error, so that pairing matters; `shift` is the difference of the mean."""
    rng = np.random.default_rng(7)
    hard = rng.normal(4, 1, texts).repeat(2)
    noise = np.random.default_rng(seed).normal(0, 0.05, texts).repeat(2)
    return {
        "validation/ids": item_ids(ids + str(number).encode() for number in range(2 * texts)),
        "validation/documents": np.arange(texts).repeat(2),
        "validation/loss": hard + noise + shift,
    }


def test_the_interval_is_that_of_the_mean_over_texts() -> None:
    first, second = make_scores(0.0, 1), make_scores(0.02, 2)
    found = paired_difference(first, second, "validation/loss")
    assert found is not None
    by_text = (second["validation/loss"] - first["validation/loss"])[::2]  # items of a text differ by the same amount
    half = 1.96 * by_text.std(ddof=1) / np.sqrt(len(by_text))
    assert found.value == pytest.approx(by_text.mean())
    assert found.low == pytest.approx(by_text.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(by_text.mean() + half, abs=0.15 * half)
    assert found.excludes_zero, "unpaired, losses that vary by 1 would hide a difference of 0.02"
    assert paired_difference(first, second, "validation/loss") == found, "the draws are the same every time"


def test_a_run_does_not_differ_from_itself() -> None:
    found = paired_difference(make_scores(0.0), make_scores(0.0), "validation/loss")
    assert found is not None
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.excludes_zero


def test_the_order_of_items_does_not_matter_and_weights_do() -> None:
    first, second = make_scores(0.0, 1), make_scores(0.1, 2)
    order = np.random.default_rng(3).permutation(len(second["validation/ids"]))
    shuffled = {name: array[order] for name, array in second.items()}
    assert paired_difference(first, shuffled, "validation/loss") == paired_difference(first, second, "validation/loss")
    weights = np.ones(len(order))
    weights[:2] = 50  # the first text counts most
    for scores in (first, second):
        scores["validation/loss/weights"] = weights
    found = paired_difference(first, second, "validation/loss")
    assert found is not None
    differences = second["validation/loss"] - first["validation/loss"]
    assert found.value == pytest.approx((differences.sum() + 49 * differences[:2].sum()) / weights.sum())
    assert mean(first, "validation/loss") == pytest.approx(np.average(first["validation/loss"], weights=weights))
    assert list(measures(first)) == ["validation/loss"]


def test_other_items_or_weights_are_not_paired() -> None:
    first = make_scores(0.0)
    assert paired_difference(first, make_scores(0.0, ids=b"other"), "validation/loss") is None
    assert paired_difference(first, make_scores(0.0, texts=299), "validation/loss") is None
    assert paired_difference(first, {**first, "validation/loss/weights": np.full(600, 2)}, "validation/loss") is None
    assert paired_difference(first, {}, "validation/loss") is None


# ---- Runs ------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, shift: float, noise: int = 0, **train: Any) -> bytes:
    """What a run leaves in a checkout, as far as compare reads it; the items' file as bytes."""
    params = {**PARAMS, "train": {**PARAMS["train"], **train}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    scores = make_scores(shift, noise)
    right = (scores["validation/loss"] < 4).astype(np.int64)
    items = {
        "validation": ItemScores(
            scores["validation/ids"], scores["validation/documents"], {"loss": scores["validation/loss"]}
        ),
        "completion": ItemScores(scores["validation/ids"], scores["validation/documents"], {"acc_norm": right}),
        "lm_eval/heldout": ItemScores(
            scores["validation/ids"],
            scores["validation/documents"],
            dict.fromkeys(("bits_per_byte", "byte_perplexity"), scores["validation/loss"]),  # both in nats
        ),
    }
    write_items(folder / "reports/items.npz", items)
    accuracy = {"value": round(float(right.mean()), 4), "low": 0.1, "high": 0.9, "items": len(right)}
    metrics: dict[str, Any] = {
        "train": {"val_loss": 5.0 + shift, "tokens": 2048, "parameters": 100},
        "evaluate": {
            "val_loss": round(float(scores["validation/loss"].mean()), 6),
            "completion": {"acc_norm": accuracy},
            "perplexity": 60.0 + shift,
            "lm_eval": {
                "heldout": {
                    "bits_per_byte": float(scores["validation/loss"].mean()) / math.log(2),
                    "byte_perplexity": math.exp(float(scores["validation/loss"].mean())),
                }
            },
        },
        "speed/train": {"seconds": 65.0, "device_hours": 0.01806, "tokens_per_second": 2417, "device": "cpu"},
    }
    for name, value in metrics.items():
        (folder / f"metrics/{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"metrics/{name}.json").write_text(json.dumps(value))
    return (folder / "reports/items.npz").read_bytes()


def row_of(table: str, name: str) -> list[str]:
    lines = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    assert len(lines) == 1, f"{name}:\n{table}"
    return [cell.strip() for cell in lines[0].strip("|").split("|")][1:]


def test_a_table_says_what_differs_and_how_sure_that_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "one", 0.0, 1)
    write_run(here / "two", 0.02, 2, max_lr=6e-5)
    assert main(["compare", "one", "two", "--md"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == ["|  | one | two |", "| --- | --- | --- |"]
    assert row_of(said, "train.max_lr") == ["0.01", "6e-05"]
    assert "| train.min_lr |" not in said, "it is the same in both"
    first, second = row_of(said, "evaluate val_loss")
    found = paired_difference(make_scores(0.0, 1), make_scores(0.02, 2), "validation/loss")
    assert found is not None
    assert second.split("  ", 1)[1] == f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
    assert float(second.split()[0]) == pytest.approx(float(first) + found.value, abs=1e-3)
    assert " to " in row_of(said, "evaluate completion.acc_norm")[1]
    assert row_of(said, "evaluate perplexity")[1].split("  ") == ["60.0200", "+0.0200"], "no mean of items, no interval"
    bits = found.value / math.log(2), found.low / math.log(2), found.high / math.log(2)
    assert row_of(said, "evaluate lm_eval.heldout.bits_per_byte")[1].endswith(
        "  {:+.4f} ({:+.4f} to {:+.4f})".format(*bits)
    )
    assert " to " not in row_of(said, "evaluate lm_eval.heldout.byte_perplexity")[1]
    assert row_of(said, "tokens trained on") == ["2,048", "2,048"]
    assert row_of(said, "device hours, train") == ["0.0181", "0.0181"]
    assert row_of(said, "tokens/s") == ["2,417", "2,417"]
    assert said.count("one; two: one seed: training noise unknown") == 1
    assert main(["compare", "one", "two"]) == 0
    plain = capsys.readouterr().out
    assert "|" not in plain
    assert {line.split("  ")[0] for line in plain.splitlines()} >= {"train.max_lr", "evaluate val_loss", "tokens/s"}


def test_three_seeds_show_the_noise_of_training(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, shift in ((1, 0.0), (2, 0.2), (3, 0.4)):
        write_run(here / f"seed{seed}", shift, 0, seed=seed)
    assert main(["compare", "seed1", "seed2", "seed3", "--md"]) == 0
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if "val_loss over 3 seeds" in line)
    assert line.endswith("standard deviation 0.2000.")
    assert "training noise unknown" not in said
    main(["compare", "seed1", "seed2"])
    assert "2 seeds: training noise unknown" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "one", 0.0)
    write_run(here / "two", 0.1)
    other = {"validation": ItemScores(item_ids([b"x"]), np.zeros(1, np.int64), {"loss": np.array([4.0])})}
    write_items(here / "two/reports/items.npz", other)
    write_run(here / "three", 0.1)
    (here / "three/reports/items.npz").unlink()
    assert main(["compare", "one", "two", "three"]) == 0
    said = capsys.readouterr().out
    assert "two was measured on other items than one in validation/loss: no interval" in said
    assert "three has no scores of single items here" in said
    (line,) = (line for line in said.splitlines() if line.startswith("evaluate val_loss"))
    assert "(" not in line


@pytest.fixture
def repository(here: Path) -> dict[str, bytes]:
    """A repository with a run at HEAD, one as an experiment of DVC, and their reports in DVC's cache alone; the items."""
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], check=True)
    (here / ".dvc").mkdir()
    (here / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (here / ".gitignore").write_text("/reports/\n/.dvc/cache\n")
    found = {}
    for name, shift in (("HEAD", 0.0), ("small-rate", 0.1)):
        found[name] = write_run(here, shift, max_lr=1e-3 + shift)
        md5 = put_into_cache(here, found[name])
        listing = put_into_cache(here, json.dumps([{"md5": md5, "relpath": "items.npz"}]).encode(), ".dir")
        code = {"path": "src/pipelib/model/families/gpt2.py", "md5": name}
        lock = {"stages": {"evaluate": {"deps": [code], "outs": [{"path": "reports", "md5": listing}]}}}
        (here / "dvc.lock").write_text(yaml.safe_dump(lock))
        git("add", "--all")
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", name)
        if name != "HEAD":
            git("update-ref", f"refs/exps/ab/cdef/{name}", "HEAD")
            git("reset", "--quiet", "--hard", "HEAD~1")
    (here / "reports/items.npz").unlink()
    return found


def put_into_cache(root: Path, content: bytes, suffix: str = "") -> str:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() + suffix
    path = root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, capture_output=True)


def test_commits_and_experiments_are_read_from_git_and_dvcs_cache(
    repository: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in repository.items():
        run = find_run(name)
        assert run.items is not None
        assert run.items.read_bytes() == content
    assert find_run("workspace").items is None
    assert main(["compare", "HEAD", "small-rate"]) == 0
    said = capsys.readouterr().out
    assert " to " in next(line for line in said.splitlines() if line.startswith("evaluate val_loss"))
    assert "small-rate ran other code than HEAD: src/pipelib/model/families/gpt2.py." in said


def test_names_that_are_no_run_are_refused(repository: dict[str, bytes], here: Path) -> None:  # noqa: ARG001
    with pytest.raises(UserError, match="large-rate is not a checkout, git revision or experiment"):
        find_run("large-rate")
    git("update-ref", "refs/exps/12/3456/small-rate", "HEAD")
    with pytest.raises(UserError, match="several experiments"):
        find_run("small-rate")
    (here / "metrics/train.json").unlink()
    with pytest.raises(UserError, match="nothing was trained there"):
        find_run("workspace")


# ---- What git and people leave behind --------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *names: str) -> str:
    """What compare says when it refuses."""
    assert main(["compare", *names]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize("name", ["HEAD", "small-rate", "no-such-run"])
def test_gits_own_words_are_shown(
    repository: dict[str, bytes],  # noqa: ARG001
    here: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch, for its tests
        patch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
        patch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
        said = fails(capsys, name, "workspace")
        assert "fatal: detected dubious ownership in repository" in said
        assert "git config --global --add safe.directory" in said
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(here / "nothing"))
        assert "git is not installed, so nothing is known about commits and experiments" in fails(
            capsys, name, "workspace"
        )
    (here / ".git").rename(here / "git-away")
    assert "fatal: not a git repository" in fails(capsys, name, "workspace")


def test_folders_need_no_git(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(here / "one", 0.0)
    write_run(here / "two", 0.1)
    monkeypatch.setenv("PATH", "")
    assert main(["compare", "one", "two"]) == 0


def test_a_commit_with_missing_objects_is_said_in_gits_words(
    repository: dict[str, bytes],  # noqa: ARG001
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blob = subprocess.run(
        ["git", "rev-parse", "HEAD:metrics/train.json"], check=True, capture_output=True, text=True
    ).stdout
    (here / ".git/objects" / blob[:2] / blob[2:].strip()).unlink()
    assert "(fatal: bad object " in fails(capsys, "HEAD", "workspace")


@pytest.mark.parametrize("file", ["params.yaml", "dvc.lock", "metrics/train.json", "metrics/evaluate.json"])
def test_conflict_markers_name_the_file_the_run_and_the_remedy(
    repository: dict[str, bytes],  # noqa: ARG001
    here: Path,
    file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = (here / file).read_text()
    (here / file).write_text(f"<<<<<<< HEAD\n{whole}\n=======\n{whole}\n>>>>>>> other\n")
    said = fails(capsys, "workspace", "HEAD")
    assert said.startswith(f"pipelib: {file} has git's conflict markers (line 1), so ")
    remedy = "keep one side" if file == "params.yaml" else f"take git's copy (`git checkout HEAD -- {file}`)"
    assert remedy in said
    git("add", "--all")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "an accident")
    said = fails(capsys, "HEAD", "HEAD~1")
    assert f"{file} of HEAD (" in said
    remedy = "keep one side" if file == "params.yaml" else "name another commit or experiment"
    assert remedy in said


def test_a_damaged_list_in_dvcs_cache_costs_the_intervals_alone(
    repository: dict[str, bytes],  # noqa: ARG001
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (here / ".dvc/cache/files/md5").rglob("*.dir"):
        path.write_bytes(b"[{")
    assert main(["compare", "HEAD", "small-rate"]) == 0
    assert "HEAD has no scores of single items here" in capsys.readouterr().out


def test_numbers_that_are_none_are_shown_as_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("one", "two", "three")):
        write_run(here / name, 0.0, seed=number)
        values = {"val_loss": [math.nan, math.inf, 3.0][number], "perplexity": 10 ** (400 + number), "text": "x"}
        (here / name / "metrics/evaluate.json").write_text(json.dumps(values))
        (here / name / "metrics/train.json").write_text(json.dumps({"tokens": math.inf, "val_loss": -math.inf}))
        (here / name / "metrics/speed/train.json").write_text(
            json.dumps({"seconds": math.nan, "tokens_per_second": "x"})
        )
    assert main(["compare", "one", "two", "three", "--md"]) == 0
    said = capsys.readouterr().out
    assert [cell.split("  ")[0] for cell in row_of(said, "evaluate val_loss")] == ["nan", "inf", "3.0000"]
    assert row_of(said, "tokens trained on") == ["inf"] * 3
    assert row_of(said, "time, all stages") == [""] * 3
    assert "over 3 seeds" not in said


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "HEAD:params.yaml", "a..b", "*", "@{-1}", "refs/exps"])
def test_odd_names_are_no_run(
    repository: dict[str, bytes],  # noqa: ARG001
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "is not a checkout, git revision or experiment" in fails(capsys, name, "workspace")
