"""A curve of a training: rows of numbers in a CSV file, cut back when the training resumes from an earlier step."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from pipelib.files import write_text


def rows_up_to(text: str, step: int) -> str:
    """The content of a curve's file, with its rows up to `step` only. A half-written last line is dropped."""
    header, *lines = text.split("\n")
    # After the last newline comes an empty string or a half-written line: both are dropped.
    rows = [line for line in lines[:-1] if int(line.split(",", 1)[0]) <= step]
    return "\n".join([header, *rows]) + "\n"


class Curve:
    """A CSV file of numbers; the first column is the step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)

    def resume(self, step: int) -> None:
        """Truncate to the rows up to `step`; a fresh run starts empty. A half-written last line is dropped."""
        self.cut(step or -1)

    def cut(self, step: int) -> None:
        """Keep only the rows up to `step`."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ",".join(self.columns)
        write_text(self.path, rows_up_to(text, step))

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

    def rows(self) -> list[dict[str, float]]:
        """The rows by column, of a curve that holds numbers; empty cells are left out."""
        with self.path.open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def last(self) -> dict[str, float]:
        """The last row by column; empty if there is none."""
        return (self.rows() or [{}])[-1]
