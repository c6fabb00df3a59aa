"""`pipelib clean`: what the stages keep to go on from, and free disk space."""

import argparse
import sys
import time
from typing import Any

from pipelib.cli.table import aligned
from pipelib.errors import UserError
from pipelib.files import format_bytes
from pipelib.inspection.kept import KINDS, Kept, delete, find_kept, freed_bytes
from pipelib.progress import format_seconds
from pipelib.workspace.places import StatePlaces, state_root

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
    parser.add_argument("--stage", choices=KINDS, help="only this; default: all")
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
    found = [
        kept for kept in find_kept(StatePlaces(root)) if arguments.stage in (None, kept.stage) and kept.used <= before
    ]
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
