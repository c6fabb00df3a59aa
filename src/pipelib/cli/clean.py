"""`pipelib clean`: list the state that stages keep, and delete it to free disk space."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipelib.cli.command import Command, option
from pipelib.cli.table import print_table
from pipelib.errors import UserError, tell
from pipelib.files import format_bytes
from pipelib.inspection.kept import KINDS, Kept, delete, find_kept, freed_bytes
from pipelib.progress import format_seconds
from pipelib.workspace.places import StatePlaces, state_root

EXAMPLES = """examples:
  pipelib clean --dry-run             list the state of all stages
  pipelib clean --older-than 7        delete what no run has used for a week, after asking
  pipelib clean --stage train --yes   delete the checkpoints and finished models of all trainings
  pipelib clean --stage lists         delete the hub's lists of files; the next download asks again
  pipelib clean --stage hub           delete downloaded files; the next download fetches them again
  pipelib clean --stage units         delete encoded text; only a changed corpus needs it again
  pipelib clean --stage baselines     delete baselines' results; the next evaluation measures again
  pipelib clean --stage trunks        delete what longer trainings would resume from

"frees" is the space that you get back now. Bytes with another hard link (in the workspace or DVC's
cache) are freed once that link is deleted too: dvc gc -w. The runs' records and the vocabulary are
never deleted.
"""


@dataclass(frozen=True)
class Clean(Command):
    """List the state, ask, and delete it."""

    command = "clean"
    help = "list stored state, downloads and encoded text by size and age, and delete them"
    description = (
        "List the state that stages keep (to resume after a kill, and to link finished outs again), the files downloaded from "
        "the hub, and the encoded text that shards are made of. Delete them after asking. Nothing that a running stage uses is "
        "deleted."
    )
    examples = EXAMPLES

    stage: str | None = option(
        f"only this: {', '.join(KINDS)}; default: all", default=None, metavar="NAME", choices=KINDS
    )
    older_than: float = option("only what no run has used for DAYS days; default: 0", default=0.0, metavar="DAYS")
    yes: bool = option("delete without asking", default=False)
    dry_run: bool = option("list only", default=False)

    def run(self) -> int:
        """List, ask, delete."""
        if not self.older_than >= 0:  # true for nan too
            raise UserError(
                f"--older-than {self.older_than:g} is negative or not a number, so nothing was deleted; "
                "give 0 days or more."
            )
        root = state_root().absolute()
        before = time.time() - self.older_than * 86400
        found = [
            kept for kept in find_kept(StatePlaces(root)) if self.stage in (None, kept.stage) and kept.used <= before
        ]
        if not found:
            print(f"no state to delete in {root}")
            return 0
        print_table(_rows(found))
        unused = [kept for kept in found if not kept.locked]
        freed = format_bytes(freed_bytes(unused))
        print(f"{len(unused)} of {len(found)} in {root} can be deleted, which frees {freed}")
        if self.dry_run or not unused:
            return 0
        if not self.yes and not _agreed(len(unused), freed):
            return 0
        # `delete` locks each folder: a stage may have started since the list was made
        for kept in unused:
            delete(kept)
        print(f"deleted; {freed} freed")
        return 0


def _rows(states: Sequence[Kept]) -> list[tuple[str, ...]]:
    """A header, and one row per state."""
    rows: list[tuple[str, ...]] = [("stage", "fingerprint", "status", "frees", "linked elsewhere", "unused for")]
    for kept in states:
        freed = freed_bytes([kept])
        total = sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in kept.files}.values())
        age = format_seconds(max(0.0, time.time() - kept.used))
        rows.append((kept.stage, kept.name, kept.status, format_bytes(freed), format_bytes(total - freed), age))
    return rows


def _agreed(count: int, freed: str) -> bool:
    """Ask the user; without a terminal, say how to delete and return False."""
    if not sys.stdin.isatty():
        tell("nothing was deleted, because there is no terminal to ask on; add --yes to delete without asking")
        return False
    try:
        answer = input(f"Delete {count} and free {freed}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("nothing was deleted")
    return False
