"""Check that an experiment's copy of the repository has all of the user's text and conversations.

`dvc exp run --queue` and `--temp` run the stages in a copy, with the files that git and DVC tracked when the experiment was
queued. Files of `download.path` and `finetune.path` that neither tracks are missing from the copy. Without this check the
experiment would silently train on other text than the workspace.
"""

import os
import shlex
from pathlib import Path
from typing import Protocol

from pipelib.corpus.local_files import saved_parts, visible_matches
from pipelib.corpus.params import READABLE
from pipelib.errors import UserError, tell
from pipelib.files import plural
from pipelib.workspace.git import GitError, run_git
from pipelib.workspace.places import workspace

QUEUED = "refs/exps/exec/EXEC_MERGE"
"""The git reference of the commit that DVC made when the experiment was queued. Every copy has it (observed with DVC 3.67)."""
SHOWN = 5
"""The most files that a message names."""


class UserFiles(Protocol):
    """A section of params.yaml that names files of the user."""

    @property
    def source(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def pattern(self) -> str: ...


def require_corpus(params: UserFiles, section: str = "download") -> None:
    """Refuse to run in a copy that lacks files that the workspace's `SECTION.path` has.

    Files that were added after the experiment was queued are only named in a printed line. Outside a copy, or if the source
    is not `local`, do nothing. Every stage calls this, because DVC skips earlier stages that did not change.

    Raises:
        UserError: the copy lacks files.
    """
    original = workspace()
    if params.source != "local" or original.resolve() == Path.cwd().resolve():
        return
    missing = missing_files(params, original)
    if not missing:
        return
    queued = queued_at()
    if before := [name for name in missing if existed_when_queued(original, Path(params.path) / name, queued)]:
        raise UserError(missing_files_message(params, original, before, section))
    tell(
        f"{plural(len(missing), 'file')} of {params.path} in the workspace came or changed after this experiment was queued, so "
        f"it runs without {_names(missing)}"
    )


def missing_files(params: UserFiles, workspace: Path) -> list[str]:
    """Return the files that the download stage would read in the workspace's `download.path`, but the copy does not have.

    The copy is in the current folder. The result is sorted paths inside `download.path`. Linked folders count too, because
    the stage refuses them.
    """
    folder, own = workspace / params.path, Path(params.path)
    try:
        found = visible_matches(folder, params.pattern)
    except UserError:
        return []  # the pattern is not a glob; the stage itself reports that
    names = [name for name in found if (folder / name).is_symlink() or not (folder / name).is_dir()]
    parts = {part.relative_to(folder) for name in names for part in saved_parts(folder / name)}
    read = (name for name in names if (folder / name).is_dir() or name.name.lower().endswith(READABLE) or name in parts)
    return sorted(str(name) for name in read if not (own / name).exists())


def queued_at() -> float:
    """Return the end of the second in which this copy's experiment was queued, in seconds since 1970; infinity if unknown."""
    try:
        return float(run_git(Path.cwd(), "show", "--no-patch", "--format=%ct", QUEUED)) + 1
    except (GitError, ValueError):
        return float("inf")


def existed_when_queued(workspace: Path, path: Path, queued: float) -> bool:
    """Return whether a file of the workspace already existed when the experiment was queued.

    Putting a file into a folder sets the change time (ctime) of both, even if the file keeps its modification time (`mv`,
    `cp -p`, `tar`). `dvc add` does the same: it replaces the file by a link to its own copy and keeps the modification time.

    Args:
        path: relative to the workspace's root.
        queued: in seconds since 1970.
    """
    file = workspace / path
    try:
        if any(_moved_since(folder, queued) for folder in file.parents if folder.is_relative_to(workspace)):
            return False
        if file.lstat().st_ctime < queued or file.parent.stat().st_mtime < queued:
            return True  # the file has not changed since, or was edited in a folder where no file was added or removed since
        return dvc_file_of(workspace, path) is not None and file.stat().st_mtime < queued
    except FileNotFoundError:
        return False  # a dangling link, or a file that was just deleted


def _moved_since(folder: Path, queued: float) -> bool:
    """Return whether a folder was itself moved since: its ctime changed, but no file was added to it or removed from it."""
    stat = folder.stat()
    return stat.st_ctime >= queued > stat.st_mtime


def dvc_file_of(workspace: Path, path: Path) -> Path | None:
    """Return the path, in the workspace, of the .dvc file that covers a file; None if there is none."""
    covering = (parent.with_name(f"{parent.name}.dvc") for parent in (path, *path.parents) if parent.name)
    return next((file for file in covering if (workspace / file).is_file()), None)


def missing_files_message(params: UserFiles, workspace: Path, names: list[str], section: str = "download") -> str:
    """Return the message for files that the copy lacks, with the remedies."""
    paths = [Path(params.path) / name for name in names]
    # Files that DVC tracks need only their .dvc file in git; for the others there is a choice.
    tracked = {path: dvc_file_of(workspace, path) for path in paths}
    ways = []
    if covering := [*dict.fromkeys(file for file in tracked.values() if file)]:
        ways.append(f"`git add {_shell(covering)}`, because git must track DVC's file")
    if untracked := [*dict.fromkeys(_top(path) for path in paths if tracked[path] is None)]:
        made = [path.with_name(f"{path.name}.dvc") for path in untracked]
        ways += [f"`git add {_shell(untracked)}`", f"`dvc add {_shell(untracked)}` and `git add {_shell(made)}`"]
    copies = [*dict.fromkeys(_top(path) for path in paths)]
    ways.append(f"`dvc exp run --temp {_shell(copies, '-C ')}`, which copies untracked files too")
    ways.append(f"a {section}.path outside the repository, as an absolute path")
    return (
        f"this experiment's copy of the repository lacks {plural(len(names), 'file')} of {params.path} that neither git nor DVC "
        f"tracked when it was queued: {_names(names)}; so it would train on another corpus than the workspace. Do one of these "
        f"and queue it again: {'; '.join(ways)}."
    )


def _top(path: Path) -> Path:
    """Return the topmost folder above the path that the copy lacks, else the path itself."""
    return next((folder for folder in reversed(path.parents) if not folder.exists()), path)


def _names(names: list[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _shell(paths: list[Path], before: str = "") -> str:
    """Quote the first few paths for a shell, with `before` in front of each."""
    return " ".join(before + _quoted(path) for path in paths[:SHOWN]) + (" ..." if len(paths) > SHOWN else "")


def _quoted(path: Path) -> str:
    if str(path).isprintable():
        return shlex.quote(str(path))
    plain = {*range(32, 127)} - {*b"'\\"}
    text = "".join(chr(byte) if byte in plain else "\\x" + f"{byte:02x}" for byte in os.fsencode(path))
    return f"$'{text}'"  # bash's form for control characters and bytes that are not UTF-8
