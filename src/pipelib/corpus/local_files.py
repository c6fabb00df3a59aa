"""Which files under `download.path` are read, and what there neither DVC nor the stage can read.

DVC hashes the whole folder before the stage starts, whatever the source and the pattern are. A FIFO hangs it, a dangling
link or a name that is not UTF-8 ends it with a bare error, and it never sees a change behind a linked folder or inside
another DVC repository. `pipelib plan --check` and `pipelib doctor` look for these before DVC does.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelib.corpus.params import READABLE
from pipelib.errors import UserError
from pipelib.files import is_unicode

_SHOWN = 5  # names in one message


@dataclass(frozen=True)
class LocalFiles:
    """The files that are read, and those that are not."""

    root: Path
    """The folder that the names start from."""
    names: list[str]
    """Paths inside `root` of the files to read, sorted."""
    ignored: list[str]
    """Those that match the pattern and are of no kind that can be read, sorted."""


def find_files(path: Path, pattern: str) -> LocalFiles:
    """The files under a folder that match a glob; hidden ones are ignored. A single file is taken whatever its name matches.

    Raises:
        UserError: there is no such folder, no file in it, or something there cannot be read or would not be noticed.
    """
    require_readable(path, links=True)
    if path.is_file():
        names, root = [path.name], path.parent
    else:
        names = sorted(name.as_posix() for name in visible_matches(path, pattern) if (path / name).is_file())
        root = path
    readable = [name for name in names if name.lower().endswith(READABLE)]
    if not readable:
        where = (
            f"{path} is not"
            if path.is_file()
            else f"{path} has no file that matches download.pattern = {pattern!r} and is"
        )
        raise UserError(
            f"download.path: {where} of a kind that can be read ({', '.join(READABLE)}), so there is no text; put files "
            "there, or set download.source: docs."
        )
    return LocalFiles(root, readable, sorted({*names} - {*readable}))


def visible_matches(folder: Path, pattern: str) -> list[Path]:
    """What matches a glob in a folder, of any kind, by its path inside the folder; nothing hidden.

    Raises:
        UserError: it is not a glob.
    """
    try:
        matches = [path.relative_to(folder) for path in folder.glob(pattern)]
    except (ValueError, NotImplementedError, IndexError) as error:
        raise UserError(f"download.pattern: {pattern!r} is not a glob ({error}); **/* takes everything.") from None
    return [path for path in matches if not any(part.startswith(".") for part in path.parts)]


def require_readable(path: Path, links: bool) -> None:
    """Refuse a `download.path` that does not exist, or that has something in it which cannot be read.

    Args:
        links: whether linked folders count: only the local source reads the folder.

    Raises:
        UserError: naming what is wrong, each with its remedy.
    """
    if not path.exists():
        raise UserError(f"download.path: {path} {_why_missing(path)}")
    if not path.is_file() and not path.is_dir():
        raise UserError(f"download.path: {path} is neither a folder nor a file, so there is no text; name one of them.")
    found = list(islice(_problems(path, links), _SHOWN + 1)) if path.is_dir() else []
    if found:
        more = [f"and more, after these {_SHOWN}"] if len(found) > _SHOWN else []
        raise UserError(
            f"download.path: DVC cannot track {path} as it is, so the corpus could be incomplete:\n"
            + "\n".join(f"  - {line}" for line in [*found[:_SHOWN], *more])
        )


def _why_missing(path: Path) -> str:
    """What to write instead of a path that does not exist; DVC expands neither `~` nor variables."""
    expanded = str(Path(os.path.expandvars(path)).expanduser())
    if expanded != str(path):
        return f"does not exist: DVC expands neither ~ nor variables, so it would find no text; write {expanded}."
    return "does not exist, so there is no text; create it and put files there, or name another folder or file."


def _problems(folder: Path, links: bool) -> Iterator[str]:
    """What is wrong under a folder, in the order of the paths."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        yield f"{shown(folder)} cannot be listed ({error.strerror}); change its permissions or move it away"
        return
    for entry in entries:
        path = Path(entry.path)
        if problem := _problem(entry, path, links):
            yield f"{shown(path)} {problem}"
        elif entry.is_dir(follow_symlinks=False):
            yield from _problems(path, links)


def _problem(entry: os.DirEntry[str], path: Path, links: bool) -> str:
    """What is wrong with one entry of a folder; empty if nothing is."""
    if not is_unicode(entry.name):
        return "has a name that is not UTF-8; rename it"
    if entry.name == ".dvcignore":
        return "is not allowed inside a dependency; put its lines into the .dvcignore of the repository"
    if entry.is_symlink():
        return _problem_of_link(path, links)
    if entry.is_dir():
        is_repository = (path / ".dvc").is_dir()
        return (
            "is a DVC repository, and DVC does not look into one; move it out, or remove its .dvc"
            if is_repository
            else ""
        )
    if not entry.is_file():
        return "is not a file (it is a FIFO, a socket or a device); move it away"
    return "" if os.access(path, os.R_OK) else "cannot be read; change its permissions or move it away"


def _problem_of_link(path: Path, links: bool) -> str:
    if not path.exists():
        return f"is a link to {shown(path.readlink())}, which does not exist; restore that, or remove the link"
    if path.is_file():
        return ""
    if not path.is_dir():
        return "is a link to something that is not a file; remove it"
    if not links or path.name.startswith("."):
        return ""
    return "is a link to a folder, and DVC would not see it change; move the folder here, or set download.path to it"


def shown(path: Path | str) -> str:
    """A path as text that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")
