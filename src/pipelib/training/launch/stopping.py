"""Being asked to stop, by a signal (`pipelib.processes.on_first_signal`): a training ends after a step that is saved.

With several ranks the launcher passes the request on in a file and not as a signal: a terminal or a scheduler may signal
every process of a job at once, and one that got SIGTERM twice would die before it has saved.
"""

import signal
from pathlib import Path

from pipelib.files import write_text

STOP = "stop.txt"
"""In the work folder of a training with several ranks: the name of the signal that asks it to stop."""


def ask_to_stop(work: Path, number: int) -> None:
    """Have the ranks that train in `work` stop after a step, as if each had got the signal."""
    write_text(work / STOP, signal.Signals(number).name)


class StopRequest:
    """Whether this rank has been asked to stop.

    Args:
        work: where `ask_to_stop` leaves one; None where there is nobody else to ask.
    """

    def __init__(self, work: Path | None) -> None:
        self._file = work and work / STOP
        self._signal = 0

    def note(self, number: int) -> None:
        """Be asked by a signal."""
        self._signal = number

    def signal(self) -> int:
        """The signal that asked; 0 where none did."""
        if not self._signal and self._file and self._file.exists():
            self._signal = signal.Signals[self._file.read_text(encoding="utf-8")]
        return self._signal
