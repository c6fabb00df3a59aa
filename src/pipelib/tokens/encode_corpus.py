"""The tokenize stage: parquet in, shards and manifest out, on every core.

1. The units (`units.py`) that are not there yet are encoded, each by one worker. They stay in the state folder: a killed
   run goes on with the missing ones, a corpus that grows keeps those it had, and a damaged shard is made again from them.
   They take as much as the shards, and 20 bytes a document; `pipelib clean --stage units` frees them.
2. The units' tokens in order, less duplicates, are cut into shards, each written and hashed by one worker.

So the shards are equal for any number of workers, and memory is bounded whatever the size of the corpus. The first part
depends on nothing but the text, so machines that share the state folder can each take a share of it (`encode_share`).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelib.corpus.raw import read_manifest
from pipelib.errors import UserError
from pipelib.files import require_free_space, write_atomic
from pipelib.model.vocabulary import VOCAB_SIZE
from pipelib.progress import Progress
from pipelib.stage import Build
from pipelib.tokens.dedup import find_duplicates
from pipelib.tokens.encoding import VOCABULARY_SHA256, Tokens
from pipelib.tokens.params import TokenizeParams
from pipelib.tokens.shards import UNIGRAM_COUNTS, Counts, Manifest, Shard, shard_name, write_shard
from pipelib.tokens.unit_store import Share, drop_other_code, unit_store
from pipelib.tokens.units import (
    Seconds,
    Unit,
    UnitCounts,
    check_unit,
    encode_unit,
    plan_units,
    read_documents,
    read_tokens,
    require_file,
)
from pipelib.tokens.workers import Workers, worker_engine


def encode_corpus(
    build: Build, raw: Path, params: TokenizeParams, benchmark_documents: int
) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Encode `raw/*.parquet` into `data/tokens`.

    Args:
        build: where the outs go, and the code that names the units which can be used.
        raw: the folder of parquet files with a `text` column, and its manifest.
        benchmark_documents: documents at the corpus's start that benchmarks were made of; all must be validation text.

    Returns:
        The stage's result and its speed.

    Raises:
        UserError: no text, text that cannot be read, a validation shard larger than the corpus or smaller than the
            benchmark's documents.
    """
    source = read_manifest(raw)
    units = plan_units(raw, source.files)
    out = build.outs / "data" / "tokens"
    started = time.monotonic()
    with unit_store(build.code) as store, Workers(len(units)) as workers:
        done = complete_units(units, store, workers)
        encoded = time.monotonic()
        total = add_up([unit.counts for unit in done])
        if not total.tokens:
            raise UserError(
                f"{raw} holds no text in {len(units)} pieces, so there is nothing to learn; look at the source."
            )
        parts = distinct_parts(done) if params.dedup == "exact" else [Part(unit.path, unit.counts) for unit in done]
        shards, counts = write_shards(out, parts, params.shard_tokens, workers)
        drop_other_code(store)

    dropped = sum(len(part.dropped) for part in parts)
    dedup = None if params.dedup == "none" else {"method": params.dedup, "dropped_documents": dropped}
    manifest = Manifest(
        {"name": "gpt2", "vocabulary_sha256": VOCABULARY_SHA256},
        source.source,
        tuple(shards),
        dedup,
    )
    tokens = manifest.tokens("val") + manifest.tokens("train")
    require_training_data(manifest, tokens, params.shard_tokens, benchmark_documents)
    with write_atomic(out / UNIGRAM_COUNTS) as file:
        np.save(file, counts)
    manifest.write(out)

    result = {
        "tokens": tokens,
        "train_tokens": manifest.tokens("train"),
        "val_tokens": manifest.tokens("val"),
        "documents": sum(shard.documents for shard in shards),
        "empty_documents": total.empty_documents,
        **({"duplicate_documents": dropped} if dedup else {}),
        "text_bytes": total.text_bytes,
        "bytes_per_token": round(total.text_bytes / (total.tokens - total.documents), 4),
        "shards": len(shards),
    }
    encoding = [unit.seconds for unit in done if unit.seconds]
    steps = {
        "verify": workers.seconds["verify"],
        **{step.name: sum(getattr(seconds, step.name) for seconds in encoding) for step in fields(Seconds)},
        "check": workers.seconds["check"],
        "shards": workers.seconds["shards"],
    }
    speed = {
        "engine": workers.engine,
        "workers": workers.count,
        "tokens_per_second": round(tokens / (time.monotonic() - started)),
        "units": len(units),
        "units_encoded": len(encoding),
        "encode_seconds": round(encoded - started, 2),
        "merge_seconds": round(time.monotonic() - encoded, 2),
        "worker_seconds": {step: round(spent, 2) for step, spent in steps.items()},
        "worker_peak_bytes": workers.peak_memory,
    }
    return result, speed


def encode_share(code: Mapping[str, str], raw: Path, share: Share) -> int:
    """Encode one share of the corpus's units, for a run of the stage that finds them there; return their number.

    Raises:
        UserError: text that cannot be read, or another process that encodes the same share.
    """
    units = share.of(plan_units(raw, read_manifest(raw).files))
    with unit_store(code, share) as store, Workers(len(units)) as workers:
        complete_units(units, store, workers)
    return len(units)


# ---- Text to units ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoneUnit:
    """A unit that is there, whole."""

    path: Path
    counts: UnitCounts
    seconds: Seconds | None
    """Where the time of encoding it went; None if it was there before."""


def complete_units(units: Sequence[Unit], store: Path, workers: Workers) -> list[DoneUnit]:
    """Encode the units that are not there yet, or not whole, and return all, in order.

    Raises:
        UserError: text that cannot be read, or is not what was downloaded; a full disk; a worker that was killed.
    """
    found = workers.each("check", check_unit, [unit.file(store) for unit in units])
    missing = [unit for unit, counts in zip(units, found, strict=True) if counts is None]
    # a token of English is four to five bytes of text, of source code about three; it takes two in a unit and in a shard
    require_free_space(store, (_text_bytes(missing) + _text_bytes(units)) * 2 // 3, "tokenization")
    workers.each("verify", _require_file, list({unit.path: unit.sha256 for unit in missing}.items()))
    progress = Progress(f"encoding with {workers.engine}, {workers.count} workers", _text_bytes(missing), "bytes")
    done = workers.each("units", _encode_unit, missing, store, done=lambda unit: progress.add(unit.text_bytes))
    progress.close(f"{sum(unit.counts.tokens for unit in done):,} tokens")
    encoded = iter(done)
    return [
        DoneUnit(unit.file(store), counts, None) if counts else next(encoded)
        for unit, counts in zip(units, found, strict=True)
    ]


def _text_bytes(units: Sequence[Unit]) -> int:
    return sum(unit.text_bytes for unit in units)


def _require_file(file: tuple[Path, str]) -> None:
    require_file(*file)


def _encode_unit(unit: Unit, store: Path) -> DoneUnit:
    path = unit.file(store)
    return DoneUnit(path, *encode_unit(unit, worker_engine(), path))


def add_up(counts: Sequence[UnitCounts]) -> UnitCounts:
    """The counts of several units."""
    return (
        UnitCounts(*(sum(numbers) for numbers in zip(*map(astuple, counts), strict=True)))
        if counts
        else UnitCounts(0, 0, 0, 0)
    )


# ---- Units to shards -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A unit's tokens, less those of some documents."""

    path: Path
    counts: UnitCounts
    dropped: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    """The numbers of the documents that are left out, rising."""
    dropped_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that stay."""
        return self.counts.tokens - self.dropped_tokens

    def read(self, start: int, end: int) -> Iterator[Tokens]:
        """Tokens [start, end) of those that stay, in arrays of any length."""
        before = 0  # tokens that stay, of the runs so far
        for first, last in self._runs():
            begin, stop = max(0, start - before), min(last - first, end - before)
            if begin < stop:
                yield from read_tokens(self.path, first + begin, first + stop)
            before += last - first

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Where in the file the tokens are that stay."""
        start = 0
        if len(self.dropped):
            ends = np.cumsum(read_documents(self.path, self.counts)[0], dtype=np.int64)
            for document in self.dropped.tolist():
                yield start, int(ends[document - 1]) if document else 0
                start = int(ends[document])
        yield start, self.counts.tokens


def distinct_parts(units: Sequence[DoneUnit]) -> list[Part]:
    """The units less every document that occurred before it."""
    hashes = (read_documents(unit.path, unit.counts)[1] for unit in units)
    duplicate = find_duplicates(hashes, sum(unit.counts.documents for unit in units))
    parts = []
    first = 0
    for unit in units:
        lengths, _ = read_documents(unit.path, unit.counts)
        dropped = np.flatnonzero(duplicate[first : first + len(lengths)]).astype(np.uint32)
        first += len(lengths)
        parts.append(Part(unit.path, unit.counts, dropped, int(lengths[dropped].sum(dtype=np.int64))))
    return parts


def write_shards(
    folder: Path, parts: Sequence[Part], shard_tokens: int, workers: Workers
) -> tuple[list[Shard], Counts]:
    """Cut the parts' tokens into shards of `shard_tokens`; the last one holds the rest, no token is dropped.

    Returns:
        The shards in order, and how often each token occurs in the training shards (VOCAB_SIZE,).
    """
    cut = [(folder / shard_name(index), spans) for index, spans in enumerate(cut_parts(parts, shard_tokens))]
    progress = Progress("writing shards", len(cut), "shards")
    done = workers.each("shards", _write_shard, cut, done=lambda _: progress.add(1))
    progress.close()
    counts = [counts for _, counts in done[1:]] or [np.zeros(VOCAB_SIZE, np.int64)]
    return [shard for shard, _ in done], np.sum(counts, axis=0)


Span = tuple[Part, int, int]
"""Tokens [start, end) of a part."""


def cut_parts(parts: Sequence[Part], tokens: int) -> Iterator[list[Span]]:
    """The parts in runs of exactly `tokens` tokens; the last run has the rest."""
    run: list[Span] = []
    missing = tokens
    for part in parts:
        start = 0
        while start < part.tokens:
            end = min(part.tokens, start + missing)
            run.append((part, start, end))
            missing -= end - start
            start = end
            if not missing:
                yield run
                run, missing = [], tokens
    if run:
        yield run


def _write_shard(task: tuple[Path, Sequence[Span]]) -> tuple[Shard, Counts]:
    path, spans = task
    pieces = (piece for part, start, end in spans for piece in part.read(start, end))
    return write_shard(path, sum(end - start for _, start, end in spans), pieces)


def require_training_data(manifest: Manifest, tokens: int, shard_tokens: int, benchmark_documents: int) -> None:
    """Refuse shards without training data, and benchmarks made of training text."""
    if not manifest.split("train"):
        raise UserError(
            f"the corpus has {tokens} tokens and the validation shard takes tokenize.shard_tokens = {shard_tokens}, so no "
            "training data is left; lower tokenize.shard_tokens or add text."
        )
    # A document belongs to the validation shard as a whole when the next one starts there too.
    whole = manifest.shards[0].documents - 1
    if whole < benchmark_documents:
        raise UserError(
            f"download.benchmark_documents = {benchmark_documents}, but only the first {whole} documents lie wholly in the "
            f"validation shard of {shard_tokens} tokens, so the model would be tested on training text; raise "
            f"tokenize.shard_tokens or lower download.benchmark_documents to {whole}."
        )
