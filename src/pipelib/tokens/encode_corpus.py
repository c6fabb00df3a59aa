"""The tokenize stage: parquet in, shards and manifest out, on every core.

1. Encode the units (`units.py`) that are missing, each in one worker. Units stay in the state folder: a killed run resumes
   with the missing ones, a corpus that grows keeps its units, and a damaged shard is made again from them. They take as
   much disk space as the shards, and 20 bytes per document. `pipelib clean --stage units` deletes them.
2. Concatenate the units' tokens in order, leave out duplicates, and cut the result into shards. One worker writes and
   hashes each shard, after it has verified the checksums of the units that it reads.

The shards are the same for any number of workers, and memory is bounded for any size of corpus. Step 1 depends only on
the text, so several machines that share the state folder can encode a share each (`encode_share`).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelib.corpus.raw import RawFile, read_raw_manifest, require_file
from pipelib.errors import UserError
from pipelib.files import plural, require_free_space, write_atomic
from pipelib.progress import Progress
from pipelib.stage import Build
from pipelib.tokens.dedup import find_duplicates
from pipelib.tokens.encoding import Encoding, chosen_executor
from pipelib.tokens.params import TokenizeParams
from pipelib.tokens.shards import UNIGRAM_COUNTS, Counts, Manifest, Shard, shard_name, write_shard
from pipelib.tokens.unit_file import UnitCounts, check_unit, read_documents, read_sizes, read_tokens
from pipelib.tokens.unit_store import Share, unit_store
from pipelib.tokens.units import DoneUnit, Seconds, Unit, plan_units
from pipelib.tokens.workers import Workers
from pipelib.vocabulary.choice import Vocabulary
from pipelib.vocabulary.engines import load_engine
from pipelib.vocabulary.tokenizer import Tokenizer, Tokens
from pipelib.workspace.places import Places


def encode_corpus(
    build: Build, raw: Path, params: TokenizeParams, benchmark_documents: int, vocabulary: Vocabulary
) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Encode `raw/*.parquet` into `data/tokens`.

    Args:
        build: the folder for the outs, and the code; only units made by the same code are used.
        raw: the folder of parquet files with a `text` column, and its manifest.
        benchmark_documents: how many documents at the start of the corpus benchmarks were made of. All of them must be in
            the validation shard.
        vocabulary: its documents for validation, if it has some, are the validation shard.

    Returns:
        The stage's result and its speed.

    Raises:
        UserError: there is no text or text that cannot be read, or the validation shard is larger than the corpus or
            smaller than the documents of the benchmarks.
    """
    source, tokenizer = read_raw_manifest(raw), vocabulary.tokenizer
    units = plan_units(raw, source)
    out = Places(build.outs).tokens
    started = time.monotonic()
    tasks = max(len(units), _text_bytes(units) // (4 * params.shard_size(_text_bytes(units) // 4)))  # units, or shards
    with unit_store(_unit_code(build.code, tokenizer)) as store, Workers(tasks, tokenizer) as workers:
        # Step 1: text to units.
        done = encode_missing_units(raw, units, store, workers, tokenizer)
        encoded = time.monotonic()
        total = sum_counts([unit.counts for unit in done])
        if not total.tokens:
            raise UserError(
                f"{raw} contains no text ({plural(len(units), 'piece')} were read), so there is nothing to learn; check the "
                "source of the text."
            )
        # Step 2: units to shards.
        parts = distinct_parts(done) if params.dedup == "exact" else [Part(unit) for unit in done]
        tokens = sum(part.tokens for part in parts)
        size = params.shard_size(tokens, at_least=tokens_to_start_of(parts, benchmark_documents))
        val_tokens = size
        for documents in (vocabulary.validation_documents, source.validation_documents):  # equal if both are there
            if documents is not None:
                val_tokens = tokens_to_start_of(parts, documents)
        by_documents = vocabulary.validation_documents is not None or source.validation_documents is not None
        require_training_data(parts, val_tokens, benchmark_documents, by_documents=by_documents)
        shards, counts = write_shards(out, parts, val_tokens, size, workers, tokenizer)
        val_bytes = bytes_to_token(parts, val_tokens) if tokenizer.normalizer else None

    dropped = sum(len(part.dropped) for part in parts)
    dedup = None if params.dedup == "none" else {"method": params.dedup, "dropped_documents": dropped}
    manifest = Manifest(tokenizer.encoding, source.source, tuple(shards), dedup, val_bytes)
    with write_atomic(out / UNIGRAM_COUNTS) as file:
        np.save(file, counts)
    manifest.write(out)  # last, because it declares the folder complete

    # The result is a function of the inputs; the speed differs between runs.
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
        "shard_tokens": size,
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


def encode_share(code: Mapping[str, str], raw: Path, share: Share, tokenizer: Tokenizer) -> int:
    """Encode one share of the corpus's units, for a later run of the stage. Return how many units the share has.

    Raises:
        UserError: text cannot be read, or another process encodes the same share.
    """
    units = share.of(plan_units(raw, read_raw_manifest(raw)))
    with unit_store(_unit_code(code, tokenizer), share) as store, Workers(len(units), tokenizer) as workers:
        encode_missing_units(raw, units, store, workers, tokenizer)
    return len(units)


def _unit_code(code: Mapping[str, str], tokenizer: Tokenizer) -> dict[str, str]:
    """Return what decides the tokens of a text."""
    return {**code, "vocabulary": tokenizer.fingerprint}


# ---- Text to units ---------------------------------------------------------------------------------------------------


def encode_missing_units(
    raw: Path, units: Sequence[Unit], store: Path, workers: Workers, tokenizer: Tokenizer
) -> list[DoneUnit]:
    """Encode the units that are missing or damaged, and return all units in order.

    Raises:
        UserError: text cannot be read or has changed since the download, the disk is full, or a worker was killed.
    """
    # Verify the units of earlier runs: their files are not synced, so a power cut may have damaged them.
    found = workers.each("check", _check_unit, units, store)
    missing = [unit for unit, counts in zip(units, found, strict=True) if counts is None]
    need = sum(_token_bytes(some, tokenizer.token_type.itemsize) for some in (missing, units))
    require_free_space(store, need, "tokenization")
    # Verify only the raw files that must be read again.
    names = {unit.path.name for unit in missing}
    workers.each("verify", _require_file, [file for file in read_raw_manifest(raw).files if file.name in names], raw)
    if missing:
        load_engine(workers.engine, tokenizer)  # checks the engine once here, so that an error gives one message
    done = _encode(Encoding(missing, store, tokenizer, workers), len(units))
    return [
        DoneUnit(path, unit.identity, counts, None) if counts else done[path]
        for unit, counts in zip(units, found, strict=True)
        for path in [unit.file(store)]
    ]


def _encode(task: Encoding, units: int) -> dict[Path, DoneUnit]:
    """Have the chosen executor encode what is missing of so many units."""
    name, executor = chosen_executor()
    by = f"{task.workers.count} worker{'' if task.workers.count == 1 else 's'}" if name == "local" else name
    progress = Progress(f"encoding with {task.engine}, {by}", _text_bytes(task.units), "bytes")
    sizes = {unit.file(task.store): unit.text_bytes for unit in task.units}
    done: dict[Path, DoneUnit] = {}
    with closing(executor(task)) as encoded:  # at once if this stops: jobs elsewhere would go on
        for unit in encoded:
            done[unit.path] = unit
            progress.add(sizes[unit.path])
    there = f", {units - len(done)} of {units} units were there" if len(done) < units else ""
    progress.close(f"{sum(unit.counts.tokens for unit in done.values()):,} tokens{there}")
    return done


def _text_bytes(units: Sequence[Unit]) -> int:
    return sum(unit.text_bytes for unit in units)


def _token_bytes(units: Sequence[Unit], width: int) -> int:
    """Estimate the bytes that the tokens of units will take: a token is 4 to 5 bytes of English, or 3 of source code."""
    return _text_bytes(units) * width // 3 + (24 + width) * sum(unit.rows for unit in units)


def _check_unit(unit: Unit, store: Path) -> UnitCounts | None:
    return check_unit(unit.file(store), unit.identity)


def _require_file(file: RawFile, raw: Path) -> None:
    require_file(raw, file)


def sum_counts(counts: Sequence[UnitCounts]) -> UnitCounts:
    """Add up the counts of several units."""
    return UnitCounts(**{field.name: sum(getattr(each, field.name) for each in counts) for field in fields(UnitCounts)})


# ---- Units to shards -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A unit's tokens, without those of its duplicate documents."""

    unit: DoneUnit
    dropped: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    """The indices of the documents that are left out, in ascending order."""
    dropped_tokens: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens stay."""
        return self.unit.counts.tokens - self.dropped_tokens

    def starts(self) -> npt.NDArray[np.int64]:
        """Return where each document that stays starts among the tokens that stay (documents,)."""
        lengths = np.delete(read_documents(self.unit.path, self.unit.counts)[0], self.dropped).astype(np.int64)
        return np.cumsum(lengths) - lengths

    def read(self, start: int, end: int) -> Iterator[Tokens]:
        """Yield tokens [start, end) of those that stay, in arrays of any length.

        Raises:
            UserError: the unit's file changed after it was written, because of a bad disk or bad memory.
        """
        if check_unit(self.unit.path, self.unit.identity) != self.unit.counts:
            self.unit.path.unlink(missing_ok=True)
            raise UserError(
                f"{self.unit.path} changed since it was written, so its tokens could be wrong; it was removed: run dvc repro "
                "again, and check the disk if it happens again."
            )
        before = 0  # tokens that stay in the runs so far
        for first, last in self._runs():
            begin, stop = max(0, start - before), min(last - first, end - before)
            if begin < stop:
                yield from read_tokens(self.unit.path, self.unit.counts, first + begin, first + stop)
            before += last - first

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges [first, last) of the unit's tokens that stay."""
        start = 0
        if len(self.dropped):
            ends = np.cumsum(read_documents(self.unit.path, self.unit.counts)[0], dtype=np.int64)
            for document in self.dropped.tolist():
                yield start, int(ends[document - 1]) if document else 0
                start = int(ends[document])
        yield start, self.unit.counts.tokens


def distinct_parts(units: Sequence[DoneUnit]) -> list[Part]:
    """Return the units without the documents that occurred earlier in the corpus."""
    hashes = (read_documents(unit.path, unit.counts)[1] for unit in units)
    duplicate = find_duplicates(hashes, sum(unit.counts.documents for unit in units))
    parts = []
    first = 0  # the index of the unit's first document in the corpus
    for unit in units:
        lengths, _ = read_documents(unit.path, unit.counts)
        dropped = np.flatnonzero(duplicate[first : first + len(lengths)]).astype(np.uint32)
        first += len(lengths)
        parts.append(Part(unit, dropped, int(lengths[dropped].sum(dtype=np.int64))))
    return parts


def tokens_to_start_of(parts: Sequence[Part], document: int) -> int:
    """Count the tokens before a document of the corpus, by its number from 0. Documents that are left out have a number too."""
    tokens = 0
    for part in parts:
        lengths = read_documents(part.unit.path, part.unit.counts)[0].astype(np.int64)
        kept = np.ones(len(lengths), np.bool_)
        kept[part.dropped] = False
        if document < len(lengths):
            return tokens + int(lengths[:document][kept[:document]].sum())
        tokens, document = tokens + part.tokens, document - len(lengths)
    return tokens


def bytes_to_token(parts: Sequence[Part], token: int) -> int:
    """Count the bytes of text of the documents that start before a token of the corpus."""
    size = 0
    for part in parts:
        sizes = np.delete(read_sizes(part.unit.path, part.unit.counts), part.dropped)
        size += int(sizes[part.starts() < token].sum(dtype=np.int64))
        token -= part.tokens
    return size


def write_shards(
    folder: Path, parts: Sequence[Part], val_tokens: int, shard_tokens: int, workers: Workers, tokenizer: Tokenizer
) -> tuple[list[Shard], Counts]:
    """Cut the parts' tokens into shards: one of `val_tokens`, the others of `shard_tokens` tokens.

    The last shard holds the rest; no token is dropped.

    Returns:
        The shards in order, and how often each token occurs in the training shards (vocab_size,).
    """
    cut = [
        (folder / shard_name(index), spans) for index, spans in enumerate(cut_parts(parts, val_tokens, shard_tokens))
    ]
    progress = Progress("writing shards", len(cut), "shards")
    done = workers.each("shards", _write_shard, cut, tokenizer, done=lambda _: progress.add(1))
    progress.close()
    # The first shard is the validation split, so it does not count for the unigram baseline.
    counts = [counts for _, counts in done[1:]] or [np.zeros(tokenizer.size, np.int64)]
    return [shard for shard, _ in done], np.sum(counts, axis=0)


Span = tuple[Part, int, int]
"""Tokens [start, end) of a part."""


def cut_parts(parts: Sequence[Part], first: int, tokens: int) -> Iterator[list[Span]]:
    """Yield the parts in runs: one of exactly `first` tokens, then of `tokens` each. The last run has the rest."""
    run: list[Span] = []
    missing = first
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


def _write_shard(task: tuple[Path, Sequence[Span]], tokenizer: Tokenizer) -> tuple[Shard, Counts]:
    path, spans = task
    pieces = (piece for part, start, end in spans for piece in part.read(start, end))
    return write_shard(path, sum(end - start for _, start, end in spans), pieces, tokenizer)


def require_training_data(
    parts: Sequence[Part], val_tokens: int, benchmark_documents: int, *, by_documents: bool
) -> None:
    """Refuse a corpus that leaves no training data, and benchmarks that are made of training text.

    Args:
        by_documents: the validation split is documents and not `tokenize.shard_tokens` tokens.

    Raises:
        UserError: one of the two is the case.
    """
    tokens = sum(part.tokens for part in parts)
    if tokens <= val_tokens:
        raise UserError(
            f"the corpus has {tokens} tokens and the validation shard takes {val_tokens}, so no training data is left; lower "
            f"{'vocabulary.validation_documents' if by_documents else 'tokenize.shard_tokens'} or add text."
        )
    if tokens_to_start_of(parts, benchmark_documents) <= val_tokens:
        return
    # Count the documents that are entirely in the validation shard: those that end before or at its end.
    whole = before = 0
    for part in parts:
        ends = before + np.append(part.starts()[1:], part.tokens)
        whole += int(np.count_nonzero(ends <= val_tokens))
        before += part.tokens
    remedy = (
        "hold more documents out (vocabulary.validation_documents, download.validation)"
        if by_documents
        else "raise tokenize.shard_tokens (or name files in download.validation)"
    )
    raise UserError(
        f"download.benchmark_documents = {benchmark_documents}, but only the first {whole} documents are entirely in the "
        f"validation shard of {val_tokens} tokens, so the model would be tested on training text; {remedy}, or lower "
        f"download.benchmark_documents to {whole}."
    )
