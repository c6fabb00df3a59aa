"""Units of tokenization: pieces of the corpus that are encoded independently, each into its own file.

A unit is a run of row groups of one parquet file, about 32 MB of text, and depends on that text alone. So any process
on any machine can encode it, a killed run resumes with the missing units, and a corpus that grows keeps its units.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import xxhash

from pipelib.corpus.parquet import open_parquet, text_column
from pipelib.corpus.raw import REPAIR, TEXT, RawFile, RawManifest, damaged
from pipelib.files import sha256_json
from pipelib.tokens.texts import chunks, read_texts
from pipelib.tokens.unit_file import UnitCounts, write_unit
from pipelib.vocabulary.engines import Engine, Offsets, Texts, assert_same_tokens
from pipelib.vocabulary.tokenizer import Tokens

UNIT_BYTES = 32 << 20
"""The maximum bytes of text in one unit, unless a single row group has more."""
MIN_UNITS = 16
"""A small file is cut into at least this many units, if it has enough row groups, so that every core has work."""
CHECKED_DOCUMENTS, CHECKED_BYTES = 2, 100_000
"""The first documents of every unit are compared with tiktoken: this many, and at most this many bytes of each."""


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
    """Rows that belong to the corpus: fewer than the row groups have if the corpus ends in the middle of a file."""
    text_bytes: int
    """Bytes of text as the file states them, for progress and free space. Repeated texts may be counted only once."""
    column: str = TEXT
    """The column of the text."""
    skip_bad: bool = False
    """Skip texts that are not UTF-8, and do not refuse them."""

    @property
    def identity(self) -> str:
        """Identifies the text of the unit: equal for equal text."""
        how = f" {self.column}" * (self.column != TEXT) + " skip_bad" * self.skip_bad
        return f"{self.sha256} {self.first_group} {self.end_group} {self.rows}{how}"

    def file(self, store: Path) -> Path:
        """Return the unit's file in a folder of units. Another text has another file."""
        how = f"-{sha256_json([self.column, self.skip_bad])[:8]}" if self.column != TEXT or self.skip_bad else ""
        return store / self.sha256[:32] / f"{self.first_group:06d}-{self.end_group:06d}-{self.rows}{how}.unit"


@dataclass
class Seconds:
    """The time that each step of encoding took."""

    read: float = 0.0
    """Reading parquet and validating its UTF-8."""
    encode: float = 0.0
    """The engine alone."""
    join: float = 0.0
    """Inserting end tokens, hashing documents, and comparing the engine with tiktoken."""
    write: float = 0.0
    """Computing the checksum and writing."""


@dataclass(frozen=True)
class DoneUnit:
    """A unit whose file is complete."""

    path: Path
    identity: str
    counts: UnitCounts
    seconds: Seconds | None
    """The time that each step of encoding took; None if the unit existed before."""


def plan_units(folder: Path, manifest: RawManifest) -> list[Unit]:
    """Cut the files of a corpus into units, by the metadata of each file.

    Raises:
        UserError: a file is missing or damaged, has fewer rows than its manifest says, or its column of text is not text.
    """
    units: list[Unit] = []
    for file in manifest.files:
        units += (
            replace(unit, column=manifest.text_column, skip_bad=manifest.bad_rows == "skip")
            for unit in _plan_file(folder / file.name, file, manifest.text_column)
        )
    return units


def _plan_file(path: Path, file: RawFile, column: str) -> Iterator[Unit]:
    with open_parquet(path, REPAIR, column) as parquet:
        metadata = parquet.metadata
    groups = [
        (metadata.row_group(group).num_rows, text_column(metadata, group, column).total_uncompressed_size)
        for group in range(metadata.num_row_groups)
    ]
    available = sum(rows for rows, _ in groups)
    if available < file.rows:
        raise damaged(path, f"{available} rows where the manifest says {file.rows}", REPAIR)
    max_bytes = min(UNIT_BYTES, sum(size for _, size in groups) // MIN_UNITS)
    # Collect row groups until the next one would make the unit too large.
    rows_left, first, size, rows, end = file.rows, 0, 0, 0, 0
    for number, (group_rows, group_bytes) in enumerate(groups):
        if not rows_left:  # `download.max_tokens` ends the corpus in the middle of this file
            break
        if rows and size + group_bytes > max_bytes:
            yield Unit(path, file.sha256, first, number, rows, size)
            first, size, rows = number, 0, 0
        taken = min(group_rows, rows_left)
        size, rows, rows_left, end = size + group_bytes, rows + taken, rows_left - taken, number + 1
    if rows:
        yield Unit(path, file.sha256, first, end, rows, size)


def read_unit(unit: Unit) -> Iterator[Texts]:
    """Yield the documents of a unit, a few megabytes at a time.

    Raises:
        UserError: a row is not text or cannot be read; the message names file and row.
    """
    return read_texts(unit.path, unit.first_group, unit.end_group, unit.rows, unit.column, unit.skip_bad)


def encode_unit(unit: Unit, engine: Engine, target: Path) -> tuple[UnitCounts, Seconds]:
    """Encode a unit into its file. For the errors see `read_unit` and `encode_texts`."""
    return encode_texts(read_unit(unit), unit, engine, target)


def encode_texts(texts: Iterable[Texts], unit: Unit, engine: Engine, target: Path) -> tuple[UnitCounts, Seconds]:
    """Encode the documents of a unit into its file.

    Args:
        texts: what `read_unit` yields, here or on the machine that has the text.

    Raises:
        UserError: the engine's tokens differ from tiktoken's.
    """
    clock = _Clock()
    documents = text_bytes = 0
    with write_unit(target, unit.identity) as writer:
        for batch in texts:
            clock.add("read")
            if not documents:  # once per unit: comparing all documents would be as slow as tiktoken
                assert_same_tokens(engine, _heads(batch))
            lengths = np.ones(len(batch), np.uint32)  # 1 for the end token
            for chunk in chunks(batch, engine.tokenizer.pre_tokenizer):
                clock.add("join")
                tokens, offsets = engine.encode(chunk.texts)
                clock.add("encode")
                np.add.at(lengths, chunk.document, np.diff(offsets).astype(np.uint32))
                joined = _insert_end_tokens(tokens, offsets[:-1][chunk.leads], engine.tokenizer.end_token_id)
                clock.add("join")
                writer.add_tokens(joined)
                clock.add("write")
            writer.add_documents(lengths, np.diff(batch.offsets).astype(np.uint32), hash_texts(batch))
            documents, text_bytes = documents + len(batch), text_bytes + len(batch.data)
            clock.add("join")
        counts = writer.finish(unit.rows - documents, text_bytes)
    clock.add("write")
    return counts, clock.seconds


class _Clock:
    """Adds the time since its last call to one of the steps."""

    def __init__(self) -> None:
        self.seconds, self._last = Seconds(), perf_counter()

    def add(self, step: str) -> None:
        now = perf_counter()
        setattr(self.seconds, step, getattr(self.seconds, step) + now - self._last)
        self._last = now


def _heads(texts: Texts) -> Iterator[str]:
    """Yield the first documents; of a long one, only its start."""
    for start, end in pairwise(texts.offsets[: CHECKED_DOCUMENTS + 1].tolist()):
        yield texts.data[start : min(end, start + CHECKED_BYTES)].tobytes().decode("utf-8", "ignore")


def _insert_end_tokens(tokens: Tokens, starts: Offsets, end_token_id: int) -> Tokens:
    """Return the tokens with the end token inserted before each of the given positions."""
    joined = np.empty(len(tokens) + len(starts), tokens.dtype)
    leads = starts + np.arange(len(starts))  # each end token moves all later positions by one
    is_token = np.ones(len(joined), bool)
    is_token[leads] = False
    joined[is_token] = tokens
    joined[leads] = end_token_id
    return joined


def hash_texts(texts: Texts) -> list[bytes]:
    """Return the XXH3-128 of each text, 16 bytes each."""
    data = texts.data.data
    return [xxhash.xxh3_128_digest(data[start:end]) for start, end in pairwise(texts.offsets.tolist())]
