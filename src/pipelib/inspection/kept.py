"""What the state folder keeps: work of stages, files of the hub, encoded text, baselines; how large, how old, in use or not."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import tell
from pipelib.files import remove
from pipelib.workspace.locks import LOCK, InUseError, is_held, is_locked, locked
from pipelib.workspace.places import StatePlaces
from pipelib.workspace.stages import STAGES
from pipelib.workspace.workdir import META, finished_files

LISTS, HUB, UNITS, BASELINES = "lists", "hub", "units", "baselines"
"""Stand in the place of a stage for the hub's lists of files, for the files that were downloaded from the Hugging Face hub,
which every download can use, for the encoded pieces of text that tokenize makes shards of, and for what evaluate measured of
the baselines."""


@dataclass(frozen=True)
class Kept:
    """One state folder, STAGE/FINGERPRINT; the files of one revision of a repository, hub/OWNER--NAME/REVISION; its lists
    of files, .lists in that; the units of one state of the code, units/CODE; or a baseline's result, baselines/KEY."""

    stage: str
    """The stage it belongs to, or `lists`, `hub`, `units` or `baselines`."""
    folder: Path
    finished: bool
    locked: bool
    used: float
    """When a run last used it, in seconds since 1970."""
    files: tuple[os.stat_result, ...]

    @property
    def name(self) -> str:
        """What tells it from others of its stage."""
        if self.stage not in (LISTS, HUB):
            return self.folder.name
        revision = self.folder.parent if self.stage == LISTS else self.folder
        return f"{revision.parent.name}@{revision.name[:7]}"

    @property
    def status(self) -> str:
        """In a word or two."""
        if self.locked:
            return "in use"
        return "stored" if self.stage not in STAGES else "finished" if self.finished else "unfinished"


KINDS = (*STAGES, LISTS, HUB, UNITS, BASELINES)
"""Everything that is kept, by what stands in `Kept.stage`."""


def state_folders(state: StatePlaces) -> Iterator[tuple[str, Path]]:
    """The folders in which something is kept, with its kind. All but lists have a lock."""
    patterns = {
        **{stage: (state.root, f"{stage}/*/{LOCK}") for stage in STAGES},
        LISTS: (state.hub, "*/*/.lists/*.json"),
        HUB: (state.hub, f"*/*/{LOCK}"),
        UNITS: (state.units, f"*/{LOCK}*"),
        BASELINES: (state.baselines, f"*/{LOCK}"),
    }
    for kind in KINDS:
        root, pattern = patterns[kind]
        yield from ((kind, folder) for folder in {path.parent for path in root.glob(pattern)})


def find_kept(state: StatePlaces) -> list[Kept]:
    """What is kept, by kind, the last used first."""
    found = [_look_at(kind, folder) for kind, folder in state_folders(state)]
    return sorted(found, key=lambda kept: (KINDS.index(kept.stage), -kept.used))


def _look_at(stage: str, folder: Path) -> Kept:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    if stage == HUB:  # its lists have a line of their own
        paths = [path for path in paths if path.parent.name != ".lists"]
    locks = set(folder.glob(f"{LOCK}*"))
    files = tuple(stat for path in paths if path not in locks and (stat := _stat(path)))
    # a run writes its number into the lock
    times = [stat.st_mtime for stat in (*files, *map(_stat, locks)) if stat]
    return Kept(stage, folder, bool(finished_files(folder)), is_locked(folder), max(times, default=0.0), files)


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that a running stage has just removed."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def freed_bytes(states: Iterable[Kept]) -> int:
    """What deleting all of these gives back: the files that have no link outside of them."""
    inodes = {(stat.st_dev, stat.st_ino): stat for kept in states for stat in kept.files}
    links = Counter((stat.st_dev, stat.st_ino) for kept in states for stat in kept.files)
    return sum(stat.st_size for inode, stat in inodes.items() if stat.st_nlink <= links[inode])


def delete(kept: Kept) -> None:
    """Delete a state folder while holding its lock, so that no stage starts on half of it; one in use stays.

    The lock itself goes last, and meta.json first: what is left after a kill is not taken for finished.
    """
    try:
        with locked(kept.folder / LOCK):
            _delete(kept.folder)
    except InUseError as error:
        tell(f"kept: {error}")


def _delete(folder: Path) -> None:
    locks = sorted(folder.glob(f"{LOCK}*"))
    if any(is_held(lock) for lock in locks if lock.name != LOCK):
        tell(f"kept: {folder} is in use by a process that encodes a share of the text")
        return
    for entry in sorted(folder.iterdir(), key=lambda path: path.name != META):
        if entry not in locks:
            remove(entry)
    for lock in locks:
        lock.unlink(missing_ok=True)
    with suppress(OSError):  # a stage that starts at this moment has put its own lock there
        folder.rmdir()
