"""The tokenize stage: parquet in, shards and manifest out, on every core.

The corpus is cut into units, runs of row groups of one file with about 8 MB of text, which depend on nothing but the
input. Each worker takes units one at a time and writes a unit's tokens whole; the units in order, cut anew, are the
shards. So the shards are equal for any number of workers, memory is bounded by a unit, and a stage that was killed goes
on with the units that are missing.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelib.errors import UserError, how_to_repair
from pipelib.files import read_json, require_free_space, write_atomic, write_json
from pipelib.model.vocabulary import EOT_TOKEN_ID
from pipelib.processes import tie_to_parent, worker_count
from pipelib.progress import Progress
from pipelib.stage import Build
from pipelib.tokens.encoding import VOCABULARY_SHA256, Engine, Tokens, load_engine, prove_equal
from pipelib.tokens.params import TokenizeParams
from pipelib.tokens.shards import UNIGRAM_COUNTS, Manifest, count_tokens, open_shard, write_shards

UNIT_BYTES = 8 << 20
"""Text of one unit, in bytes."""
PROVED_DOCUMENTS = 2
"""Documents of every unit that are compared with tiktoken."""


@dataclass(frozen=True)
class Unit:
    """A piece of the input that one worker encodes at a time."""

    index: int
    path: Path
    row_groups: tuple[int, ...]

    def tokens_file(self, folder: Path) -> Path:
        """Where its tokens go: plain uint16, without a header."""
        return folder / f"{self.index:06d}.tokens"

    def marker_file(self, folder: Path) -> Path:
        """Written after the tokens, so that it says they are complete."""
        return folder / f"{self.index:06d}.json"

    def origin(self) -> dict[str, object]:
        """What it is a piece of, as its marker says."""
        return {"file": self.path.name, "row_groups": list(self.row_groups)}

    def is_done(self, folder: Path) -> bool:
        """Whether its tokens are there, and are those of this piece of the input."""
        marker = self.marker_file(folder)
        return marker.exists() and read_json(marker)["origin"] == self.origin()


@dataclass(frozen=True)
class UnitCounts:
    """What one unit held."""

    tokens: int
    documents: int
    empty_documents: int
    text_bytes: int


def encode_corpus(
    build: Build, raw: Path, params: TokenizeParams, benchmark_documents: int
) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Encode `raw/*.parquet` into `data/tokens`.

    Args:
        build: where outs and units go.
        raw: the folder of parquet files with a `text` column, and its manifest.
        benchmark_documents: documents at the corpus's start that benchmarks were made of; all must be validation text.

    Returns:
        The stage's result and its speed.

    Raises:
        UserError: no text, text that cannot be read, a validation shard larger than the corpus or smaller than the
            benchmark's documents.
    """
    source = read_json(raw / "manifest.json")
    units = plan_units([raw / file["name"] for file in source["files"]])
    folder, out = build.work / "units", build.outs / "data" / "tokens"
    folder.mkdir(exist_ok=True)
    # units and shards, 2 bytes a token each; at least three bytes of text make a token, and parquet halves the text
    require_free_space(build.work, 3 * sum(file["bytes"] for file in source["files"]), "tokenization")

    workers = worker_count(len(units))
    engine = os.environ.get("PIPELIB_TOKENIZER", "gigatoken")
    started = time.monotonic()
    counts = encode_units(units, folder, engine, workers)
    encoded = time.monotonic()
    total = UnitCounts(
        **{field.name: sum(getattr(unit, field.name) for unit in counts) for field in fields(UnitCounts)}
    )
    if not total.tokens:
        raise UserError(
            f"{raw} holds no text in {len(units)} pieces, so there is nothing to learn; look at the source."
        )

    shards = write_shards(out, read_units(units, folder), params.shard_tokens)
    manifest = Manifest({"name": "gpt2", "vocabulary_sha256": VOCABULARY_SHA256}, source["source"], tuple(shards))
    require_training_data(manifest, total.tokens, params.shard_tokens, benchmark_documents)
    counts_by_token = count_tokens(open_shard(out / shard.name) for shard in manifest.split("train"))
    with write_atomic(out / UNIGRAM_COUNTS) as file:
        np.save(file, counts_by_token)
    manifest.write(out)

    result = {
        "tokens": total.tokens,
        "train_tokens": manifest.tokens("train"),
        "val_tokens": manifest.tokens("val"),
        "documents": total.documents,
        "empty_documents": total.empty_documents,
        "text_bytes": total.text_bytes,
        "bytes_per_token": round(total.text_bytes / (total.tokens - total.documents), 4),
        "shards": len(shards),
    }
    speed = {
        "engine": engine,
        "workers": workers,
        "tokens_per_second": round(total.tokens / (time.monotonic() - started)),
        "encode_seconds": round(encoded - started, 2),
        "merge_seconds": round(time.monotonic() - encoded, 2),
    }
    return result, speed


def plan_units(paths: list[Path]) -> list[Unit]:
    """Cut the files into units, by their row groups' sizes alone."""
    units: list[Unit] = []
    for path in paths:
        groups: list[int] = []
        size = 0
        for group, group_bytes in enumerate(_text_bytes(path)):
            if groups and size + group_bytes > UNIT_BYTES:
                units.append(Unit(len(units), path, tuple(groups)))
                groups, size = [], 0
            groups.append(group)
            size += group_bytes
        if groups:
            units.append(Unit(len(units), path, tuple(groups)))
    return units


def _text_bytes(path: Path) -> list[int]:
    """Uncompressed bytes of the text column in each row group."""
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, though the manifest beside it names it; run dvc repro.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} is not a readable parquet file ({error}), so its text is lost; {how_to_repair('data/raw')}."
        ) from None
    if "text" not in file.schema_arrow.names:
        raise UserError(
            f"{path} has the columns {', '.join(file.schema_arrow.names)} and no `text`, so there is no text."
        )
    column = file.schema_arrow.names.index("text")
    metadata = file.metadata
    return [
        metadata.row_group(group).column(column).total_uncompressed_size for group in range(metadata.num_row_groups)
    ]


def encode_units(units: list[Unit], folder: Path, engine: str, workers: int) -> list[UnitCounts]:
    """Encode the units that are not complete yet, on `workers` processes, and return the counts of all."""
    missing = [unit for unit in units if not unit.is_done(folder)]
    progress = Progress(f"encoding with {engine}, {workers} workers", None, "tokens")
    load_engine(engine)  # proves it here, where an error is one message, and not in every worker
    # spawn, not fork: the same on every system, and safe with threads (MLflow's) in this process
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (engine, str(folder))) as pool:
            try:
                for future in as_completed([pool.submit(_encode_unit, unit) for unit in missing]):
                    progress.add(future.result().tokens)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # one bad file need not wait for the rest of the corpus
                raise
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, by the system if memory ran out, so the corpus is not complete; what it finished is kept: "
            "run dvc repro again, with fewer workers if memory is short (PIPELIB_WORKERS=1)."
        ) from None
    progress.close()
    return [UnitCounts(**read_json(unit.marker_file(folder))["counts"]) for unit in units]


_engine: Engine
_folder: Path


def _start_worker(engine: str, folder: str) -> None:
    global _engine, _folder
    tie_to_parent(signal.SIGKILL)
    _engine, _folder = load_engine(engine), Path(folder)


def _encode_unit(unit: Unit) -> UnitCounts:
    tokens, counts = encode_unit(unit, _engine)
    with write_atomic(unit.tokens_file(_folder)) as file:
        file.write(tokens.astype("<u2", copy=False).data)
    write_json(unit.marker_file(_folder), {"origin": unit.origin(), "counts": asdict(counts)})
    return counts


def encode_unit(unit: Unit, engine: Engine) -> tuple[Tokens, UnitCounts]:
    """The tokens of a unit, each document led by `<|endoftext|>`, and their counts."""
    documents, empty = read_documents(unit)
    prove_equal(engine, documents[:PROVED_DOCUMENTS])
    tokens, offsets = engine.encode(documents)
    tokens = np.insert(tokens, offsets[:-1], EOT_TOKEN_ID)
    text_bytes = sum(len(document) if document.isascii() else len(document.encode("utf-8")) for document in documents)
    return tokens, UnitCounts(len(tokens), len(documents), empty, text_bytes)


def read_documents(unit: Unit) -> tuple[list[str], int]:
    """The documents of a unit, and how many rows were null or empty and left out.

    Raises:
        UserError: a row that is not text, or bytes that cannot be read, with the file and the row groups.
    """
    try:
        column: Any = pq.ParquetFile(unit.path).read_row_groups(list(unit.row_groups), columns=["text"]).column("text")
        column.validate(full=True)  # UTF-8 included
        rows = column.to_pylist()
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{unit.path}, {_where(unit)}: {error}; the file is damaged, so its text is lost; {how_to_repair('data/raw')}."
        ) from None
    documents = [row for row in rows if row]
    wrong = next((row for row in documents if not isinstance(row, str)), None)
    if wrong is not None:
        raise UserError(f"{unit.path}, {_where(unit)}: the `text` column holds {type(wrong).__name__}, not text.")
    return documents, len(rows) - len(documents)


def _where(unit: Unit) -> str:
    return f"row groups {unit.row_groups[0]} to {unit.row_groups[-1]}"


def read_units(units: list[Unit], folder: Path) -> Iterator[Tokens]:
    """The tokens of all units in order, memory-mapped."""
    for unit in units:
        path = unit.tokens_file(folder)
        if path.stat().st_size:
            yield np.memmap(path, "<u2", "r")


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
