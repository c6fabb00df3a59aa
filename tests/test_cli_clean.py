"""State is listed with what deletion really frees, and deleted only when asked and unused."""

import fcntl
import io
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from small_project import hold

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.inspection.kept import delete, find_kept, freed_bytes
from pipelib.workspace.locks import is_locked
from pipelib.workspace.places import StatePlaces
from pipelib.workspace.workdir import WorkDir

DAY = 86400


class Terminal(io.StringIO):
    """A standard input with a person behind it, who has typed this."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))
    for folder in ("records/key", "vocabulary"):
        (tmp_path / "state" / folder).mkdir(parents=True)
        (tmp_path / "state" / folder / "file").write_bytes(bytes(5000))
    return tmp_path / "state"


def finished(stage: str, value: int, size: int) -> Path:
    """A finished state with one file, published and so linked into the workspace."""
    with WorkDir(stage, {"value": value}, {}) as state:
        out = state.work / "outs/data" / f"{stage}{value}"
        out.mkdir(parents=True)
        (out / "shard").write_bytes(bytes(size))
        state.finish()
        state.publish()
    return state.folder


def unfinished(stage: str, value: int, size: int) -> Path:
    with WorkDir(stage, {"value": value}, {}) as state:
        (state.work / "checkpoint").write_bytes(bytes(size))
    return state.folder


def age(folder: Path, days: float) -> None:
    for path in folder.rglob("*"):
        stat = path.stat()
        os.utime(path, (stat.st_atime - days * DAY, stat.st_mtime - days * DAY))


def test_what_is_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenized, training = finished("tokenize", 1, 3_000_000), unfinished("train", 1, 2_000_000)
    assert main(["clean", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "fingerprint", "status", "frees", "linked", "elsewhere", "unused", "for"]
    assert lines[1].split()[:4] == [
        "tokenize",
        tokenized.name,
        "finished",
        f"{(tokenized / 'meta.json').stat().st_size}",
    ]
    assert "3.0 MB" in lines[1]
    assert lines[2].split()[:5] == ["train", training.name, "unfinished", "2.0", "MB"]
    assert lines[3].startswith(f"2 of 2 in {root} can be deleted, which frees 2.0 MB")
    assert training.is_dir()
    assert tokenized.is_dir()


def test_links_between_two_states_are_freed_together(root: Path) -> None:
    first, second = unfinished("train", 1, 1_000_000), unfinished("train", 2, 10)
    os.link(first / "work/checkpoint", second / "work/same")
    states = find_kept(StatePlaces(root))
    assert [freed_bytes([kept]) < 1000 for kept in states] == [True, True]
    assert 1_000_000 < freed_bytes(states) < 1_002_000


def test_yes_deletes_what_is_unused_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenized, training, used = finished("tokenize", 1, 10), unfinished("train", 1, 10), unfinished("train", 2, 10)
    lock = hold(used)
    try:
        assert main(["clean", "--yes"]) == 0
    finally:
        lock.close()
    assert "in use" in capsys.readouterr().out
    assert [path.exists() for path in (tokenized, training, used / "work/checkpoint")] == [False, False, True]
    assert Path("data/tokenize1/shard").stat().st_size == 10
    assert all((root / folder / "file").exists() for folder in ("records/key", "vocabulary"))


def test_a_stage_and_an_age_can_be_chosen(root: Path) -> None:
    old, new, other = unfinished("train", 1, 10), unfinished("train", 2, 10), unfinished("tokenize", 1, 10)
    age(old, 8)
    age(other, 8)
    assert main(["clean", "--stage", "train", "--older-than", "7", "--yes"]) == 0
    assert [path.exists() for path in (old, new, other)] == [False, True, True]
    assert root.is_dir()


def test_encoded_text_has_its_own_row_and_stays_while_a_share_is_encoded(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = root / "units/0123456789abcdef"
    (store / "file").mkdir(parents=True)
    (store / "file/000000-000003-100.unit").write_bytes(bytes(2_000_000))
    (store / "lock").touch()
    share = hold(store, "lock-0-of-2")
    assert main(["clean", "--stage", "units", "--yes"]) == 0
    (_, row, *_) = capsys.readouterr().out.splitlines()
    assert row.split()[:6] == ["units", "0123456789abcdef", "in", "use", "2.0", "MB"]
    (kept,) = find_kept(StatePlaces(root))
    delete(replace(kept, locked=False))  # as if it had started after the list was made
    assert "encodes a share" in capsys.readouterr().out
    assert (store / "file/000000-000003-100.unit").exists()
    share.close()
    assert main(["clean", "--stage", "units", "--yes"]) == 0
    assert "stored" in capsys.readouterr().out
    assert not store.exists()


def test_the_hubs_files_have_their_own_rows(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = [root / "hub/someone--corpus" / (digit * 40) for digit in "ab"]
    for store in stores:
        hold(store).close()
        (store / "sample").mkdir()
        (store / "sample/000_00000.parquet").write_bytes(bytes(2_000_000))
    training, out = unfinished("train", 1, 10), root.parent / "out"
    os.link(stores[1] / "sample/000_00000.parquet", out)
    age(stores[0], 8)
    assert main(["clean", "--stage", "hub", "--older-than", "7", "--dry-run"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[1:-1]
    assert row.split()[:5] == ["hub", "someone--corpus@aaaaaaa", "stored", "2.0", "MB"]
    lock = hold(stores[0])
    assert main(["clean", "--stage", "hub", "--yes"]) == 0
    lock.close()
    assert [store.exists() for store in stores] == [True, False]
    assert out.stat().st_size == 2_000_000
    assert main(["clean", "--yes"]) == 0
    assert [folder.exists() for folder in (stores[0], training)] == [False, False]


def test_the_hubs_lists_are_deleted_without_the_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = root / "hub/someone--corpus" / ("a" * 40)
    only_listed = root / "hub/models--someone--weights" / ("b" * 40)
    for folder in (store, only_listed):
        (folder / ".lists").mkdir(parents=True)
        (folder / ".lists/top.json").write_bytes(bytes(3000))
    hold(store).close()
    (store / "000_00000.parquet").write_bytes(bytes(2_000_000))
    assert main(["clean", "--dry-run"]) == 0
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert sorted(rows[:2]) == [
        ["lists", "models--someone--weights@bbbbbbb", "stored", "3.0", "KB"],
        ["lists", "someone--corpus@aaaaaaa", "stored", "3.0", "KB"],
    ]
    assert rows[2] == ["hub", "someone--corpus@aaaaaaa", "stored", "2.0", "MB"]
    assert main(["clean", "--stage", "lists", "--yes"]) == 0
    assert not [path for path in (root / "hub").rglob("*") if ".lists" in path.parts]
    assert (store / "000_00000.parquet").stat().st_size == 2_000_000
    assert main(["clean", "--yes"]) == 0
    assert not store.exists()


def test_a_state_that_a_run_used_lately_is_not_old(root: Path) -> None:
    folder = finished("tokenize", 1, 10)
    age(folder, 8)
    hold(folder).close()  # a run linked it again and changed nothing in it
    assert main(["clean", "--older-than", "7", "--yes"]) == 0
    assert (folder / "final").is_relative_to(root)
    assert (folder / "final").exists()


# ---- Locks, as those who only look see them --------------------------------------------------------------------------


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert not (tmp_path / "lock").exists()
    (tmp_path / "lock").write_text("123\n")
    os.utime(tmp_path / "lock", (5, 5))
    assert not is_locked(tmp_path)
    assert (tmp_path / "lock").read_text() == "123\n"
    assert (tmp_path / "lock").stat().st_mtime == 5
    lock = hold(tmp_path)
    assert is_locked(tmp_path)
    lock.close()


def test_a_stage_that_starts_while_somebody_looks_starts(tmp_path: Path) -> None:
    hold(tmp_path).close()
    looker = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(looker, fcntl.LOCK_SH)
    assert not is_locked(tmp_path)  # two may look at once
    away = threading.Timer(0.1, os.close, (looker,))
    away.start()
    hold(tmp_path).close()
    away.join()


def test_a_lock_on_a_deleted_file_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = tmp_path / "state", []

    def deleted_meanwhile(descriptor: int, operation: int) -> None:
        if not calls:
            (folder / "lock").unlink()
            folder.rmdir()
        calls.append(operation)
        flock(descriptor, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    lock = hold(folder)
    assert is_locked(folder)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        hold(folder)
    lock.close()


def test_nobody_to_ask_deletes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished("train", 1, 10)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["clean"]) == 0
    assert "add --yes to delete" in capsys.readouterr().out
    assert folder.is_relative_to(root)
    assert folder.exists()


@pytest.mark.parametrize(
    ("answer", "left"), [("y\n", False), ("Yes\n", False), ("\n", True), ("n\n", True), ("", True)]
)
def test_the_answer_counts(answer: str, left: bool, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unfinished("train", 1, 10)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["clean"]) == 0
    assert folder.is_relative_to(root)
    assert folder.exists() == left


def test_a_stage_that_started_meanwhile_is_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished("train", 1, 10)
    locks = []

    def start_and_agree(_: str) -> str:
        locks.append(hold(folder))
        return "y"

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", start_and_agree)
    assert main(["clean"]) == 0
    locks[0].close()
    assert f"not deleted: {folder} is in use by process {os.getpid()}" in capsys.readouterr().out
    assert root.is_dir()
    assert (folder / "work/checkpoint").exists()


def test_nothing_and_nonsense(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean"]) == 0
    assert f"no state to delete in {root}" in capsys.readouterr().out
    assert main(["clean", "--older-than", "-1"]) == 1
    assert "--older-than -1" in capsys.readouterr().err
