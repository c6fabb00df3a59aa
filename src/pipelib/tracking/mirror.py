"""MLflow's view of a record, kept by a thread that nothing waits for.

The thread reads the record as it grows and repeats it to MLflow, so the file is the queue: nothing is dropped, and what a
kill or a dead server left unsent is sent by the run's next stage, or by `pipelib track --replay`. The stage itself makes
one call that waits: at its end, for the thread, for a second where MLflow is a server.
"""

import threading
from pathlib import Path

from pipelib.tracking.mlflow_run import DeletedRun, MlflowRun
from pipelib.tracking.mlflow_store import Place, failure
from pipelib.tracking.record import read_events, say
from pipelib.tracking.replay import opened, replay_others
from pipelib.workspace.locks import locked

POLL_SECONDS = 1.0
"""Between two looks at the record; points of one second travel in one call."""
COOLDOWN_SECONDS = 60.0
"""The mirror leaves a server alone for so long after it failed."""

THREAD = "mlflow-mirror"


def is_mirroring() -> bool:
    """Whether a thread of this process is busy with MLflow, wanted or not."""
    return any(thread.name == THREAD for thread in threading.enumerate())


class Mirror:
    """Keeps MLflow equal to a record, from a daemon thread.

    A server that fails is left alone for a minute, then everything is compared: what it has and the record's rest tell what
    to send. MLflow takes some seconds to import; that happens in the thread, beside the work.
    """

    def __init__(self, record: Path, start: int, place: Place) -> None:
        """Args:
        record: the file to follow.
        start: its size in bytes before it was opened this time; `close` lets everything before and after be sent.
        """
        self._record, self._start, self._place = record, start, place
        self._wait = place.wait_seconds
        self._closing = threading.Event()
        self._said = False
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Wait until everything is sent, but no longer than allowed; say so if something is left."""
        self._closing.set()
        self._thread.join(self._wait)
        if self._thread.is_alive():
            self._complain(f"did not take all of this run within {self._wait:g} s of its end")
        self._said = True

    def _work(self) -> None:
        with locked(
            self._record, wait=True, quiet=True, own=False
        ):  # `pipelib track --replay` leaves this record to us
            while True:
                last_try = self._closing.is_set()
                try:
                    self._follow()
                    return
                except DeletedRun:
                    self._complain("shows this run as deleted by you")
                    return
                except Exception as error:
                    self._complain(f"failed {failure(error)}")
                # A database that was locked may be free at the end; a server that failed is not asked for a last time.
                if last_try or (self._closing.wait(COOLDOWN_SECONDS) and not self._place.is_local):
                    return

    def _follow(self) -> None:
        """Connect and send until the stage has ended."""
        store = self._place.open()
        begun = opened(read_events(self._record)[0])
        assert begun is not None, f"{self._record} was not opened"
        view = MlflowRun(store, begun)
        events, offset = read_events(self._record, 0, self._start)
        view.send(events, replay=True)
        others_sent = False
        while True:
            closing = self._closing.is_set()  # asked first: what was written before close is seen below
            events, offset = read_events(self._record, offset)
            view.send(events, replay=False)
            if closing:
                view.mark_sent(offset)
            if not others_sent:
                others_sent = True
                replay_others(store, self._record)
            if closing:
                return
            self._closing.wait(POLL_SECONDS)

    def _complain(self, what: str) -> None:
        """Say once what MLflow did and how to send the rest; the first failure explains the later ones."""
        if not self._said:
            self._said = True
            key = self._record.parent.name
            say(
                f"MLflow at {self._place.uri} {what}, so the rest of this run is only in {self._record} for now; the stage goes "
                f"on, and nothing is lost: `pipelib track --replay {key}` sends it later."
            )
