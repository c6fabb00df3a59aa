"""Find the records of runs on disk, ask MLflow how much of each it has, and send the rest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelib.errors import UserError, tell
from pipelib.tracking.mlflow_run import DeletedRun
from pipelib.tracking.mlflow_store import Store, failure
from pipelib.tracking.record import read_events, redact
from pipelib.tracking.replay import (
    ALL,
    BUSY,
    DELETED,
    ReplayResult,
    end_parents,
    exclusive,
    open_event,
    replay_record,
    sent_state,
)


@dataclass(frozen=True)
class RecordFile:
    """A record on disk."""

    path: Path
    key: str
    """The run of the pipeline: the name of DVC's experiment, or a hash of parameters and code."""
    stage: str
    begun: float
    """In seconds since 1970."""
    ended: str
    """finished, failed or killed; empty if the record does not say."""
    points: int


def find_records(root: Path, keys: Sequence[str]) -> list[RecordFile]:
    """The records under a folder, the earliest run first.

    Raises:
        UserError: one of `keys` has no record.
    """
    # os.path.isdir, since Path.is_dir raises if a name is too long
    unknown = [key for key in keys if not os.path.isdir(root / key) or not key.strip("./")]  # noqa: PTH112
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: no run of this name is recorded in {root}, so nothing was listed or sent; "
            "`pipelib track` lists the names."
        )
    found = []
    for path in root.glob("*/*.jsonl"):
        if keys and path.parent.name not in keys:
            continue
        events, _ = read_events(path)
        begun = open_event(events)
        if begun is None:
            continue
        last = events[-1]
        points = sum(len(event["metrics"]) for event in events if event["event"] == "metrics")
        ended = str(last["status"]) if last["event"] == "end" else ""
        found.append(RecordFile(path, path.parent.name, str(begun["stage"]), begun["began"], ended, points))
    return sorted(found, key=lambda record: record.begun)


def find_sent_state(store: Store, record: RecordFile) -> str:
    """How much MLflow has of a record: ALL, PART, NOTHING, DELETED or BUSY."""
    with exclusive(record.path) as mine:
        return sent_state(store, *read_events(record.path)) if mine else BUSY


def replay(store: Store, records: Sequence[RecordFile], *, named: bool) -> None:
    """Send what MLflow does not have. One rejected record does not block the others.

    Args:
        named: the user named these runs, so send them even if they were deleted in MLflow.

    Raises:
        UserError: MLflow did not accept all of some records.
    """
    done: list[tuple[RecordFile, ReplayResult]] = []
    lacking: list[str] = []
    for record in records:
        name = f"{record.key} {record.stage}"
        try:
            result = replay_record(store, record.path, named, partial(tell, f"sending {name}", error=True))
        except DeletedRun:
            result = ReplayResult(DELETED)
        except Exception as error:
            tell(f"{name}: could not be sent to MLflow {failure(error)}", error=True)
            lacking.append(name)
            continue
        done.append((record, result))
        lacking += [] if result.complete else [name]
        if result.before == BUSY:
            tell(f"{name}: skipped, because the stage is running or another process sends it")
        elif result.before != ALL and (named or result.before != DELETED):
            tell(f"{name}: MLflow had {result.before}; {result.points:,} points and {result.files} files sent")
        for file in result.missing_files:
            tell(f"{name}: {file} is no longer on this disk, so MLflow does not get it")
    # after all records, since a parent's status depends on all its stages
    for folder in sorted({record.path.parent for record in records}):
        try:
            end_parents(store, folder)
        except Exception as error:
            tell(f"{folder.name}: could not be sent to MLflow {failure(error)}", error=True)
            lacking.append(folder.name)
    deleted = sorted({record.key for record, result in done if result.before == DELETED})
    if deleted and not named:
        again = f"`pipelib track --replay {' '.join(deleted)}`"
        tell(f"not sent, because they were deleted in MLflow; {again} sends them again")
    where = redact(store.tracking_uri.uri)
    if lacking:
        raise UserError(
            f"MLflow at {where} did not accept all of {', '.join(lacking)}, so the rest is only in the records, which are "
            "complete; fix what is reported above, and run pipelib track --replay again."
        )
    left = "everything else" if not named and deleted else "everything"
    busy = " except what is being sent" if any(result.before == BUSY for _, result in done) else ""
    tell(f"MLflow at {where} has {left}{busy} now")
