"""Send to MLflow what it has not: the records of runs that ended while it was away, without anything twice."""

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
"""What MLflow has of a record. BUSY: the stage is running, or another `pipelib track` sends it."""


@dataclass(frozen=True)
class Replayed:
    """What became of one record."""

    had: str
    """What MLflow had of it before: ALL, PART, ..."""
    points: int = 0
    files: int = 0
    gone: tuple[str, ...] = ()
    """Files that can be sent no more."""
    whole: bool = True
    """Whether MLflow takes files; else they are missing there."""


@contextmanager
def held(record: Path) -> Iterator[bool]:
    """Be the only process that sends a record while the block lasts; False where another one does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(record, own=False))
        except InUseError:
            yield False
        else:
            yield True


def opened(events: Sequence[Event]) -> Event | None:
    """What the run is: the last `open` event, with the time `began` of the first; None in a record that was only begun."""
    found = [event for event in events if event["event"] == "open"]
    return {**found[-1], "began": found[0]["time"]} if found else None


def had_of(store: Store, events: Sequence[Event], size: int) -> str:
    """What MLflow has of a record that nobody sends now.

    Args:
        size: of its whole lines, in bytes.
    """
    begun = opened(events)
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
        return PART  # `mlflow gc` removed it; sent again, the run gets a new one
    if parent.info.lifecycle_stage == "deleted":
        return DELETED
    return ALL if run.data.tags.get(SENT) == str(size) else PART


def replay_record(
    store: Store, record: Path, deleted_too: bool = False, begin: Callable[[], object] = bool
) -> Replayed:
    """Send what of a record MLflow has not; what the user deleted there stays deleted, unless asked for.

    Args:
        begin: called before anything is sent.
    """
    with held(record) as mine:
        if not mine:
            return Replayed(BUSY)
        events, size = read_events(record)
        had = had_of(store, events, size)
        begun = opened(events)
        if begun is None or had == ALL or (had == DELETED and not deleted_too):
            return Replayed(had)
        begin()
        view = MlflowRun(store, begun)
        view.complete(events)
        view.mark_sent(size)
        return Replayed(had, view.points_sent, view.files_sent, tuple(view.files_gone), view.takes_files)


def replay_others(store: Store, record: Path) -> None:
    """Send what is missing of the other stages of a run: they may have been too short for MLflow, or it was away."""
    for other in sorted(record.parent.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        if other != record:
            try:
                replay_record(store, other)
            except DeletedRun:
                continue
            except Exception as error:  # nothing of the stage's own
                say(
                    f"MLflow did not take {other.stem} ({brief(error)}), so not all of that stage is there; "
                    f"`pipelib track --replay {other.parent.name}` sends it again."
                )


def settle_parents(store: Store, folder: Path) -> None:
    """Have the parents of a run's records show how the last of their stages ended; nothing while one is running."""
    last: dict[str, tuple[Event, Event]] = {}
    for record in folder.glob("*.jsonl"):
        with held(record) as mine:
            if not mine:
                return
        events, _ = read_events(record)
        begun, ends = opened(events), [event for event in events if event["event"] == "end"]
        if begun and ends:
            inputs = str(begun["inputs"])
            if inputs not in last or last[inputs][1]["time"] < ends[-1]["time"]:
                last[inputs] = (begun, ends[-1])
    for inputs, (begun, end) in last.items():
        parent: Any = store.find(pipelib__key=begun["key"], pipelib__inputs=inputs, pipelib__stage="pipeline")
        if parent:
            set_status(store.client, str(parent.info.run_id), end)
