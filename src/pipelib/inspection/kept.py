"""What the state folder keeps: state of stages, files of the hub, encoded text, baselines; with size, age and use."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import tell
from pipelib.files import remove
from pipelib.workspace.locks import LOCK, InUseError, holder, is_held, is_locked, locked
from pipelib.workspace.places import StatePlaces
from pipelib.workspace.stages import STAGES
from pipelib.workspace.workdir import META, finished_files

LISTS, HUB, UNITS, BASELINES, TRUNKS = "lists", "hub", "units", "baselines", "trunks"
"""Kinds of kept state that belong to no single stage: the hub's lists of files, files downloaded from the hub, the encoded text
that tokenize makes shards of, the results that evaluate measured for baselines, and the states that trainings had before their
cooldown."""


@dataclass(frozen=True)
class Kept:
    """One folder that is kept: the state of a stage, STAGE/FINGERPRINT; the files of one revision of a repository,
    hub/OWNER--NAME/REVISION; the lists of files in it, .lists; the units of one version of the code, units/CODE; the result of a
    baseline, baselines/KEY; or the state of a training before its cooldown, trunks/KEY."""

    stage: str
    """Its kind, one of `KINDS`: the stage that it belongs to, or `lists`, `hub`, `units`, `baselines` or `trunks`."""
    folder: Path
    finished: bool
    locked: bool
    used: float
    """When a run last used it, in seconds since 1970."""
    files: tuple[os.stat_result, ...]

    @property
    def name(self) -> str:
        """Its name among others of its kind."""
        if self.stage not in (LISTS, HUB):
            return self.folder.name
        revision = self.folder.parent if self.stage == LISTS else self.folder
        return f"{revision.parent.name}@{revision.name[:7]}"

    @property
    def status(self) -> str:
        """In use, stored, finished or unfinished."""
        if self.locked:
            return "in use"
        return "stored" if self.stage not in STAGES else "finished" if self.finished else "unfinished"


KINDS = (*STAGES, LISTS, HUB, UNITS, BASELINES, TRUNKS)
"""All values of `Kept.stage`."""


def state_folders(state: StatePlaces) -> Iterator[tuple[str, Path]]:
    """Every kept folder with its kind. All kinds but lists have a lock."""
    patterns = {
        **{stage: (state.root, f"{stage}/*/{LOCK}") for stage in STAGES},
        LISTS: (state.hub, "*/*/.lists/*.json"),
        HUB: (state.hub, f"*/*/{LOCK}"),
        UNITS: (state.units, f"*/{LOCK}*"),
        BASELINES: (state.baselines, f"*/{LOCK}"),
        TRUNKS: (state.trunks, f"*/{LOCK}"),
    }
    for kind in KINDS:
        root, pattern = patterns[kind]
        yield from ((kind, folder) for folder in {path.parent for path in root.glob(pattern)})


def find_kept(state: StatePlaces) -> list[Kept]:
    """Everything that is kept, by kind, the most recently used first."""
    found = [_inspect(kind, folder) for kind, folder in state_folders(state)]
    return sorted(found, key=lambda kept: (KINDS.index(kept.stage), -kept.used))


def _inspect(stage: str, folder: Path) -> Kept:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    if stage == HUB:  # its lists are a kind of their own
        paths = [path for path in paths if path.parent.name != ".lists"]
    locks = set(folder.glob(f"{LOCK}*"))
    files = tuple(stat for path in paths if path not in locks and (stat := _stat(path)))
    # locks count: a run writes its process id into the lock when it starts
    times = [stat.st_mtime for stat in (*files, *map(_stat, locks)) if stat]
    return Kept(stage, folder, bool(finished_files(folder)), is_locked(folder), max(times, default=0.0), files)


def _stat(path: Path) -> os.stat_result | None:
    """None if a running stage has just removed the file."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def freed_bytes(states: Iterable[Kept]) -> int:
    """The bytes that deleting all of these frees: their files that have no hard link elsewhere."""
    inodes = {(stat.st_dev, stat.st_ino): stat for kept in states for stat in kept.files}
    links = Counter((stat.st_dev, stat.st_ino) for kept in states for stat in kept.files)
    return sum(stat.st_size for inode, stat in inodes.items() if stat.st_nlink <= links[inode])


def delete(kept: Kept) -> None:
    """Delete a folder while holding its lock, so that no stage starts on half of it; skip one in use.

    meta.json is deleted first and the lock last, so that a half-deleted folder does not count as finished.
    """
    try:
        with locked(kept.folder / LOCK):
            _delete(kept.folder)
    except InUseError:
        process = holder(kept.folder / LOCK)
        tell(f"not deleted: {kept.folder} is in use by process {process}; run `pipelib clean` again when it has ended")


def _delete(folder: Path) -> None:
    locks = sorted(folder.glob(f"{LOCK}*"))
    # a process that encodes a share of the text holds a lock of its own
    if any(is_held(lock) for lock in locks if lock.name != LOCK):
        tell(
            f"not deleted: {folder} is in use by a process that encodes a share of the text; run `pipelib clean` again "
            "when it has ended"
        )
        return
    for entry in sorted(folder.iterdir(), key=lambda path: path.name != META):
        if entry not in locks:
            remove(entry)
    for lock in locks:
        lock.unlink(missing_ok=True)
    with suppress(OSError):  # a stage that starts at this moment may have put a new lock there
        folder.rmdir()
