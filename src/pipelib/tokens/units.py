"""Units of tokenization: pieces of the corpus that are encoded apart from each other, each into a file of its own.

A unit is a run of row groups of one parquet file, about 32 MB of text, and depends on that text alone. So any process
on any machine can encode it, a run that was killed goes on with the units that are missing, and a corpus that grows
keeps the units it had. A unit's file appears under its name when it is complete, and is checked before it is used:

    tokens       uint16 each; every document is led by <|endoftext|>
    lengths      uint32 a document: its tokens, <|endoftext|> included
    hashes       16 bytes a document: XXH3-128 of its text
    trailer      the counts, and XXH3-64 of everything else

Memory is bounded by a few megabytes of text, or by the longest document: rows are read in batches, and what is longer
than a piece is encoded in pieces.
"""

import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipelib.corpus.raw import RawFile, damaged, open_parquet
from pipelib.errors import UserError, how_to_repair
from pipelib.files import sha256_file, write_atomic
from pipelib.model.vocabulary import EOT_TOKEN_ID
from pipelib.tokens.encoding import Engine, Offsets, Texts, Tokens, prove_equal

UNIT_BYTES = 32 << 20
"""The most text of one unit, in bytes, unless a single row group has more."""
LEAST_UNITS = 16
"""Units that a smaller file is cut into, if it has as many row groups, so that every core has work."""
CHUNK_BYTES = 4 << 20
"""Text that is encoded at once, in bytes."""
PIECE_BYTES = 1 << 20
"""A longer document is encoded in pieces of about so many bytes."""
PROVED_DOCUMENTS, PROVED_BYTES = 2, 100_000
"""How many documents of every unit are compared with tiktoken, and the most bytes of each."""

_REPAIR = how_to_repair("data/raw")
_COUNTS = np.dtype(
    [("magic", "S8"), ("tokens", "<u8"), ("documents", "<u8"), ("empty_documents", "<u8"), ("text_bytes", "<u8")]
)
_TRAILER_BYTES = _COUNTS.itemsize + 8
_MAGIC = b"units 1\n"
_READ_BYTES = 1 << 22

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Unit:
    """A run of row groups of one parquet file."""

    path: Path
    sha256: str
    """Of the parquet file."""
    first_group: int
    end_group: int
    """One after the last row group."""
    rows: int
    """Rows that count; fewer than the row groups have where the corpus ends in the middle of a file."""
    text_bytes: int
    """Of the row groups, as the file says. For progress only."""

    def file(self, store: Path) -> Path:
        """Its place in a folder of units; another place for another text."""
        return store / self.sha256[:32] / f"{self.first_group:06d}-{self.end_group:06d}-{self.rows}.unit"


@dataclass(frozen=True)
class UnitCounts:
    """What a unit holds."""

    tokens: int
    documents: int
    empty_documents: int
    """Rows without text, which make no document."""
    text_bytes: int
    """Of the documents, in UTF-8."""


@dataclass
class Seconds:
    """Where the time of encoding went."""

    read: float = 0.0
    """Parquet to UTF-8, and its validation."""
    encode: float = 0.0
    """The engine alone."""
    join: float = 0.0
    """<|endoftext|> put in, documents hashed."""
    write: float = 0.0
    """Checksum and write."""


def plan_units(folder: Path, files: tuple[RawFile, ...]) -> list[Unit]:
    """Cut the files of a corpus into units, by what each file says of itself.

    Raises:
        UserError: a file is missing or damaged, has fewer rows than its manifest says, or its `text` is no text.
    """
    units: list[Unit] = []
    for file in files:
        units += _plan_file(folder / file.name, file)
    return units


def _plan_file(path: Path, file: RawFile) -> Iterator[Unit]:
    with open_parquet(path, _REPAIR) as parquet:
        kind = parquet.schema_arrow.field("text").type
        metadata = parquet.metadata
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: the column `text` holds {kind}, not strings, so there is no text; convert it.")
    if metadata.num_rows < file.rows:
        raise damaged(path, f"{metadata.num_rows} rows where the manifest says {file.rows}", _REPAIR)
    column = metadata.schema.to_arrow_schema().names.index("text")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [group.column(column).total_uncompressed_size for group in groups]
    most = min(UNIT_BYTES, sum(sizes) // LEAST_UNITS)
    rows_left, first, size, rows = file.rows, 0, 0, 0
    for number, (group, group_bytes) in enumerate(zip(groups, sizes, strict=True)):
        if rows and size + group_bytes > most:
            yield Unit(path, file.sha256, first, number, rows, size)
            first, size, rows = number, 0, 0
        taken = min(group.num_rows, rows_left)
        size, rows, rows_left = size + group_bytes, rows + taken, rows_left - taken
        if not rows_left:
            break
    if rows:
        yield Unit(path, file.sha256, first, number + 1, rows, size)


def encode_unit(unit: Unit, engine: Engine, target: Path) -> tuple[UnitCounts, Seconds]:
    """Encode a unit into its file.

    Raises:
        UserError: a row that is not text or bytes that cannot be read, with the file and the row; or the engine's tokens
            are not tiktoken's.
    """
    seconds = Seconds()
    clock = _Clock(seconds)
    checksum = xxhash.xxh3_64()
    lengths: list[npt.NDArray[np.uint32]] = []
    hashes: list[bytes] = []
    tokens = text_bytes = 0

    def write(file: IO[bytes], data: bytes | memoryview) -> None:
        file.write(data)
        checksum.update(data)

    with write_atomic(target, durable=False) as file:
        for batch in read_texts(unit):
            clock.add("read")
            if not lengths:
                prove_equal(engine, _short_texts(batch))
            batch_lengths = np.ones(len(batch), np.uint32)
            for chunk in chunks(batch):
                clock.add("join")
                encoded, offsets = engine.encode(chunk.texts)
                clock.add("encode")
                np.add.at(batch_lengths, chunk.document, np.diff(offsets).astype(np.uint32))
                joined = _lead_documents(encoded, offsets[:-1][chunk.leads])
                tokens += len(joined)
                clock.add("join")
                write(file, joined.astype("<u2", copy=False).data)
                clock.add("write")
            lengths.append(batch_lengths)
            hashes += hash_texts(batch)
            text_bytes += len(batch.data)
            clock.add("join")
        write(file, b"".join(length.astype("<u4", copy=False).tobytes() for length in lengths))
        write(file, b"".join(hashes))
        counts = UnitCounts(tokens, len(hashes), unit.rows - len(hashes), text_bytes)
        write(file, np.array([(_MAGIC, *astuple(counts))], _COUNTS).tobytes())
        file.write(checksum.digest())
    clock.add("write")
    return counts, seconds


class _Clock:
    """Adds the time since it was last asked to one of the steps."""

    def __init__(self, seconds: Seconds) -> None:
        self._seconds, self._last = seconds, perf_counter()

    def add(self, step: str) -> None:
        now = perf_counter()
        setattr(self._seconds, step, getattr(self._seconds, step) + now - self._last)
        self._last = now


def _short_texts(texts: Texts) -> Iterator[str]:
    """The first documents that are short enough for the reference."""
    for index in np.flatnonzero(np.diff(texts.offsets) <= PROVED_BYTES)[:PROVED_DOCUMENTS].tolist():
        yield from Texts(texts.data, texts.offsets[index : index + 2])


def _lead_documents(tokens: Tokens, starts: Offsets) -> Tokens:
    """The tokens with <|endoftext|> put in before each of the given places."""
    joined = np.empty(len(tokens) + len(starts), np.uint16)
    is_token = np.ones(len(joined), bool)
    is_token[starts + np.arange(len(starts))] = False
    joined[is_token] = tokens
    joined[~is_token] = EOT_TOKEN_ID
    return joined


def hash_texts(texts: Texts) -> list[bytes]:
    """XXH3-128 of each text, 16 bytes each."""
    data = texts.data.data
    return [xxhash.xxh3_128_digest(data[start:end]) for start, end in pairwise(texts.offsets.tolist())]


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_texts(unit: Unit) -> Iterator[Texts]:
    """The documents of a unit in batches of a few megabytes, or of one document where it is longer; rows without text are
    left out.

    Raises:
        UserError: bytes that cannot be read or are not UTF-8, with the file and the row.
    """
    row = 0
    try:
        with pq.ParquetFile(unit.path, buffer_size=_READ_BYTES) as parquet:
            row = sum(parquet.metadata.row_group(group).num_rows for group in range(unit.first_group)) + 1
            left = unit.rows
            for batch in _record_batches(parquet, unit):
                texts = _texts_of(batch.column(0).slice(0, left), unit.path, row)
                row, left = row + len(batch), left - len(batch)
                if len(texts):
                    yield texts
                if left <= 0:
                    return
    except (pa.ArrowException, OSError) as error:
        raise damaged(unit.path, f"from row {row} on: {error}", _REPAIR) from None


def _record_batches(parquet: pq.ParquetFile, unit: Unit) -> Iterator[pa.RecordBatch]:
    """The column `text` in batches of about CHUNK_BYTES, by the average length of each row group's texts."""
    rows_and_bytes = parquet.metadata
    column = parquet.schema_arrow.names.index("text")
    for number in range(unit.first_group, unit.end_group):
        group = rows_and_bytes.row_group(number)
        average = max(1, group.column(column).total_uncompressed_size // max(1, group.num_rows))
        rows = max(1, min(CHUNK_BYTES // average, group.num_rows))
        yield from parquet.iter_batches(rows, row_groups=[number], columns=["text"], use_threads=False)


def _texts_of(column: pa.Array, path: Path, row: int) -> Texts:
    """The texts of a batch that are not null or empty.

    Raises:
        UserError: one is not UTF-8; `row` is the number of the batch's first row, for the message.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        wrong = next(
            index for index, value in enumerate(column.cast(pa.large_binary())) if not _is_utf8(value.as_py() or b"")
        )
        raise UserError(
            f"{path}, row {row + wrong}: the text is not UTF-8, so it cannot be encoded; {_REPAIR}."
        ) from None
    strings = column.drop_null().cast(pa.large_string())
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1] if offsets else [0]
    first, last = int(ends[0]), int(ends[-1])
    bounds = np.append(ends[:-1][np.diff(ends) > 0], last) - first  # an empty text takes no bytes
    whole = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
    return Texts(whole[first:last], bounds)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# ---- Long documents --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Texts that are encoded at once, long ones in pieces."""

    texts: Texts
    document: npt.NDArray[np.int64]
    """The document that each piece is of (pieces,)."""
    leads: npt.NDArray[np.bool_]
    """Whether a document begins with it (pieces,)."""


def chunks(texts: Texts) -> Iterator[Chunk]:
    """All texts, about CHUNK_BYTES at a time."""
    offsets, document = _pieces(texts)
    leads = np.diff(document, prepend=-1) > 0
    start = 0
    while start < len(document):
        end = max(start + 1, int(np.searchsorted(offsets, offsets[start] + CHUNK_BYTES, "right")) - 1)
        first, last = offsets[start], offsets[end]
        pieces = Texts(texts.data[first:last], offsets[start : end + 1] - first)
        yield Chunk(pieces, document[start:end], leads[start:end])
        start = end


def _pieces(texts: Texts) -> tuple[Offsets, npt.NDArray[np.int64]]:
    """Where every piece starts, and the document it is of; most documents are one piece."""
    lengths = np.diff(texts.offsets)
    cuts = [
        _cuts(texts.data, *texts.offsets[index : index + 2].tolist()) for index in np.flatnonzero(lengths > PIECE_BYTES)
    ]
    document = np.arange(len(texts), dtype=np.int64)
    if not any(cuts):
        return texts.offsets, document
    pieces = np.ones(len(texts), np.int64)
    pieces[lengths > PIECE_BYTES] += [len(places) for places in cuts]
    offsets = np.sort(np.concatenate([texts.offsets, *(np.array(places, np.int64) for places in cuts)]))
    return offsets, np.repeat(document, pieces)


def _cuts(data: npt.NDArray[np.uint8], start: int, end: int) -> list[int]:
    """Where a long text can be cut, about every PIECE_BYTES, without changing a token.

    GPT-2 splits text into words before it merges bytes, and a word that white space follows ends there whatever comes:
    so a cut between a printable ASCII character and a space or a line feed leaves every word whole, and what comes after
    does not look back. A text without one is one piece.
    """
    places: list[int] = []
    at = start + PIECE_BYTES
    while at < end:
        window = data[at - 1 : min(end, at + PIECE_BYTES)]
        before, after = window[:-1], window[1:]
        found = np.flatnonzero((before > 0x20) & (before < 0x7F) & ((after == 0x20) | (after == 0x0A)))
        if len(found):
            places.append(at + int(found[0]))
            at = places[-1] + PIECE_BYTES
        else:
            at += PIECE_BYTES
    return places


# ---- Files of units --------------------------------------------------------------------------------------------------


def read_counts(path: Path) -> UnitCounts | None:
    """The counts in a unit's file; None where there is none, or one of another length than the counts say."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TRAILER_BYTES))
            (numbers,) = np.frombuffer(file.read(_COUNTS.itemsize), _COUNTS)
    except (FileNotFoundError, ValueError):  # also where it is shorter than a trailer
        return None
    magic, *counted = numbers.tolist()
    counts = UnitCounts(*counted)
    expected = 2 * counts.tokens + 20 * counts.documents + _TRAILER_BYTES
    return counts if magic == _MAGIC and size == expected else None


def check_unit(path: Path) -> UnitCounts | None:
    """The counts of a unit whose every byte is right; None for any other file, or none."""
    counts = read_counts(path)
    if counts is None:
        return None
    checksum = xxhash.xxh3_64()
    with path.open("rb") as file:
        left = path.stat().st_size - 8
        while block := file.read(min(_READ_BYTES, left)):
            checksum.update(block)
            left -= len(block)
        return counts if checksum.digest() == file.read() else None


def read_documents(path: Path, counts: UnitCounts) -> tuple[npt.NDArray[np.uint32], Hashes]:
    """The length in tokens (documents,) and the hash (documents, 2) of every document of a unit."""
    lengths = np.fromfile(path, "<u4", counts.documents, offset=2 * counts.tokens)
    hashes = np.fromfile(path, "<u8", 2 * counts.documents, offset=2 * counts.tokens + 4 * counts.documents)
    return lengths, hashes.reshape(-1, 2)


def read_tokens(path: Path, start: int, end: int) -> Iterator[Tokens]:
    """Tokens [start, end) of a unit, a few megabytes at a time."""
    for at in range(start, end, _READ_BYTES // 2):
        yield np.fromfile(path, "<u2", min(_READ_BYTES // 2, end - at), offset=2 * at)


def require_file(path: Path, sha256: str) -> None:
    """Read a parquet file and refuse it if a byte changed since the manifest beside it was written.

    Raises:
        UserError: its SHA-256 is another one.
    """
    actual = sha256_file(path)
    if actual != sha256:
        raise UserError(
            f"{path} has sha256 {actual} and its manifest says {sha256}: its bytes changed, so its text may have; {_REPAIR}."
        )
