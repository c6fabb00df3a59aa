"""A line of progress: done, rate, time left. A terminal shows one line in place; a log gets a line every ten seconds."""

import os
import sys
import threading
import time

from pipelib.files import format_bytes


class Progress:
    """The progress of one long step, printed to standard error. Threads may share it.

    Args:
        label: what is being done.
        total: how many units there are; None if unknown.
        unit: what is counted, in the plural; bytes are printed as MB and GB.
        before: units that an earlier run finished; they count as done, but not for the rate.
    """

    def __init__(self, label: str, total: int | None, unit: str, before: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = before
        self.note = ""
        """Printed at the end of the line."""
        self.started = time.monotonic()
        # A dumb terminal cannot rewrite a line.
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._printed = -float("inf") if self._terminal or before else self.started  # no line of zeros in a log
        self._period = 0.2 if self._terminal else 10.0
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        """Count `count` more units, and print if the last line is old enough."""
        with self._lock:
            self.done += count
            # Printing every call would fill a log, and slow down the work.
            if time.monotonic() - self._printed >= self._period:
                self._print()

    def close(self, result: str = "") -> None:
        """Print the last line, with `result` instead of the count if it is given."""
        seconds = time.monotonic() - self.started
        self._write(f"{self.label}: {result or self._amount(self.done)} in {format_seconds(seconds)}", last=True)

    def _print(self) -> None:
        seconds = time.monotonic() - self.started
        rate = (self.done - self._before) / seconds if seconds > 0 else 0.0
        line = f"{self.label}: {self._amount(self.done, self.total)}"
        if rate > 0:
            line += f", {format_bytes(rate) if self.unit == 'bytes' else f'{rate:,.0f}'}/s"
            if self.total:
                line += f", {format_seconds((self.total - self.done) / rate)} left"
        self._write(f"{line}, {self.note}" if self.note else line)

    def _amount(self, done: int, total: int | None = None) -> str:
        """Format how many units are done, and of how many."""
        if self.unit == "bytes":
            return f"{format_bytes(done)} of {format_bytes(total)}" if total else format_bytes(done)
        return f"{done:,} of {total:,} {self.unit}" if total else f"{done:,} {self.unit}"

    def _write(self, line: str, last: bool = False) -> None:
        end = "\n" if last or not self._terminal else ""
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
        self._printed = time.monotonic()


def format_seconds(seconds: float) -> str:
    """Format a duration: 9.5 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class StatusLine:
    """A status line that a terminal rewrites in place, with lines that stay above it."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, line: str) -> None:
        """Show the current status."""
        print(
            f"\r\x1b[K{line}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def print(self, line: str) -> None:
        """Print a line that stays above the status."""
        print(f"\r\x1b[K{line}" if self._terminal else line, file=sys.stderr, flush=True)
