"""`pipelib track`: the runs' own records, what of them MLflow has, and sending it what it missed."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelib.cli.table import aligned
from pipelib.errors import UserError, as_typed
from pipelib.tracking.mlflow_run import DeletedRun
from pipelib.tracking.mlflow_store import Place, Store, failure
from pipelib.tracking.record import read_events, redact
from pipelib.tracking.replay import (
    ALL,
    BUSY,
    DELETED,
    Replayed,
    had_of,
    held,
    opened,
    replay_record,
    settle_parents,
)
from pipelib.workspace.places import StatePlaces

EXAMPLES = """examples:
  pipelib track                       every run's record, and what of it has arrived in MLflow
  pipelib track --replay              send what has not arrived; twice does nothing more
  pipelib track --replay brave-lynx   send one run, also when it was deleted in MLflow
"""


@dataclass(frozen=True)
class Kept:
    """A record on disk."""

    path: Path
    key: str
    """The run of the pipeline: DVC's experiment, or a hash of parameters and code."""
    stage: str
    begun: float
    """In seconds since 1970."""
    ended: str
    """finished, failed, killed; nothing where it did not say."""
    points: int


def add_parser(subparsers: Any) -> None:
    """Add `track` to the command."""
    parser = subparsers.add_parser(
        "track",
        help="list the runs' records and what of them MLflow has; --replay sends the rest",
        description="Every stage keeps a record of its run on disk, whether MLflow is there or not. List the records and what of "
        "each has arrived in MLflow (mlflow.db here, or MLFLOW_TRACKING_URI), or send what has not.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="only these, by the first column; default: all")
    parser.add_argument("--replay", action="store_true", help="send to MLflow what it has not")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List, or send."""
    root = StatePlaces.chosen().records.absolute()
    kept = find_records(root, arguments.runs)
    if not kept:
        print(f"no run has been recorded in {root}")
        return 0
    place = Place.chosen()
    where = redact(place.uri)
    try:
        if not arguments.replay and place.database and not place.database.exists():
            print(table(kept, ["nothing"] * len(kept)))
            print(as_typed(f"{where} is not there yet; `pipelib track --replay` makes it"))
            return 0
        tell(f"asking MLflow at {where}")  # its import alone takes seconds
        store = place.open()
        if arguments.replay:
            return replay(store, kept, bool(arguments.runs))
        states = [_state(store, record) for record in kept]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {where} failed {redact(failure(error))}, so nothing more was sent; the records in {root} are complete: "
            "run pipelib track --replay when it is back."
        ) from None
    print(table(kept, states))
    missing = sum(state not in (ALL, DELETED, BUSY) for state in states)
    print(
        as_typed(f"MLflow at {where} has not all of {missing} of {len(kept)}; `pipelib track --replay` sends the rest")
        if missing
        else f"MLflow at {where} has everything that was not deleted there"
    )
    return 0


def find_records(root: Path, keys: Sequence[str]) -> list[Kept]:
    """The records under a folder, the earliest first.

    Raises:
        UserError: one of `keys` has no record.
    """
    unknown = [key for key in keys if not (root / key).is_dir() or not key.strip("./")]
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: no run of that name is recorded in {root}, so there is nothing to send; `pipelib track` "
            "lists the names."
        )
    found = []
    for path in root.glob("*/*.jsonl"):
        if keys and path.parent.name not in keys:
            continue
        events, _ = read_events(path)
        begun = opened(events)
        if begun is None:
            continue
        last = events[-1]
        points = sum(len(event["metrics"]) for event in events if event["event"] == "metrics")
        ended = str(last["status"]) if last["event"] == "end" else ""
        found.append(Kept(path, path.parent.name, str(begun["stage"]), begun["began"], ended, points))
    return sorted(found, key=lambda record: record.begun)


def tell(text: str) -> None:
    """Say what is going on, beside the result."""
    print(text, file=sys.stderr, flush=True)


def _state(store: Store, record: Kept) -> str:
    with held(record.path) as mine:
        return had_of(store, *read_events(record.path)) if mine else BUSY


def table(kept: Sequence[Kept], states: Sequence[str]) -> str:
    """One line a record."""
    rows = [("run", "stage", "begun", "ended", "points", "in MLflow")]
    for record, state in zip(kept, states, strict=True):
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.begun))
        rows.append((record.key, record.stage, begun, record.ended or "-", f"{record.points:,}", state))
    return aligned(rows)


def replay(store: Store, kept: Sequence[Kept], named: bool) -> int:
    """Send what MLflow has not; a record that it does not take keeps no other from being sent.

    Args:
        named: the user asked for these runs, so those that were deleted in MLflow come back.

    Raises:
        UserError: MLflow did not take all of some records.
    """
    done: list[tuple[Kept, Replayed]] = []
    lacking: list[str] = []
    for record in kept:
        name = f"{record.key} {record.stage}"
        try:
            result = replay_record(store, record.path, named, partial(tell, f"sending {name}"))
        except DeletedRun:
            result = Replayed(DELETED)
        except Exception as error:
            tell(f"{name}: MLflow failed {failure(error)}")
            lacking.append(name)
            continue
        done.append((record, result))
        lacking += [] if result.whole else [name]
        if result.had == BUSY:
            print(f"{name}: not now, since the stage is running or another process sends it")
        elif result.had != ALL and (named or result.had != DELETED):
            print(f"{name}: MLflow had {result.had}; {result.points:,} points and {result.files} files sent")
        for file in result.gone:
            print(f"{name}: {file} is no longer on this disk, so MLflow goes without it")
    for folder in sorted({record.path.parent for record in kept}):
        try:
            settle_parents(store, folder)
        except Exception as error:
            tell(f"{folder.name}: MLflow failed {failure(error)}")
            lacking.append(folder.name)
    deleted = sorted({record.key for record, result in done if result.had == DELETED})
    if deleted and not named:
        again = f"`pipelib track --replay {' '.join(deleted)}`"
        print(as_typed(f"left alone, since they were deleted in MLflow; {again} sends them again"))
    where = redact(store.place.uri)
    if lacking:
        raise UserError(
            f"MLflow at {where} did not take all of {', '.join(lacking)}, so that is only in the records, which are complete; "
            "fix what is said above, and run pipelib track --replay again."
        )
    left = "everything else" if not named and deleted else "everything"
    busy = " but what is being sent" if any(result.had == BUSY for _, result in done) else ""
    print(f"MLflow at {where} has {left}{busy} now")
    return 0
