"""Every check says what is wrong and what to do about it, and none of them breaks down."""

import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_project import hold

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.inspection import health
from pipelib.inspection.health import Check, Finding
from pipelib.workspace import dvc


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("PIPELIB_STATE_DIR", "DVC_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def find(check: Check) -> list[tuple[str, str, str]]:
    return [(finding.level, finding.text, finding.remedy) for finding in check()]


def only(check: Check) -> tuple[str, str, str]:
    (finding,) = find(check)
    return finding


def test_lines_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def good() -> Iterator[Finding]:
        yield Finding("ok", "all is well")

    def doubtful() -> Iterator[Finding]:
        yield Finding("warn", "it is slow", "buy a faster one")

    def broken() -> Iterator[Finding]:
        raise UserError("it is broken, so nothing works; mend it.")
        yield

    def missing() -> Iterator[Finding]:
        import no_such_package  # type: ignore[import-not-found]

        yield Finding("ok", str(no_such_package))

    def crashing() -> Iterator[Finding]:
        yield Finding("ok", str(1 / 0))

    monkeypatch.setattr(health, "CHECKS", {"a": good, "b": doubtful})
    assert main(["doctor"]) == 0
    assert (
        capsys.readouterr().out
        == "ok   a          all is well\nwarn b          it is slow\n" + " " * 16 + "-> buy a faster one\n"
    )
    monkeypatch.setattr(health, "CHECKS", {"c": broken, "d": missing, "e": crashing, "f": good})
    assert main(["doctor"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "->" not in line]
    assert [line[:4] for line in lines] == ["FAIL", "FAIL", "FAIL", "ok  "]
    assert "no_such_package" in lines[1]
    assert "ZeroDivisionError" in lines[2]


def test_an_empty_folder_fails_with_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "FAIL git        git cannot read" in said
    assert "fatal: not a git repository" in said
    assert "FAIL dvc        `dvc cache dir` fails here" in said
    assert "FAIL params     params.yaml does not exist" in said
    assert "ok   vocabulary GPT-2," in said


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(health.check_python)[0] == "ok"
    monkeypatch.setattr("sys.version_info", (3, 10, 1))
    assert only(health.check_python)[0] == "FAIL"
    assert only(health.check_packages)[0] == "warn"
    installed = dict.fromkeys(health.ESSENTIAL, "1.0")
    monkeypatch.setattr(health, "_installed", installed.get)
    Path("constraints.txt").write_text("# pinned\ntorch==1.0\nnumpy==1.0 ; python_version > '3'\nother-system==3\n")
    assert only(health.check_packages) == ("ok", "2 packages have the versions of constraints.txt", "")
    installed |= {"numpy": "0.9"}
    level, text, remedy = only(health.check_packages)
    assert (level, text.split(":")[0], remedy) == ("warn", "numpy 0.9, not 1.0", "make setup")
    del installed["dvc"]
    assert ("FAIL", "not installed: dvc", "make setup") in find(health.check_packages)


@pytest.mark.parametrize(
    ("driver", "cuda", "usable", "level", "words"),
    [
        (None, None, False, "ok", "no NVIDIA driver"),
        ("600.1", "13.0", True, "ok", "driver 600.1: they work together"),
        ("600.1", None, False, "warn", "its GPU is not used"),
        ("400.1", "13.0", False, "FAIL", "cannot use the driver 400.1"),
    ],
)
def test_torch_and_driver(
    driver: str | None, cuda: str | None, usable: bool, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    found = only(health.check_torch)
    assert found[0] == level
    assert words in found[1]
    assert bool(found[2]) == (level != "ok")


def test_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(health.check_git)[::2] == ("FAIL", "git init, or go to the repository's root")
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert only(health.check_git)[:2] == ("warn", "there is no commit yet, so dvc exp run has nothing to start from")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    assert only(health.check_git)[0] == "ok"
    Path("new").touch()
    assert "with uncommitted changes" in only(health.check_git)[1]
    Path(".git/config").write_text("[core\n")
    level, text, _ = only(health.check_git)
    assert level == "FAIL"
    assert "fatal: bad config line 1" in text, "git's own words"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(health.check_git)[:2] == ("FAIL", "git is not installed, which DVC needs")


def test_a_folder_of_somebody_else_is_said_in_gits_words(monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch, for its tests
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    level, text, _ = only(health.check_git)
    assert level == "FAIL"
    assert "dubious ownership" in text
    assert "git config --global --add safe.directory" in text


def test_results_that_a_merge_or_an_editor_broke() -> None:
    assert only(health.check_results)[0] == "ok"
    Path("metrics/speed").mkdir(parents=True)
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    Path("metrics/train.json").write_text('{"val_loss": 1.0}')
    Path("metrics/speed/train.json").write_text("{}")
    assert only(health.check_results)[0] == "ok"
    Path("dvc.lock").write_text("")
    Path("metrics/train.json").write_text(
        '{\n<<<<<<< HEAD\n"val_loss": 1.0\n=======\n"val_loss": 2.0\n>>>>>>> other\n}'
    )
    Path("metrics/speed/train.json").write_text("[1]")
    lock, speed, train = find(health.check_results)
    assert {finding[0] for finding in (lock, speed, train)} == {"FAIL"}
    assert lock[1].startswith(
        "dvc.lock is broken (it is empty), so it is unknown what DVC made, and DVC itself cannot read it; take"
    )
    assert "`git checkout HEAD -- dvc.lock`" in lock[1]
    assert speed[1].startswith("metrics/speed/train.json is broken (it is a list, not a section), so its numbers")
    assert train[1].startswith("metrics/train.json has git's conflict markers (line 2), so its numbers")


def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(dvc, "run_dvc", lambda *_: "hardlink,symlink")
    assert only(health.check_links)[0] == "ok"
    assert not list(tmp_path.rglob("*.tmp"))

    def not_set(*_: object) -> str:
        raise dvc.DvcError("`dvc config cache.type` failed")

    monkeypatch.setattr(dvc, "run_dvc", not_set)
    assert find(health.check_links)[0][:2] == ("warn", "cache.type is reflink,copy: all data may be stored twice")

    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert "no hard links from the state to the workspace and cache" in find(health.check_links)[1][1]
    assert not list(tmp_path.rglob("*.tmp"))


def write_params(old: str = "", new: str = "") -> None:
    text = (Path(__file__).parents[1] / "presets/gpt2-quick.yaml").read_text(encoding="utf-8")
    assert old in text
    Path("params.yaml").write_text(text.replace(old, new), encoding="utf-8")


def test_params_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_params("seed: 1337", "sead: 1337")
    with pytest.raises(UserError, match=r"did you mean download\.seed"):
        find(health.check_params)
    write_params()
    assert only(health.check_params)[0] == "ok"
    assert find(health.check_compiler) == []
    write_params("compile: false", "compile: true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert only(health.check_compiler)[0] == "FAIL"
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert only(health.check_compiler)[0] in ("ok", "warn")  # warn where Python has no headers


def test_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write_params()
    monkeypatch.setattr(health, "_cache", lambda: None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**12))
    assert [level for level, _, _ in find(health.check_disk)] == ["ok", "ok"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert [level for level, _, _ in find(health.check_disk)] == ["warn", "warn"]


def test_locks_and_leftovers() -> None:
    assert only(health.check_locks)[0] == "ok"
    folder = Path(".pipelib/train/0123456789abcdef")
    for name in ("work/.old.json.tmp", "work/.new.json.tmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    hours_ago = time.time() - 3 * 3600
    os.utime(folder / "work/.old.json.tmp", (hours_ago, hours_ago))
    lock = hold(folder)
    assert only(health.check_locks)[:2] == ("warn", f"{folder} is in use by process {os.getpid()}")
    assert only(health.check_leftovers)[0] == "ok"  # a stage at work may still need them
    lock.close()
    assert only(health.check_locks)[0] == "ok"
    level, text, remedy = only(health.check_leftovers)
    assert (level, text) == ("warn", "1 temporary file left by killed processes")
    assert remedy == f"rm -r {folder / 'work' / '.old.json.tmp'}"


def test_mlflow_database(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(health.check_mlflow) == ("ok", "no mlflow.db yet; the first stage creates it", "")
    with sqlite3.connect("mlflow.db") as connection:
        connection.execute("CREATE TABLE runs (id TEXT)")
        connection.execute("INSERT INTO runs VALUES ('a')")
    connection.close()
    assert only(health.check_mlflow) == ("ok", "mlflow.db has 1 runs", "")
    Path("mlflow.db").write_bytes(b"no database, but long enough to be looked at" * 100)
    level, text, remedy = only(health.check_mlflow)
    assert level == "FAIL"
    assert "cannot be read" in text
    assert "mv mlflow.db" in remedy
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@example.org")
    assert "secret" not in only(health.check_mlflow)[1]


def test_vocabulary_that_engines_disagree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, _: object) -> None:
        raise UserError(f"{name} and tiktoken encode 'x' differently")

    monkeypatch.setattr("pipelib.vocabulary.engines.load_engine", refuse)
    (finding,) = health.examine(health.check_vocabulary)
    assert finding == Finding("FAIL", "gigatoken and tiktoken encode 'x' differently")
