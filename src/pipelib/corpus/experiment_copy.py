"""Has the copy of the repository that an experiment runs in all of the user's text?

`dvc exp run --queue` and `--temp` run the stages in a copy, which has what git and DVC tracked when the experiment was queued.
A file of `download.path` that neither of them tracks stays behind in the workspace, so the experiment would train on another
corpus than the workspace does, and end well.
"""

import os
import shlex
from pathlib import Path

from pipelib.corpus.local_files import visible_matches
from pipelib.corpus.params import READABLE, DownloadParams
from pipelib.errors import UserError, tell
from pipelib.files import plural
from pipelib.workspace.git import GitError, run_git
from pipelib.workspace.places import workspace

QUEUED = "refs/exps/exec/EXEC_MERGE"
"""DVC's commit of what the experiment was queued with; every copy has it (observed with DVC 3.67)."""
SHOWN = 5
"""Files named in a message."""


def require_corpus(params: DownloadParams) -> None:
    """Refuse to run in a copy that lacks files of the workspace's corpus, unless they came after the experiment was queued.

    Those that came later are named in a line. Nothing happens outside a copy, and where the source is not `local`. Every
    stage asks, since DVC skips those before it that did not change.

    Raises:
        UserError: the copy lacks files.
    """
    original = workspace()
    if params.source != "local" or original.resolve() == Path.cwd().resolve():
        return
    lacking = missing_files(params, original)
    if not lacking:
        return
    queued = queued_at()
    if before := [name for name in lacking if existed_when_queued(original, Path(params.path) / name, queued)]:
        raise UserError(missing_files_message(params, original, before))
    tell(
        f"{plural(len(lacking), 'file')} of {params.path} in the workspace came or changed after this experiment was queued, so "
        f"it runs without {_names(lacking)}"
    )


def missing_files(params: DownloadParams, workspace: Path) -> list[str]:
    """What the download stage would read in the workspace's `download.path` and the copy in the current folder has not:
    paths inside that folder, sorted. Linked folders count too, since the stage refuses them."""
    folder, own = workspace / params.path, Path(params.path)
    try:
        found = visible_matches(folder, params.pattern)
    except UserError:
        return []  # not a glob, which the stage itself refuses
    names = [name for name in found if (folder / name).is_symlink() or not (folder / name).is_dir()]
    read = (name for name in names if (folder / name).is_dir() or name.name.lower().endswith(READABLE))
    return sorted(str(name) for name in read if not (own / name).exists())


def queued_at() -> float:
    """When the experiment of this copy was queued, in seconds since 1970, to the end of that second; infinite if unknown."""
    try:
        return float(run_git(Path.cwd(), "show", "--no-patch", "--format=%ct", QUEUED)) + 1
    except (GitError, ValueError):
        return float("inf")


def existed_when_queued(workspace: Path, path: Path, queued: float) -> bool:
    """Whether a file that is in the workspace now was there, too, when the experiment was queued.

    Putting a file into a folder sets the time of change of both, whatever the file's time of writing is (`mv`, `cp -p`, `tar`).
    `dvc add` does so as well, since it replaces the file by a link to its own copy, and keeps the time of writing.

    Args:
        path: from the workspace's root.
        queued: in seconds since 1970.
    """
    file = workspace / path
    try:
        if any(_came_since(folder, queued) for folder in file.parents if folder.is_relative_to(workspace)):
            return False
        if file.lstat().st_ctime < queued or file.parent.stat().st_mtime < queued:
            return True  # untouched since then, or edited in a folder where no name has come or gone since then
        return dvc_file_of(workspace, path) is not None and file.stat().st_mtime < queued
    except FileNotFoundError:
        return False  # a dangling link, or a file that has just gone


def _came_since(folder: Path, queued: float) -> bool:
    """Whether a folder was itself moved since: it changed, and no name in it did."""
    stat = folder.stat()
    return stat.st_ctime >= queued > stat.st_mtime


def dvc_file_of(workspace: Path, path: Path) -> Path | None:
    """The .dvc file that covers a file of the workspace, by its path in the workspace; None without one."""
    covering = (parent.with_name(f"{parent.name}.dvc") for parent in (path, *path.parents) if parent.name)
    return next((file for file in covering if (workspace / file).is_file()), None)


def missing_files_message(params: DownloadParams, workspace: Path, names: list[str]) -> str:
    """The message for files that the copy lacks, with what to do about them."""
    paths = [Path(params.path) / name for name in names]
    tracked = {path: dvc_file_of(workspace, path) for path in paths}
    ways = []
    if covering := [*dict.fromkeys(file for file in tracked.values() if file)]:
        ways.append(f"`git add {_shell(covering)}`, since git has to track DVC's file")
    if untracked := [*dict.fromkeys(_top(path) for path in paths if tracked[path] is None)]:
        made = [path.with_name(f"{path.name}.dvc") for path in untracked]
        ways += [f"`git add {_shell(untracked)}`", f"`dvc add {_shell(untracked)}` and `git add {_shell(made)}`"]
    copies = [*dict.fromkeys(_top(path) for path in paths)]
    ways.append(f"`dvc exp run --temp {_shell(copies, '-C ')}`, which takes untracked files along")
    ways.append("a download.path outside the repository, as an absolute path")
    return (
        f"{plural(len(names), 'file')} of {params.path} in the workspace, which neither git nor DVC tracked when this "
        f"experiment was queued, did not come along into its copy of the repository: {_names(names)}; so it would train on "
        f"another corpus than the workspace. Do one of these and queue it again: {'; '.join(ways)}."
    )


def _top(path: Path) -> Path:
    """The path itself, or the uppermost folder above it that the copy lacks."""
    return next((folder for folder in reversed(path.parents) if not folder.exists()), path)


def _names(names: list[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _shell(paths: list[Path], before: str = "") -> str:
    """Paths as a shell takes them, `before` in front of each; the first few."""
    return " ".join(before + _quoted(path) for path in paths[:SHOWN]) + (" ..." if len(paths) > SHOWN else "")


def _quoted(path: Path) -> str:
    if str(path).isprintable():
        return shlex.quote(str(path))
    plain = {*range(32, 127)} - {*b"'\\"}
    text = "".join(chr(byte) if byte in plain else "\\x" + f"{byte:02x}" for byte in os.fsencode(path))
    return f"$'{text}'"  # bash's form for control characters and bytes that are not UTF-8
