"""A curve of a training: rows of numbers in a CSV file, cut back when the training resumes from an earlier step."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from pipelib.files import write_text


class Curve:
    """A CSV file of numbers; the first column is the step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)

    def resume(self, step: int) -> None:
        """Truncate to the rows up to `step`; a fresh run starts empty. A half-written last line is dropped."""
        self.cut(step or -1)

    def cut(self, step: int) -> None:
        """Keep only the rows up to `step`."""
        rows = [",".join(self.columns)]
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")
            # After the last newline comes an empty string or a half-written line: both are dropped.
            rows += [line for line in lines[1:-1] if int(line.split(",", 1)[0]) <= step]
        write_text(self.path, "\n".join(rows) + "\n")

    def append(self, rows: Sequence[Sequence[float | int | str]]) -> None:
        """Add rows. They survive the end of this process, but not a power cut: see `sync`."""
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())

    def sync(self) -> None:
        """Make the rows survive a power cut too."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def last(self) -> dict[str, float]:
        """The last row by column; empty if there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return dict(zip(self.columns, map(float, lines[-1].split(",")), strict=True)) if len(lines) > 1 else {}
