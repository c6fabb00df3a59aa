"""Being asked to stop: by SIGTERM or Ctrl-C, once to end after a step that is saved, twice to end at once.

With several ranks the launcher passes the wish on in a file and not as a signal: a terminal or a scheduler may signal every
process of a job at once, and one that got it twice would die before it has saved.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipelib.files import write_text

STOP = "stop.txt"
"""In the work folder of a training with several ranks: the name of the signal that asks it to stop."""


def ask_to_stop(work: Path, number: int) -> None:
    """Have the ranks that train in `work` stop after a step, as if each had got the signal."""
    write_text(work / STOP, signal.Signals(number).name)


@contextmanager
def on_first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Within the block a first SIGTERM or Ctrl-C calls `act` with its number; a second one does what it always did.

    The system's SIGTERM for the death of the process that started this one (`tie_to_parent`) is no second one: who stops a
    whole job signals DVC, which dies of it, and the stage.
    """
    parent = os.getppid()

    def first(number: int, _: FrameType | None) -> None:
        restore()
        signal.signal(signal.SIGTERM, second)
        act(number)

    def second(number: int, _: FrameType | None) -> None:
        if os.getppid() == parent:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, first) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        restore()


class StopRequest:
    """Whether this rank knows of a wish to stop.

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
