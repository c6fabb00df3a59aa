"""Send to MLflow the records that it lacks, because it was unreachable while they ran. Nothing is sent twice."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelib.tracking.mlflow_run import SENT, DeletedRun, Event, MlflowRun, set_status
from pipelib.tracking.mlflow_store import Store
from pipelib.tracking.record import brief, read_events, say
from pipelib.workspace.locks import InUseError, locked

ALL, PART, NOTHING, DELETED, BUSY = "all of it", "a part", "nothing", "deleted there", "being sent"
"""How much of a record MLflow has. BUSY: the stage is running, or another `pipelib track` sends the record."""


@dataclass(frozen=True)
class ReplayResult:
    """The result of sending one record."""

    before: str
    """How much MLflow had before: ALL, PART, ..."""
    points: int = 0
    files: int = 0
    missing_files: tuple[str, ...] = ()
    """Files that are no longer on disk."""
    complete: bool = True
    """Whether MLflow has everything; False if it refuses files."""


@contextmanager
def exclusive(record: Path) -> Iterator[bool]:
    """Lock a record, so that only this process sends it; yields False if another process has the lock."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(record, own=False))
        except InUseError:
            yield False
        else:
            yield True


def open_event(events: Sequence[Event]) -> Event | None:
    """The last `open` event, with the time `began` of the first; None if the record has none yet."""
    found = [event for event in events if event["event"] == "open"]
    return {**found[-1], "began": found[0]["time"]} if found else None


def sent_state(store: Store, events: Sequence[Event], size: int) -> str:
    """How much MLflow has of a record that no other process sends now.

    Args:
        size: size of its complete lines in bytes.
    """
    begun = open_event(events)
    if begun is None:
        return ALL
    run = store.find(pipelib__record=begun["record"])
    if run is None:
        return DELETED if store.find(deleted=True, pipelib__record=begun["record"]) else NOTHING
    try:
        parent = store.client.get_run(run.data.tags.get("mlflow.parentRunId", ""))
    except Exception as error:
        if getattr(error, "error_code", None) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return PART  # `mlflow gc` removed the parent; sending again creates a new one
    if parent.info.lifecycle_stage == "deleted":
        return DELETED
    return ALL if run.data.tags.get(SENT) == str(size) else PART


def replay_record(
    store: Store, record: Path, deleted_too: bool = False, begin: Callable[[], object] = bool
) -> ReplayResult:
    """Send what MLflow lacks of a record.

    Args:
        deleted_too: also send a run that the user deleted in MLflow.
        begin: called before anything is sent.
    """
    with exclusive(record) as mine:
        if not mine:
            return ReplayResult(BUSY)
        events, size = read_events(record)
        before = sent_state(store, events, size)
        begun = open_event(events)
        if begun is None or before == ALL or (before == DELETED and not deleted_too):
            return ReplayResult(before)
        begin()
        view = MlflowRun(store, begun)
        view.complete(events)
        view.mark_sent(size)  # last: after a kill before this, the next replay compares again
        return ReplayResult(before, view.points_sent, view.files_sent, tuple(view.files_gone), view.accepts_files)


def replay_others(store: Store, record: Path) -> None:
    """Send what MLflow lacks of the run's other stages: they may have ended too soon for it, or it was unreachable."""
    for other in sorted(record.parent.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        if other != record:
            try:
                replay_record(store, other)
            except DeletedRun:
                continue
            except Exception as error:  # does not concern the stage's own record
                say(
                    f"MLflow did not accept {other.stem} ({brief(error)}), so part of that stage is missing there; "
                    f"`pipelib track --replay {other.parent.name}` sends it again."
                )


def end_parents(store: Store, folder: Path) -> None:
    """Give the parents of a run's records the status of the stage that ended last, unless a stage is still running."""
    last: dict[str, tuple[Event, Event]] = {}
    for record in folder.glob("*.jsonl"):
        with exclusive(record) as mine:
            if not mine:
                return  # still running, or being sent by another process
        events, _ = read_events(record)
        begun, ends = open_event(events), [event for event in events if event["event"] == "end"]
        if begun and ends:
            inputs = str(begun["inputs"])
            if inputs not in last or last[inputs][1]["time"] < ends[-1]["time"]:
                last[inputs] = (begun, ends[-1])
    for inputs, (begun, end) in last.items():
        parent: Any = store.find(pipelib__key=begun["key"], pipelib__inputs=inputs, pipelib__stage="pipeline")
        if parent:
            set_status(store.client, str(parent.info.run_id), end)
