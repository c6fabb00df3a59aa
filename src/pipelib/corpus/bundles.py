"""Share files out among processes: large files are cut into slices, and slices are put together in bundles of about equal size.

Slices and bundles depend on the files alone, so any number of processes makes the same documents.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any, NamedTuple

from pipelib.corpus.local_files import saved_parts
from pipelib.corpus.local_formats import WHOLE, Reading, Slice
from pipelib.corpus.params import PACKED
from pipelib.corpus.parquet import open_parquet, text_column
from pipelib.errors import UserError

BUNDLE_BYTES = 64 << 20
"""Bytes of text in a bundle, about. A process reads them in about the time in which another one starts."""
_UNPACKED = 5
"""Bytes of text in a byte of a compressed file, about."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileSlice:
    """A slice of one of the files."""

    name: str
    slice: Slice
    text_bytes: int
    """The bytes of its text, about."""


Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]
"""Calls a function for each of some arguments, on all cores, and yields the results in order."""


def bundles_of(root: Path, names: Sequence[str], reading: Reading, run: Run) -> Iterator[list[FileSlice]]:
    """Yield the bundles of some files, in order."""
    bundle: list[FileSlice] = []
    size = 0
    for name in names:
        for file_slice in _slices_of(root / name, name, reading, run):
            bundle.append(file_slice)
            size += file_slice.text_bytes
            if size >= BUNDLE_BYTES:
                yield bundle
                bundle, size = [], 0
    if bundle:
        yield bundle


def useful_processes(size: int) -> int:
    """Return how many processes so many bytes of text keep busy: about one for each bundle."""
    return max(1, -(-size // BUNDLE_BYTES))


def text_bytes(path: Path) -> int:
    """Return the bytes of a file's text, about."""
    size = sum(part.stat().st_size for part in [path, *saved_parts(path)])
    return size * _UNPACKED if path.name.lower().endswith((*PACKED, ".parquet")) else size


def _slices_of(path: Path, name: str, reading: Reading, run: Run) -> list[FileSlice]:
    """Return the slices of a file. It has one, unless it is large and of a kind whose rows can be found."""
    size, ending = text_bytes(path), path.suffix.lower()
    cuts: list[_Cut] = []
    if size > BUNDLE_BYTES and ending == ".parquet":
        cuts = _row_groups(path, str(reading.text_column))
    # in other encodings, a byte of a line end may be part of a character
    if size > BUNDLE_BYTES and ending in (".jsonl", ".ndjson") and reading.decoding.encoding == "utf-8":
        cuts = _lines(path, size, run)
    if len(cuts) < 2:
        return [FileSlice(name, WHOLE, size)]
    ends = [*(cut.start for cut in cuts[1:]), None]
    before = accumulate((cut.rows for cut in cuts[:-1]), initial=0)
    return [
        FileSlice(name, Slice(cut.start, end, rows), cut.text_bytes)
        for cut, end, rows in zip(cuts, ends, before, strict=True)
    ]


class _Cut(NamedTuple):
    start: int
    rows: int
    text_bytes: int


def _row_groups(path: Path, column: str) -> list[_Cut]:
    """Cut a parquet file at row groups."""
    cuts: list[_Cut] = []
    with suppress(UserError), open_parquet(path, column=column) as parquet:  # the error is for who reads the file
        for group in range(parquet.num_row_groups):
            if not cuts or cuts[-1].text_bytes >= BUNDLE_BYTES:
                cuts.append(_Cut(group, 0, 0))
            start, rows, size = cuts[-1]
            size += text_column(parquet.metadata, group, column).total_uncompressed_size
            cuts[-1] = _Cut(start, rows + parquet.metadata.row_group(group).num_rows, size)
    return cuts


def _lines(path: Path, size: int, run: Run) -> list[_Cut]:
    """Cut a text file at line ends, and count its lines, since rows are named by their numbers."""
    starts = [0]
    with path.open("rb") as file:
        while starts[-1] + BUNDLE_BYTES < size:
            file.seek(starts[-1] + BUNDLE_BYTES)
            file.readline()
            starts.append(file.tell())
    ends = [*starts[1:], size]
    rows = run(_count_lines, zip(repeat(path), starts, ends))
    return [
        _Cut(start, count, end - start) for start, end, count in zip(starts, ends, rows, strict=True) if start < end
    ]


def _count_lines(path: Path, start: int, end: int) -> int:
    """Count the lines between two bytes as Python's text files do: they end at \\n, \\r\\n or \\r."""
    count, before = 0, b""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(_BLOCK, end - file.tell())):
            block = before + block
            before = block[-1:] if block.endswith(b"\r") else b""  # it may be followed by \n
            block = block.removesuffix(b"\r")
            count += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
    return count + len(before)
