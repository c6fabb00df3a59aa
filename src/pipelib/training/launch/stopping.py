"""Stop on a signal (`pipelib.processes.on_first_signal`): a training finishes its step, saves a checkpoint and ends.

With several ranks, the launcher passes the request on in a file, not as a signal. A terminal or a scheduler may signal every
process of a job at once, and a rank that got SIGTERM twice would die before it has saved.
"""

import signal
from pathlib import Path

from pipelib.files import write_text

STOP = "stop.txt"
"""A file in the work folder of a training with several ranks: the name of the signal that asks it to stop."""


def ask_to_stop(work: Path, number: int) -> None:
    """Ask the ranks that train in `work` to stop after a step, as if each had got the signal."""
    write_text(work / STOP, signal.Signals(number).name)


class StopRequest:
    """Whether this rank has been asked to stop.

    Args:
        work: the folder in which `ask_to_stop` writes its file; None if this process is the only rank.
    """

    def __init__(self, work: Path | None) -> None:
        self._file = work and work / STOP
        self._signal = 0

    def note(self, number: int) -> None:
        """Note that this process got a signal."""
        self._signal = number

    def signal(self) -> int:
        """The signal that asked to stop; 0 if none did."""
        if not self._signal and self._file and self._file.exists():
            self._signal = signal.Signals[self._file.read_text(encoding="utf-8")]
        return self._signal
