"""An experiment's copy of the repository has all of the text that was in the workspace when it was queued, or says what not."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_params import PARAMS
from small_project import Project

from pipelib.corpus import experiment_copy
from pipelib.corpus.experiment_copy import QUEUED, existed_when_queued, missing_files, queued_at, require_corpus
from pipelib.corpus.params import DownloadParams
from pipelib.errors import UserError


def make_params(**changes: Any) -> DownloadParams:
    return DownloadParams(**{**PARAMS["download"], "path": "corpus", **changes})


@pytest.fixture
def workspace(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with corpus/own.txt, and a copy of it as the working directory."""
    (here / "workspace/corpus").mkdir(parents=True)
    (here / "workspace/corpus/own.txt").write_text("text")
    copy = here / "workspace/.dvc/tmp/exps/standalone/tmpabc"
    shutil.copytree(here / "workspace/corpus", copy / "corpus")
    monkeypatch.setenv("DVC_ROOT", str(here / "workspace"))
    monkeypatch.chdir(copy)
    return here / "workspace"


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def now() -> float:
    """A moment by the clock of the file system, which is coarser than Python's."""
    time.sleep(0.02)
    probe = Path("probe")
    probe.unlink(missing_ok=True)
    probe.touch()
    time.sleep(0.02)
    return probe.stat().st_ctime + 0.001


def test_a_copy_with_everything_and_what_is_no_copy_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_corpus(make_params())
    write(workspace / "corpus/more.txt")
    for source in ("docs", "hub"):
        require_corpus(make_params(source=source))
    require_corpus(make_params(path=str(workspace / "corpus")))  # an absolute path is the same folder everywhere
    require_corpus(make_params(path="none"))
    require_corpus(make_params(pattern=""))
    monkeypatch.setenv("DVC_ROOT", str(workspace.with_name("gone")))
    require_corpus(make_params())
    monkeypatch.setenv("DVC_ROOT", str(Path.cwd()))
    require_corpus(make_params())
    monkeypatch.delenv("DVC_ROOT")
    require_corpus(make_params())
    assert capsys.readouterr() == ("", "")


def test_files_that_stayed_behind_are_refused_with_what_to_do(workspace: Path) -> None:
    write(workspace / "corpus/big.txt")
    write(workspace / "corpus/deep/er/a b.jsonl")
    write(workspace / "corpus/deep/c.jsonl")
    with pytest.raises(UserError) as error:
        require_corpus(make_params())
    said = str(error.value)
    assert said.startswith(
        "this experiment's copy of the repository lacks 3 files of corpus that neither git nor DVC tracked"
    )
    assert "big.txt, deep/c.jsonl, deep/er/a b.jsonl; so it would train on another corpus" in said
    for remedy in (
        "`git add corpus/big.txt corpus/deep`",
        "`dvc add corpus/big.txt corpus/deep` and `git add corpus/big.txt.dvc corpus/deep.dvc`",
        "`dvc exp run --temp -C corpus/big.txt -C corpus/deep`",
        "a download.path outside the repository",
    ):
        assert remedy in said


def test_of_many_files_some_are_named_and_all_are_counted(workspace: Path) -> None:
    for number in range(1200):
        write(workspace / f"corpus/{number % 7}/{number:04}.txt")
    with pytest.raises(UserError, match=r"lacks 1,200 files of corpus .* and 1,195 more; so ") as error:
        require_corpus(make_params())
    assert "-C corpus/0 -C corpus/1 -C corpus/2 -C corpus/3 -C corpus/4 ...`" in str(error.value)


def test_a_dvc_file_that_git_does_not_have_is_what_is_missing(workspace: Path) -> None:
    write(workspace / "corpus/big.txt")
    write(workspace / "corpus/big.txt.dvc")
    with pytest.raises(UserError, match=r"`git add corpus/big\.txt\.dvc`") as error:
        require_corpus(make_params())
    assert "dvc add" not in str(error.value)
    write(workspace / "corpus.dvc")  # of the folder as a whole
    (workspace / "corpus/big.txt.dvc").unlink()
    with pytest.raises(UserError, match=r"`git add corpus\.dvc`"):
        require_corpus(make_params())


def test_what_the_stage_does_not_read_may_stay_behind(workspace: Path) -> None:
    for name in ("notes.pdf", "big.txt.dvc", ".gitignore", ".hidden.txt", ".cache/a.txt", "README"):
        write(workspace / "corpus" / name)
    (workspace / "corpus/folder.txt").mkdir()
    assert missing_files(make_params(), workspace) == []
    write(workspace / "corpus/a.txt")
    write(workspace / "corpus/b/c.TXT")
    assert missing_files(make_params(), workspace) == ["a.txt", "b/c.TXT"]
    assert missing_files(make_params(pattern="b/*"), workspace) == ["b/c.TXT"]


def test_links_count_and_other_repositories_inside_too(workspace: Path, here: Path) -> None:
    folder = workspace / "corpus"
    write(here / "elsewhere/a.txt")
    (folder / "linked").symlink_to(here / "elsewhere")
    (folder / "link.txt").symlink_to(here / "elsewhere/a.txt")
    (folder / "dangling.txt").symlink_to(here / "none")
    write(folder / "clone/.git/config")
    write(folder / "clone/a.txt")  # git lists the folder of another repository, and nothing in it
    os.mkfifo(folder / "fifo.txt")
    assert missing_files(make_params(), workspace) == [
        "clone/a.txt", "dangling.txt", "fifo.txt", "link.txt", "linked"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", [b"new\nline.txt", b"quote'.txt", b"latin-\xe9.txt", b"back\\slash.txt", "é 東.txt".encode()]
)
def test_names_that_shells_and_terminals_do_not_like(workspace: Path, name: bytes) -> None:
    with open(os.fsencode(workspace / "corpus") + b"/" + name, "wb") as file:  # noqa: PTH123  (bytes)
        file.write(b"text")
    with pytest.raises(UserError) as error:
        require_corpus(make_params())
    said = str(error.value).encode()  # UTF-8, whatever the name
    assert b"\n" not in said
    command = next(part for part in said.decode().split("`") if part.startswith("git add "))
    argument = command.removeprefix("git add ")
    printed = subprocess.run(["bash", "-c", f"printf %s {argument}"], capture_output=True, check=True).stdout
    assert printed == b"corpus/" + name


# ---- What was there when it was queued -------------------------------------------------------------------------------


def edit(file: Path) -> None:
    with file.open("a") as opened:
        opened.write("more")


def add_to_dvc(file: Path) -> None:
    """What `dvc add` does: a hard link to its own copy in the place of the file, and a .dvc file."""
    kept = file.parent.parent / "cache"
    file.rename(kept)
    os.link(kept, file)
    kept.chmod(0o444)
    write(file.with_name(f"{file.name}.dvc"))


@pytest.mark.parametrize(
    "later",
    [lambda _: None, edit, lambda file: write(file.with_name("another.md")), add_to_dvc],
    ids=["untouched", "edited", "another one came", "dvc add"],
)
def test_a_file_that_was_there_is_refused_whatever_came_later(workspace: Path, later: Callable[[Path], object]) -> None:
    file = write(workspace / "corpus/big.txt")
    queued = now()
    later(file)
    assert existed_when_queued(workspace, Path("corpus/big.txt"), queued)


def copy_with_times(folder: Path, file: Path) -> None:
    shutil.copy2(file, folder / "big.txt")


@pytest.mark.parametrize(
    "put",
    [
        copy_with_times,
        lambda folder, file: file.rename(folder / "big.txt"),
        lambda folder, file: os.link(file, folder / "big.txt"),
        lambda folder, file: (folder / "big.txt").symlink_to(file),
        lambda folder, _: (folder / "big.txt").symlink_to("dangling"),
        lambda folder, file: (shutil.copy(file, folder / ".big"), (folder / ".big").rename(folder / "big.txt")),
    ],
    ids=["cp -p", "mv", "ln", "ln -s", "dangling", "as editors save"],
)  # fmt: skip
def test_a_file_that_came_later_fails_nothing_and_is_named(
    workspace: Path,
    here: Path,
    put: Callable[[Path, Path], object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = write(here / "downloads/old.txt")
    os.utime(old, (1e9, 1e9))
    queued = now()
    monkeypatch.setattr(experiment_copy, "queued_at", lambda: queued)
    put(workspace / "corpus", old)
    require_corpus(make_params())
    assert (
        "1 file of corpus in the workspace came or changed after this experiment was queued" in capsys.readouterr().out
    )
    write(workspace / "corpus/later.txt")
    require_corpus(make_params())
    assert "it runs without big.txt, later.txt" in capsys.readouterr().out


def test_a_folder_that_was_moved_in_later_fails_nothing(workspace: Path, here: Path) -> None:
    write(here / "downloads/deep/er/a.txt")
    queued = now()
    (here / "downloads/deep").rename(workspace / "corpus/deep")
    assert not existed_when_queued(workspace, Path("corpus/deep/er/a.txt"), queued)
    assert existed_when_queued(workspace, Path("corpus/deep/er/a.txt"), now())
    assert not existed_when_queued(workspace, Path("corpus/gone.txt"), queued)


def test_of_several_only_those_that_were_there_are_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(workspace / "corpus/before.txt")
    queued = now()
    monkeypatch.setattr(experiment_copy, "queued_at", lambda: queued)
    write(workspace / "corpus/after.txt")
    with pytest.raises(UserError, match=r"1 file of corpus .* before\.txt; so") as error:
        require_corpus(make_params())
    assert "after.txt" not in str(error.value)


def test_the_moment_is_that_of_dvcs_commit_and_unknown_without_it(workspace: Path) -> None:  # noqa: ARG001
    assert queued_at() == float("inf")
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert queued_at() == float("inf")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    environment = {**os.environ, "GIT_COMMITTER_DATE": "1795580927 +0200", "GIT_AUTHOR_DATE": "1000000000 +0000"}
    commit = ["git", *identity, "commit", "--quiet", "--allow-empty", "--message", "dvc-exp:a:b:name"]
    subprocess.run(commit, env=environment, check=True)
    subprocess.run(["git", "update-ref", QUEUED, "HEAD"], check=True)
    assert queued_at() == 1795580928


NAMES = st.sets(
    st.sampled_from([f"{folder}{name}" for folder in ("", "a/", "a/b/", ".c/") for name in "xyz"]), max_size=8
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, NAMES)
def test_what_is_lacking_is_the_difference_of_what_both_would_read(
    workspace: Path, there: set[str], here_too: set[str]
) -> None:
    for root, names in ((workspace, there | here_too), (Path.cwd(), here_too)):
        shutil.rmtree(root / "corpus", ignore_errors=True)
        (root / "corpus").mkdir()
        for name in names:
            write(root / "corpus" / f"{name}.txt")
    expected = sorted(f"{name}.txt" for name in there - here_too if not name.startswith("."))
    assert missing_files(make_params(), workspace) == expected


@pytest.fixture(scope="module")
def copy_of_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.make(tmp_path_factory.mktemp("copy"))


@pytest.mark.parametrize("stage", ["download", "vocabulary", "tokenize", "train"])  # evaluate: see test_dvc.py
def test_every_stage_asks_first(copy_of_project: Project, stage: str, tmp_path: Path) -> None:
    write(tmp_path / "texts/big.txt")
    copy_of_project.refuses(stage, "lacks 1 file of texts that neither", "git add texts", DVC_ROOT=str(tmp_path))
