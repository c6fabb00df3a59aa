"""Mirror a record to MLflow from a background thread.

The thread reads the record as it grows and sends it to MLflow. The file is the queue, so nothing is dropped: what a kill or a
dead server left unsent is sent by the run's next stage, or by `pipelib track --replay`. The stage waits for the thread only
once, at its end, and at most a second if MLflow is a server.
"""

import threading
from pathlib import Path

from pipelib.tracking.mlflow_run import DeletedRun, MlflowRun
from pipelib.tracking.mlflow_store import TrackingUri, failure
from pipelib.tracking.record import read_events, say
from pipelib.tracking.replay import open_event, replay_others
from pipelib.workspace.locks import locked

POLL_SECONDS = 1.0
"""Between two reads of the record. All points of that time are sent in one call."""
COOLDOWN_SECONDS = 60.0
"""Wait after a failure before the server is tried again."""

THREAD = "mlflow-mirror"


def is_mirroring() -> bool:
    """Whether a thread of this process is still busy with MLflow."""
    return any(thread.name == THREAD for thread in threading.enumerate())


class Mirror:
    """Send a record to MLflow from a daemon thread.

    After a failure, the thread waits a minute, then compares what MLflow has with the record and sends the difference.
    Importing MLflow takes some seconds; the thread does it while the stage works.
    """

    def __init__(self, record: Path, start: int, tracking_uri: TrackingUri) -> None:
        """Args:
        record: the file to follow.
        start: its size in bytes before this process opened it. Earlier events may be in MLflow already.
        """
        self._record, self._start, self._tracking_uri = record, start, tracking_uri
        self._wait = tracking_uri.wait_seconds
        self._closing = threading.Event()
        self._said = False
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    def start(self) -> None:
        """Start the thread; return at once."""
        self._thread.start()

    def close(self) -> None:
        """Wait until everything is sent, up to the time limit; report if something is left."""
        self._closing.set()
        self._thread.join(self._wait)
        if self._thread.is_alive():
            self._complain(f"did not take all of this run within {self._wait:g} s of its end")
        self._said = True

    def _work(self) -> None:
        with locked(
            self._record, wait=True, quiet=True, own=False
        ):  # so that `pipelib track --replay` skips this record
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
                # At the end, try a local database once more: it may no longer be locked. Do not try a failed server again.
                if last_try or (self._closing.wait(COOLDOWN_SECONDS) and not self._tracking_uri.is_local):
                    return

    def _follow(self) -> None:
        """Connect and send until the stage has ended."""
        store = self._tracking_uri.open()
        begun = open_event(read_events(self._record)[0])
        assert begun is not None, f"{self._record} has no open event"
        view = MlflowRun(store, begun)
        events, offset = read_events(self._record, 0, self._start)
        view.send(events, replay=True)
        others_sent = False
        while True:
            closing = self._closing.is_set()  # read before the events, so that nothing written before close is missed
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
        """Report a failure and how to send the rest; only the first one, since it explains the later ones."""
        if not self._said:
            self._said = True
            key = self._record.parent.name
            say(
                f"MLflow at {self._tracking_uri.uri} {what}, so the rest of this run is only in {self._record} for now; the "
                f"stage continues, and nothing is lost: `pipelib track --replay {key}` sends it later."
            )
