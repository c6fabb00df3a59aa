"""The file of an encoded unit: its tokens, and what is needed to leave out duplicate documents later.

    tokens       uint16 each, or uint32 if the vocabulary needs it; every document begins with the end token
    lengths      uint32 per document: its number of tokens, <|endoftext|> included
    sizes        uint32 per document: the UTF-8 bytes of its text
    hashes       16 bytes per document: XXH3-128 of its text
    trailer      the counts, and XXH3-64 of all of the above and of the unit's identity

A file appears under its name when it is complete. It is not synced, so its checksum is verified before each use.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import xxhash

from pipelib.files import write_atomic
from pipelib.vocabulary.tokenizer import Tokens

_COUNTS = np.dtype(
    [("magic", "S8"), ("tokens", "<u8"), ("documents", "<u8"), ("empty_documents", "<u8"), ("text_bytes", "<u8")]
)
_MAGIC = b"units 2\n"
_TRAILER_BYTES = _COUNTS.itemsize + 8
_BLOCK = 1 << 22

Lengths = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class UnitCounts:
    """The counts of a unit."""

    tokens: int = 0
    documents: int = 0
    empty_documents: int = 0
    """Rows without text. They do not become documents."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""


class UnitWriter:
    """Writes a unit's file. Use `write_unit` to make one."""

    def __init__(self, file: IO[bytes], identity: str) -> None:
        self._file, self._checksum = file, xxhash.xxh3_64(identity.encode())
        self._lengths: list[Lengths] = []
        self._sizes: list[Lengths] = []
        self._hashes: list[bytes] = []
        self._tokens = 0

    def add_tokens(self, tokens: Tokens) -> None:
        """Append tokens."""
        self._tokens += len(tokens)
        self._write(tokens.data)

    def add_documents(self, lengths: Lengths, sizes: Lengths, hashes: Sequence[bytes]) -> None:
        """Record the documents whose tokens were appended."""
        self._lengths.append(lengths)
        self._sizes.append(sizes)
        self._hashes += hashes

    def finish(self, empty_documents: int, text_bytes: int) -> UnitCounts:
        """Write everything that follows the tokens."""
        counts = UnitCounts(self._tokens, len(self._hashes), empty_documents, text_bytes)
        for numbers in (*self._lengths, *self._sizes):
            self._write(numbers.astype("<u4", copy=False).data)
        self._write(b"".join(self._hashes))
        self._write(np.array([(_MAGIC, *astuple(counts))], _COUNTS).tobytes())
        self._file.write(self._checksum.digest())
        return counts

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._checksum.update(data)


@contextmanager
def write_unit(path: Path, identity: str) -> Iterator[UnitWriter]:
    """Open a unit's file for writing. It appears when the block ends without an error.

    Args:
        identity: identifies the text of the unit. It is part of the checksum, so a file of another text never passes.
    """
    # No sync: it would slow down encoding, and the checksum reveals a file that a power cut damaged.
    with write_atomic(path, durable=False) as file:
        yield UnitWriter(file, identity)


def check_unit(path: Path, identity: str) -> UnitCounts | None:
    """Return the counts of a unit if every byte of its file is right; None if not, or if there is no file."""
    counts = read_counts(path)
    if counts is None:
        return None
    checksum = xxhash.xxh3_64(identity.encode())
    with path.open("rb") as file:
        left = path.stat().st_size - 8  # the checksum itself is the last 8 bytes
        while block := file.read(min(_BLOCK, left)):
            checksum.update(block)
            left -= len(block)
        return counts if checksum.digest() == file.read() else None


def read_counts(path: Path) -> UnitCounts | None:
    """Read the counts in the trailer; None if they do not match the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TRAILER_BYTES))
            (numbers,) = np.frombuffer(file.read(_COUNTS.itemsize), _COUNTS)
    except (FileNotFoundError, ValueError):  # ValueError: the file is shorter than a trailer
        return None
    magic, *counted = numbers.tolist()
    counts = UnitCounts(*counted)
    return counts if magic == _MAGIC and size in (_size(counts, 2), _size(counts, 4)) else None


def _size(counts: UnitCounts, token_bytes: int) -> int:
    """Return the size of a unit's file. 24 = 4 for a document's length + 4 for its size + 16 for its hash."""
    return token_bytes * counts.tokens + 24 * counts.documents + _TRAILER_BYTES


def _token_bytes(path: Path, counts: UnitCounts) -> int:
    """Return the bytes of a token in a file, which its size shows."""
    return 4 if path.stat().st_size == _size(counts, 4) else 2


def read_tokens(path: Path, counts: UnitCounts, start: int, end: int) -> Iterator[Tokens]:
    """Yield tokens [start, end) of a unit, a few megabytes at a time."""
    width = _token_bytes(path, counts)
    for at in range(start, end, _BLOCK // width):
        yield np.fromfile(path, f"<u{width}", min(_BLOCK // width, end - at), offset=width * at)


def read_documents(path: Path, counts: UnitCounts) -> tuple[Lengths, Hashes]:
    """Return the length in tokens (documents,) and the hash (documents, 2) of every document of a unit."""
    start = _token_bytes(path, counts) * counts.tokens
    lengths = np.fromfile(path, "<u4", counts.documents, offset=start)
    hashes = np.fromfile(path, "<u8", 2 * counts.documents, offset=start + 8 * counts.documents)
    return lengths, hashes.reshape(-1, 2)


def read_sizes(path: Path, counts: UnitCounts) -> Lengths:
    """Return the UTF-8 bytes of every document of a unit (documents,)."""
    start = _token_bytes(path, counts) * counts.tokens + 4 * counts.documents
    return np.fromfile(path, "<u4", counts.documents, offset=start)
