"""`pipelib clean`: what the stages keep to go on from, and free disk space."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelib.cli.table import aligned
from pipelib.errors import UserError
from pipelib.files import format_bytes, read_json, remove
from pipelib.progress import format_seconds
from pipelib.state import is_held, is_locked, lock_folder, state_root

STAGES = ("download", "tokenize", "train", "evaluate")
LISTS, HUB, UNITS, BASELINES = "lists", "hub", "units", "baselines"
"""Stand in the place of a stage for the hub's lists of files, for the files that were downloaded from the Hugging Face hub,
which every download can use, for the encoded pieces of text that tokenize makes shards of, and for what evaluate measured of
the baselines."""
EXAMPLES = """examples:
  pipelib clean --dry-run             list the state of all stages
  pipelib clean --older-than 7        delete what no run has used for a week, after asking
  pipelib clean --stage train --yes   delete the checkpoints and finished models of all trainings
  pipelib clean --stage lists         delete the lists of files that came from the hub or a mirror; the next download asks again
  pipelib clean --stage hub           delete what came from the hub; the next download fetches it again
  pipelib clean --stage units         delete encoded text, as big as the shards; only a changed corpus needs it again
  pipelib clean --stage baselines     delete what was measured of the baselines; the next evaluation measures again

"frees" is what deletion gives back now. Bytes that are hard-linked elsewhere (in the workspace, in DVC's cache) stay
until those links go too: dvc gc -w. The runs' records and the vocabulary are never deleted.
"""

Inode = tuple[int, int]


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


def add_parser(subparsers: Any) -> None:
    """Add `clean` to the command."""
    parser = subparsers.add_parser(
        "clean",
        help="list the stages' state, the hub's files and encoded text by size and age, and delete them",
        description="List what the stages keep to go on from after a kill (and to link finished outs again), what was "
        "downloaded from the hub, and the encoded text that shards are made of, and delete it after asking. What a running "
        "stage uses is never deleted.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", choices=(*STAGES, LISTS, HUB, UNITS, BASELINES), help="only this; default: all")
    parser.add_argument(
        "--older-than", type=float, default=0.0, metavar="DAYS", help="only what no run used for so long"
    )
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.add_argument("--dry-run", action="store_true", help="list only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List, ask, delete."""
    if not arguments.older_than >= 0:
        raise UserError(f"--older-than {arguments.older_than:g} is no number of days that have passed; give 0 or more.")
    root = state_root().absolute()
    before = time.time() - arguments.older_than * 86400
    found = [kept for kept in find_state(root) if arguments.stage in (None, kept.stage) and kept.used <= before]
    if not found:
        print(f"no state to delete in {root}")
        return 0
    print(table(found))
    unused = [kept for kept in found if not kept.locked]
    freed = format_bytes(freed_bytes(unused))
    print(f"{len(unused)} of {len(found)} in {root} can be deleted, which frees {freed}")
    if arguments.dry_run or not unused:
        return 0
    if not arguments.yes and not _agreed(len(unused), freed):
        return 0
    for kept in unused:
        delete(kept)
    print(f"deleted; {freed} freed")
    return 0


def find_state(root: Path) -> list[Kept]:
    """The state folders of all stages, by stage, the last used first, then the hub's. What has a lock is one of them."""
    patterns = {stage: f"{stage}/*/lock" for stage in STAGES} | {
        LISTS: "hub/*/*/.lists/*.json",
        HUB: "hub/*/*/lock",
        UNITS: "units/*/lock*",
        BASELINES: "baselines/*/lock",
    }
    found = [
        _look_at(stage, folder)
        for stage, pattern in patterns.items()
        for folder in {path.parent for path in root.glob(pattern)}
    ]
    return sorted(found, key=lambda kept: ([*patterns].index(kept.stage), -kept.used))


def _look_at(stage: str, folder: Path) -> Kept:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    if stage == HUB:  # its lists have a line of their own
        paths = [path for path in paths if path.parent.name != ".lists"]
    locks = set(folder.glob("lock*"))
    files = tuple(stat for path in paths if path not in locks and (stat := _stat(path)))
    # a run writes its number into the lock
    times = [stat.st_mtime for stat in (*files, *map(_stat, locks)) if stat]
    return Kept(stage, folder, _is_finished(folder), is_locked(folder), max(times, default=0.0), files)


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that a running stage has just removed."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_finished(folder: Path) -> bool:
    try:
        return "final" in read_json(folder / "meta.json")
    except (UserError, TypeError):
        return False


def freed_bytes(states: Iterable[Kept]) -> int:
    """What deleting all of these gives back: the files that have no link outside of them."""
    inodes = {(stat.st_dev, stat.st_ino): stat for kept in states for stat in kept.files}
    links = Counter((stat.st_dev, stat.st_ino) for kept in states for stat in kept.files)
    return sum(stat.st_size for inode, stat in inodes.items() if stat.st_nlink <= links[inode])


def table(states: list[Kept]) -> str:
    """One line a state."""
    rows = [("stage", "fingerprint", "status", "frees", "linked elsewhere", "unused for")]
    for kept in states:
        freed = freed_bytes([kept])
        total = sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in kept.files}.values())
        age = format_seconds(max(0.0, time.time() - kept.used))
        rows.append((kept.stage, kept.name, kept.status, format_bytes(freed), format_bytes(total - freed), age))
    return aligned(rows)


def _agreed(count: int, freed: str) -> bool:
    """Whether the user says yes; where nobody can be asked, say how to delete."""
    if not sys.stdin.isatty():
        print("nothing was deleted, since nobody can be asked here; add --yes to delete")
        return False
    try:
        answer = input(f"Delete {count} and free {freed}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("nothing was deleted")
    return False


def delete(kept: Kept) -> None:
    """Delete a state folder while holding its lock, so that no stage starts on half of it; one in use stays.

    The lock itself goes last, and meta.json first: what is left after a kill is not taken for finished.
    """
    try:
        descriptor = lock_folder(kept.folder)
    except UserError as error:
        print(f"kept: {error}")
        return
    try:
        locks = sorted(kept.folder.glob("lock*"))
        if any(is_held(lock) for lock in locks if lock.name != "lock"):
            print(f"kept: {kept.folder} is in use by a process that encodes a share of the text")
            return
        for entry in sorted(kept.folder.iterdir(), key=lambda path: path.name != "meta.json"):
            if entry not in locks:
                remove(entry)
        for lock in locks:
            lock.unlink(missing_ok=True)
        with suppress(OSError):  # a stage that starts at this moment has put its own lock there
            kept.folder.rmdir()
    finally:
        os.close(descriptor)
