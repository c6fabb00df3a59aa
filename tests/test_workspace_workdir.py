"""Unfinished work is gone on with, finished work is published, and neither is mixed with other code or other data."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest
from small_project import CHECKOUT, hold

from pipelib.errors import UserError
from pipelib.files import read_json, write_atomic, write_json
from pipelib.workspace import workdir
from pipelib.workspace.locks import is_locked
from pipelib.workspace.places import state_root
from pipelib.workspace.workdir import WorkDir

CODE = {"src/a.py": "1", "src/b.py": "2"}
OTHER = {"src/a.py": "1", "src/b.py": "3", "src/c.py": "4"}
INPUTS: dict[str, object] = {"params": {"max_lr": 1.0}, "data": "abc"}


def write_outs(state: WorkDir, text: str = "tokens") -> None:
    for name in ("data/tokens/a.bin", "models/deep/b", "metrics/stage.json", "metrics/speed/stage.json"):
        path = state.work / "outs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text} {name}")


def build(code: Mapping[str, str] = CODE, inputs: Mapping[str, object] = INPUTS, text: str = "tokens") -> bool:
    """Run a stage to its end; whether it had to work."""
    with WorkDir("stage", inputs, code) as state:
        worked = not state.finished
        if worked:
            write_outs(state, text)
            state.finish()
        state.publish()
    return worked


def leave_unfinished(code: Mapping[str, str] = CODE) -> Path:
    """A stage that stopped after half of its work."""
    with WorkDir("stage", INPUTS, code) as state:
        (state.work / "half").write_text("done")
    return state.folder


@pytest.fixture(autouse=True)
def workspace(here: Path) -> Path:
    return here


# ---- Where it lies ---------------------------------------------------------------------------------------------------


def test_the_state_lies_in_the_workspace_that_started_dvc(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_root() == Path(".pipelib")
    monkeypatch.setenv("DVC_ROOT", str(workspace / "original"))
    assert state_root() == workspace / "original/.pipelib"
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(workspace / "elsewhere"))
    assert state_root() == workspace / "elsewhere"


def test_other_parameters_or_data_have_a_state_of_their_own() -> None:
    build()
    assert build(inputs={**INPUTS, "data": "abd"})
    assert not build()


# ---- Fresh, unfinished, finished -------------------------------------------------------------------------------------


def test_unfinished_work_of_the_same_code_is_gone_on_with() -> None:
    leave_unfinished()
    with WorkDir("stage", INPUTS, CODE) as state:
        assert (state.work / "half").read_text() == "done"
        assert not state.finished
        assert not state.resumed_with_other_code


def test_finished_outs_are_published_without_work() -> None:
    assert build()
    Path("data/tokens/a.bin").unlink()
    assert not build()
    assert Path("data/tokens/a.bin").read_text() == "tokens data/tokens/a.bin"


def test_after_success_only_the_finished_outs_stay() -> None:
    with WorkDir("stage", INPUTS, CODE) as state:
        (state.work / "scratch").write_text("x")
        write_outs(state)
        state.finish()
    assert sorted(path.name for path in state.folder.iterdir()) == ["final", "lock", "meta.json"]
    meta = read_json(state.folder / "meta.json")
    assert meta["inputs"] == INPUTS
    assert meta["code"] == CODE
    assert len(meta["final"]) == 4


def killed(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_killed_before_finishing_outs_are_made_again() -> None:
    with WorkDir("stage", INPUTS, CODE) as state:
        write_outs(state)
    assert build(text="again")
    assert Path("models/deep/b").read_text() == "again models/deep/b"


def test_killed_between_the_rename_and_the_note_of_it_outs_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkDir("stage", INPUTS, CODE) as state:
        write_outs(state)
        monkeypatch.setattr(workdir, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            state.finish()
    assert state.final.is_dir()
    monkeypatch.setattr(workdir, "write_json", write_json)
    assert build(text="again")
    assert Path("models/deep/b").read_text() == "again models/deep/b"


def test_it_knows_whether_there_is_anything_to_go_on_with() -> None:
    for goes_on in (False, True):
        with WorkDir("stage", INPUTS, CODE) as state:
            assert state.is_fresh != goes_on
    build()
    with WorkDir("stage", INPUTS, CODE) as state:
        assert not state.is_fresh
    (state.final / "metrics/stage.json").write_text("damaged")
    with WorkDir("stage", INPUTS, CODE) as state:
        assert state.is_fresh


def test_killed_while_publishing_outs_are_published_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workdir, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert not Path("metrics").exists()
    monkeypatch.setattr(workdir, "write_atomic", write_atomic)
    assert not build()
    assert Path("metrics/stage.json").read_text() == "tokens metrics/stage.json"


# ---- Other code ------------------------------------------------------------------------------------------------------


def test_unfinished_work_of_other_code_stops_with_the_files_and_both_remedies() -> None:
    folder = leave_unfinished()
    with pytest.raises(UserError) as caught, WorkDir("stage", INPUTS, OTHER):
        pass
    message = str(caught.value)
    assert "src/b.py, src/c.py changed since" in message
    assert "src/a.py" not in message
    assert "PIPELIB_RESUME=continue" in message
    assert "PIPELIB_RESUME=fresh" in message
    assert (folder / "work/half").exists()
    assert not is_locked(folder)


def test_a_machine_with_other_code_may_not_join() -> None:
    with pytest.raises(UserError, match=r"there is no .*meta\.json, so there is nothing to join"):
        WorkDir("train", {}, {"a.py": "1"}).require_same_code()
    with WorkDir("train", {}, {"a.py": "1", "b.py": "1"}):
        WorkDir("train", {}, {"a.py": "1", "b.py": "1"}).require_same_code()
        with pytest.raises(UserError, match=r"by a machine with other code: a\.py, c\.py differ"):
            WorkDir("train", {}, {"a.py": "2", "b.py": "1", "c.py": "1"}).require_same_code()


def test_a_folder_without_locks_is_refused_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"is on a file system without locks \(No locks available\).*has flock"):
        build()


def test_it_is_continued_on_request_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unfinished()
    monkeypatch.setenv("PIPELIB_RESUME", "continue")
    with WorkDir("stage", INPUTS, OTHER) as state:
        assert state.resumed_with_other_code
        assert (state.work / "half").exists()


def test_it_is_begun_again_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unfinished()
    monkeypatch.setenv("PIPELIB_RESUME", "fresh")
    with WorkDir("stage", INPUTS, OTHER) as state:
        assert not state.resumed_with_other_code
        assert state.is_fresh
        assert list(state.work.iterdir()) == []


def test_another_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_RESUME", "yes")
    with pytest.raises(UserError, match="PIPELIB_RESUME=yes is neither continue nor fresh"), WorkDir("stage", {}, CODE):
        pass


def test_unfinished_outs_alone_are_nothing_to_lose() -> None:
    with WorkDir("stage", INPUTS, CODE) as state:
        write_outs(state)
    with WorkDir("stage", INPUTS, OTHER) as state:
        assert not state.resumed_with_other_code


def test_finished_outs_of_other_code_are_dropped() -> None:
    assert build()
    assert build(OTHER)
    assert not build(OTHER)


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_finished_outs_are_dropped_and_named(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    build()
    (path,) = Path(".pipelib/stage").glob("*/final/models/deep/b")
    path.unlink()
    if damage == "changed":
        path.write_text("tokenz models/deep/b")
    assert build()
    assert f"{path} is missing or damaged" in capsys.readouterr().out
    assert Path("models/deep/b").read_text() == "tokens models/deep/b"


@pytest.mark.parametrize("content", ["[]", "{", '{"final": {}}', '{"code": []}', '{"code": {}, "final": 3}'])
def test_a_damaged_meta_is_refused_with_what_to_remove(content: str) -> None:
    build()
    (meta,) = Path(".pipelib/stage").glob("*/meta.json")
    meta.write_text(content)
    with pytest.raises(
        UserError, match=rf"meta\.json .*; remove {meta.parent}, and run dvc repro to do its work again"
    ):
        build()


# ---- Publishing ------------------------------------------------------------------------------------------------------


def test_publishing_replaces_folders_whole_and_metrics_one_by_one() -> None:
    for name in ("data/tokens/stale.bin", "data/raw/kept.parquet", "models/stale", "metrics/other.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("there before")
    Path("metrics/stage.json").write_text("old")
    os.link("metrics/stage.json", "linked")
    build()
    found = sorted(path.as_posix() for path in Path().rglob("*") if path.is_file() and ".pipelib" not in path.parts)
    assert found == [
        "data/raw/kept.parquet",
        "data/tokens/a.bin",
        "linked",
        "metrics/other.json",
        "metrics/speed/stage.json",
        "metrics/stage.json",
        "models/deep/b",
    ]
    assert Path("linked").read_text() == "old"


def test_outs_are_links_to_the_state_and_metrics_are_not() -> None:
    build()
    (final,) = Path(".pipelib/stage").glob("*/final")
    assert Path("data/tokens/a.bin").samefile(final / "data/tokens/a.bin")
    assert not Path("metrics/stage.json").samefile(final / "metrics/stage.json")


# ---- The lock --------------------------------------------------------------------------------------------------------

HOLD = "import sys; from pathlib import Path; from pipelib.workspace.locks import LOCK, locked; "
HOLD += "holding = locked(Path(sys.argv[1]) / LOCK); holding.__enter__(); "
HOLD += "print('held', flush=True); sys.stdin.read()"


def test_a_second_process_is_told_who_holds_the_state() -> None:
    folder = leave_unfinished()
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(folder)
        with (
            pytest.raises(UserError, match=rf"in use by process {holder.pid}, .*kill {holder.pid}"),
            WorkDir("stage", INPUTS, CODE),
        ):
            pass
        holder.kill()
    with WorkDir("stage", INPUTS, CODE):  # the system freed the lock
        assert is_locked(folder)
    assert not is_locked(folder)


def test_a_lock_names_its_last_holder_only(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("123456789012345\n")
    hold(tmp_path).close()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
