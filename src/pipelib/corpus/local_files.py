"""Find the files to read under `download.path`, and refuse what DVC or the stage cannot read there.

DVC hashes the whole folder before the stage starts, for any source and pattern. It hangs on a FIFO, and stops with an
unclear error at a dangling link or a name that is not UTF-8. It does not notice changes behind a linked folder or inside
another DVC repository. `pipelib plan --check` and `pipelib doctor` check for these before DVC runs.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelib.corpus.params import KINDS_IN_WORDS, READABLE, SAVED_DATASET
from pipelib.errors import UserError
from pipelib.files import is_unicode

_SHOWN = 5  # the most names in one message
OTHERWISE = {"download": "docs", "finetune": "none"}
"""The source of each section that needs no files of the user."""


@dataclass(frozen=True)
class LocalFiles:
    """The files to read, and those to ignore."""

    root: Path
    """The folder that the names are relative to."""
    names: list[str]
    """The files to read, as sorted paths inside `root`. A saved dataset is one file, its state.json."""
    ignored: list[str]
    """The files that match the pattern but are not of a kind that can be read, sorted."""

    @property
    def all_names(self) -> list[str]:
        """The files to read, and the parts of saved datasets, sorted."""
        parts = (part for name in self.names for part in saved_parts(self.root / name))
        return sorted({*self.names, *(part.relative_to(self.root).as_posix() for part in parts)})


def find_files(path: Path, pattern: str, section: str = "download") -> LocalFiles:
    """Find the files under a folder that match a glob, without hidden ones. A single file need not match it.

    Args:
        section: of params.yaml, whose `path` and `pattern` these are.

    Raises:
        UserError: there is no such folder or no file in it, or DVC could not read something there or notice its changes.
    """
    require_readable(path, links=True, section=section)
    if path.is_file():
        names, root = [path.name], path.parent
    else:
        matches = visible_matches(path, pattern, f"{section}.pattern")
        names = sorted(name.as_posix() for name in matches if (path / name).is_file())
        root = path
    parts = {part for name in names for part in saved_parts(root / name)}
    own = [name for name in names if root / name not in parts and Path(name).name != "dataset_dict.json"]
    readable = [name for name in own if name.lower().endswith(READABLE)]
    if not readable:
        where = (
            f"{path} is not"
            if path.is_file()
            else f"{path} has no file that matches {section}.pattern = {pattern!r} and is"
        )
        raise UserError(
            f"{section}.path: {where} of a kind that can be read ({KINDS_IN_WORDS}), so there is no text; put files "
            f"there, or set {section}.source: {OTHERWISE[section]}."
        )
    return LocalFiles(root, readable, sorted({*own} - {*readable}))


def saved_parts(path: Path) -> list[Path]:
    """Return the other files of a dataset that `Dataset.save_to_disk` wrote, for its state.json; none for another file."""
    info = path.with_name("dataset_info.json")
    if path.name != SAVED_DATASET or not info.is_file():
        return []
    try:
        return [info, *(path.with_name(part["filename"]) for part in json.loads(path.read_bytes())["_data_files"])]
    except (ValueError, KeyError, TypeError):
        return []


def validation_names(root: Path, names: Sequence[str], pattern: str | None) -> list[str]:
    """Return the files that `download.validation` matches, in order. A folder stands for all files in it.

    Raises:
        UserError: no file matches, or all do.
    """
    if pattern is None:
        return []
    matches = set(visible_matches(root, pattern, "download.validation"))
    found = [name for name in names if not matches.isdisjoint([Path(name), *Path(name).parents])]
    if not found or len(found) == len(names):
        which = "none" if not found else "each"
        raise UserError(
            f"download.validation: {pattern!r} matches {which} of the {len(names)} files that are read, so there would be no "
            f"text for {'validation' if not found else 'training'}; name some of them, or set it to null."
        )
    return found


def visible_matches(folder: Path, pattern: str, key: str = "download.pattern") -> list[Path]:
    """Return everything in a folder that matches a glob and is not hidden, as paths inside the folder.

    Raises:
        UserError: the pattern is not a glob.
    """
    try:
        matches = [path.relative_to(folder) for path in folder.glob(pattern)]
    except (ValueError, NotImplementedError, IndexError) as error:
        raise UserError(
            f"{key}: {pattern!r} is not a glob ({error}), so no file can be found; use **/* for all files."
        ) from None
    return [path for path in matches if not any(part.startswith(".") for part in path.parts)]


def require_readable(path: Path, links: bool, section: str = "download") -> None:
    """Refuse a `download.path`, or that of another section, that does not exist or contains something that cannot be read.

    Args:
        links: whether to refuse linked folders. They matter only to the local source, which reads the folder.

    Raises:
        UserError: lists every problem with its remedy.
    """
    if not path.exists():
        raise UserError(f"{section}.path: {path} {_why_missing(path)}")
    if not path.is_file() and not path.is_dir():
        raise UserError(
            f"{section}.path: {path} is neither a folder nor a file, so there is no text; name a folder or a file."
        )
    # One more than is shown tells whether there are more; the folder may have millions of files.
    found = list(islice(_problems(path, links), _SHOWN + 1)) if path.is_dir() else []
    if found:
        more = [f"and more, after these {_SHOWN}"] if len(found) > _SHOWN else []
        raise UserError(
            f"{section}.path: DVC cannot track {path} as it is, so its text could be incomplete:\n"
            + "\n".join(f"  - {line}" for line in [*found[:_SHOWN], *more])
        )


def _why_missing(path: Path) -> str:
    """Say what to do about a path that does not exist. DVC expands neither `~` nor variables."""
    expanded = str(Path(os.path.expandvars(path)).expanduser())
    if expanded != str(path):
        return f"does not exist: DVC expands neither ~ nor variables, so it would find no text; write {expanded}."
    return "does not exist, so there is no text; create it and put files there, or name another folder or file."


def _problems(folder: Path, links: bool) -> Iterator[str]:
    """Yield what is wrong under a folder, in the order of the paths."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)  # scandir's order differs between file systems
    except OSError as error:
        yield f"{printable(folder)} cannot be listed ({error.strerror}); change its permissions or move it away"
        return
    for entry in entries:
        path = Path(entry.path)
        if problem := _problem(entry, path, links):
            yield f"{printable(path)} {problem}"
        elif entry.is_dir(follow_symlinks=False):
            yield from _problems(path, links)


def _problem(entry: os.DirEntry[str], path: Path, links: bool) -> str:
    """Return what is wrong with one entry of a folder; empty if nothing is."""
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
        return f"is a link to {printable(path.readlink())}, which does not exist; restore that, or remove the link"
    if path.is_file():
        return ""
    if not path.is_dir():
        return "is a link to something that is not a file; remove it"
    if not links or path.name.startswith("."):
        return ""
    return (
        "is a link to a folder, and DVC would not notice changes in it; move the folder here, or name the folder itself"
    )


def printable(path: Path | str) -> str:
    """Return a path as text that can be printed, for any bytes in its name."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")
