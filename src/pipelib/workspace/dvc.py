"""Read what DVC records: dvc.lock, the metrics, and the cache with its objects.

A merge, an editor or a full disk may have damaged dvc.lock and the metrics, so they are checked when they are read.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipelib.errors import UserError
from pipelib.files import files_under
from pipelib.schema import conflict_line, flatten, kind_of, load_yaml
from pipelib.workspace.places import HERE, Places

_MD5 = re.compile(r"[\w-]*(\.dir)?")  # no slashes: it becomes a file name in the cache


@dataclass(frozen=True)
class LockedEntry:
    """A dependency or an out of a stage."""

    path: str
    """The path as in dvc.yaml."""
    md5: str
    """DVC's MD5. It ends in `.dir` for a folder, and is empty if DVC recorded none."""


@dataclass(frozen=True)
class LockedStage:
    """The entry of dvc.lock for a stage that has run."""

    deps: tuple[LockedEntry, ...]
    outs: tuple[LockedEntry, ...]


def read_lock(path: Path = HERE.lock) -> dict[str, LockedStage]:
    """Read the stages of a dvc.lock, by name; empty if there is no file.

    Raises:
        UserError: the file is not a valid dvc.lock.
    """
    content = read_if_there(path)
    return {} if content is None else parse_lock(content, str(path))


def parse_lock(content: bytes, name: str, remedy: str = "") -> dict[str, LockedStage]:
    """Parse the stages of a dvc.lock, by name.

    Args:
        name: what messages call the file.
        remedy: what to do about a broken file; by default, how to restore a file of the workspace.

    Raises:
        UserError: the content is not a valid dvc.lock.
    """
    try:
        value = load_yaml(content)
        if value is None:
            raise ValueError("it is empty")
        stages = _mapping(value, "it").get("stages")
        locked = {} if stages is None else _mapping(stages, "stages")
        return {str(stage): _stage(entry, f"stages.{stage}") for stage, entry in locked.items()}
    except ValueError as error:
        why = "so it is unknown what DVC made, and DVC itself cannot read it"
        raise UserError(f"{_broken(name, content, error)}, {why}; {remedy or how_to_restore(name)}.") from None


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the values in a metrics file, by dotted key; empty if there is no file.

    Raises:
        UserError: it is not a JSON object.
    """
    content = read_if_there(path)
    return {} if content is None else parse_metrics(content, str(path))


def parse_metrics(content: bytes, name: str, remedy: str = "") -> dict[str, Any]:
    """Parse the values in a metrics file, by dotted key. See `parse_lock` for the arguments.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        return dict(flatten(_mapping(json.loads(content), "it")))
    except (ValueError, RecursionError) as error:
        why = "so its numbers cannot be read"
        raise UserError(f"{_broken(name, content, error)}, {why}; {remedy or how_to_restore(name)}.") from None


def problems(root: Path) -> Iterator[str]:
    """Yield a message for each broken file among the dvc.lock and the metrics of a workspace."""
    for path in (Places(root).lock, *sorted(Places(root).metrics.rglob("*.json"))):
        try:
            read_lock(path) if path == Places(root).lock else read_metrics(path)
        except UserError as error:
            yield str(error)


def how_to_restore(name: str) -> str:
    """Return the remedy for a broken file of the workspace."""
    return (
        f"take git's copy (`git checkout HEAD -- {name}`), or delete the file if git has none, and run dvc repro, which "
        "updates it; results that DVC has are not computed again"
    )


def read_if_there(path: Path) -> bytes | None:
    """Read the bytes of a file; None if it does not exist.

    Raises:
        UserError: it exists but cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}), so nothing is known about its run; make it a readable file."
        ) from None


def _broken(name: str, content: bytes, error: Exception) -> str:
    """Return the first clause of a message: what is wrong with a file."""
    if line := conflict_line(content):
        return f"{name} has git's conflict markers (line {line})"
    return f"{name} is broken ({' '.join(str(error).split()) or type(error).__name__})"


def _stage(value: object, where: str) -> LockedStage:
    stage = _mapping(value, where)
    deps, outs = (
        tuple(_entry(entry, f"{where}.{key}") for entry in _list(stage.get(key), f"{where}.{key}"))
        for key in ("deps", "outs")
    )
    return LockedStage(deps, outs)


def _entry(value: object, where: str) -> LockedEntry:
    entry = _mapping(value, where)
    path, md5 = entry.get("path"), entry.get("md5", "")
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{where} has an entry without a path")
    if not isinstance(md5, str) or not _MD5.fullmatch(md5):
        raise ValueError(f"{where}: {path} has the invalid md5 {md5!r:.60}")
    return LockedEntry(path, md5)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {kind_of(value)}, not a section")
    return value


def _list(value: object, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{where} is {kind_of(value)}, not a list")
    return value


# ---- The cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Out:
    """A folder in dvc.lock, and what DVC recorded about it."""

    folder: Path
    md5: str
    """The MD5 of DVC's list of the folder's files, and so of the whole folder. It ends in `.dir`."""
    objects: Path
    """The folder where DVC keeps objects, named by their MD5."""

    @property
    def listing(self) -> Path:
        """The file with DVC's list of the folder's files."""
        return self.object(self.md5)

    def object(self, md5: str) -> Path:
        """Return the path where DVC keeps the bytes with this MD5."""
        return object_path(self.objects, md5)

    def entries(self) -> dict[Path, str] | None:
        """Return the MD5 that DVC recorded for each file; None if its list is missing or damaged."""
        if not (self.listing.is_file() and is_sound(self.listing)):  # a damaged list would blame intact files
            return None
        return {self.folder / entry["relpath"]: entry["md5"] for entry in json.loads(self.listing.read_bytes())}

    def linked_objects(self) -> dict[Path, Path]:
        """Return the object of each file that is a hard link to one."""
        # DVC does not record links, but hard links to one file share its inode.
        by_inode = {_inode(entry): entry for entry in self.objects.glob("??/*")}
        return {path: by_inode[inode] for path in files_under(self.folder) if (inode := _inode(path)) in by_inode}


def _inode(path: Path) -> tuple[int, int]:
    """Return what all hard links to one file share."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def object_path(objects: Path, md5: str) -> Path:
    """Return the path where DVC keeps the bytes with this MD5. For an empty MD5, nothing is there."""
    return objects / (md5[:2] or "none") / md5[2:]


def objects_folder(root: Path) -> Path:
    """Return the folder where DVC keeps the objects of a repository.

    Raises:
        UserError: DVC could not tell where its cache is.
    """
    return cache_folder(root) / "files" / "md5"


@cache
def cache_folder(root: Path) -> Path:
    """Return the cache folder of this environment's DVC. The answer is cached, because DVC is slow to start.

    Args:
        root: the repository, as an absolute path.
    """
    try:
        return root / run_dvc(root, "cache", "dir")
    except DvcError as error:
        raise UserError(
            f"{error}, so what DVC recorded cannot be found; nothing was verified or removed: fix DVC first (`pipelib doctor`)."
        ) from None


class DvcError(UserError):
    """A DVC command failed. The message has DVC's own words."""


def run_dvc(root: Path, *arguments: str) -> str:
    """Run a command of this environment's DVC, and return what it prints.

    Raises:
        DvcError: the command fails.
    """
    command = [sys.executable, "-m", "dvc", *arguments]  # not `dvc`, which may be another environment's on PATH
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DvcError(f"`dvc {' '.join(arguments)}` failed in {root} ({done.stderr.strip()})")
    return done.stdout.strip()


def is_sound(entry: Path) -> bool:
    """Return whether an object has the MD5 in its name. A missing object counts as sound, because DVC can restore it."""
    return not entry.exists() or md5_file(entry) == entry.parent.name + entry.name.removesuffix(".dir")


def md5_file(path: Path) -> str | None:
    """Return the MD5 of a file, as DVC uses it; None if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return None
