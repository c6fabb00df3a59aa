"""Write, open and read the parquet files of raw text."""

from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelib.corpus.raw import (
    REPAIR,
    TEXT,
    Document,
    RawFile,
    RawManifest,
    Written,
    damaged,
    estimated_tokens,
    read_raw_manifest,
)
from pipelib.errors import UserError
from pipelib.files import sha256_file, sha256_files, sync_folder

ROW_GROUP_ROWS = 1000
"""Documents in a row group. Tokenization cuts files only between row groups."""
ROW_GROUP_BYTES = 16 << 20
"""Bytes of text after which a row group ends early, so that long documents do not fill the memory."""
FILE_BYTES = 256 << 20
"""Bytes of text after which the next file begins."""


SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "id": pa.string(),
        "dump": pa.string(),
        "url": pa.string(),
        "file_path": pa.string(),
        "language": pa.string(),
        "language_score": pa.float64(),
        "token_count": pa.int64(),
        "score": pa.float64(),
        "int_score": pa.int64(),
    }
)


def write_raw(documents: Iterable[Document], folder: Path, file_bytes: int = FILE_BYTES) -> Written:
    """Write documents, in order, as parquet files into a folder that has none.

    Memory is bounded by a few row groups, for any number of documents.

    Args:
        documents: without any document, no file is written.
        file_bytes: bytes of text after which a new file begins.

    Returns:
        The files, and the counts `characters` and `text_bytes` (UTF-8).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    writer: pq.ParquetWriter | None = None
    writing: Future[None] | None = None
    written = 0  # bytes of text in the open file
    counts = {"characters": 0, "text_bytes": 0}
    try:
        with ThreadPoolExecutor(1, "parquet") as thread:  # compress a row group while the next one is read
            for group, group_bytes in _row_groups(documents):
                table = _table(group)
                if writing is not None:
                    writing.result()  # wait, because a writer takes one group at a time
                if writer is None or written + group_bytes > file_bytes:
                    if writer is not None:
                        writer.close()
                    paths.append(folder / file_name(len(paths)))
                    writer, written = _open_writer(paths[-1]), 0
                writing = thread.submit(writer.write_table, table, len(group))
                written += group_bytes
                counts["characters"] += sum(len(document.text) for document in group)
                counts["text_bytes"] += group_bytes
            if writing is not None:
                writing.result()
    finally:
        if writer is not None:
            writer.close()
    sync_folder(folder)
    return Written(tuple(map(describe_file, paths, sha256_files(paths))), counts)


def file_name(number: int) -> str:
    """Return the name of the corpus's file with this number, from 0."""
    return f"{number:03d}_00000.parquet"


def first_rows(path: Path, max_tokens: int, column: str = TEXT) -> tuple[int, int]:
    """Find the shortest prefix of a parquet file with at least `max_tokens` tokens. Return its rows and its tokens.

    If the file has fewer tokens, the prefix is the whole file. Only `token_count` is read, and the text of row groups
    without it; a hundred rows are in memory at a time.
    """
    rows = tokens = 0
    with open_parquet(path, column=column) as parquet:
        for count in _row_tokens(parquet, path, column):
            rows += 1
            tokens += count
            if tokens >= max_tokens:
                break
    return rows, tokens


def _row_tokens(parquet: pq.ParquetFile, path: Path, column: str) -> Iterator[int]:
    """Yield the number of tokens that each row counts as."""
    schema = parquet.schema_arrow
    # A few rows may lack a count even in a dataset that has counts; then the length of the text is needed.
    counted = schema.names.count("token_count") == 1 and pa.types.is_integer(schema.field("token_count").type)
    try:
        for group in range(parquet.num_row_groups):
            known = list(_token_counts(parquet, group)) if counted else []
            lengths = _text_lengths(parquet, group, column) if None in known or not counted else repeat(0)
            yield from map(estimated_tokens, lengths, known if counted else repeat(None))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(path, str(error), REPAIR) from None


def _token_counts(parquet: pq.ParquetFile, group: int) -> Iterator[int | None]:
    """Yield the `token_count` of each row; None if it is missing or negative."""
    for batch in _batches(parquet, group, "token_count"):
        yield from (count if count is not None and count >= 0 else None for count in batch.to_pylist())


def _text_lengths(parquet: pq.ParquetFile, group: int, column: str) -> Iterator[int]:
    """Yield the bytes of each text; 0 if it is null."""
    for batch in _batches(parquet, group, column):
        yield from pc.fill_null(pc.binary_length(batch.cast(pa.large_binary())), 0).to_pylist()


def _batches(parquet: pq.ParquetFile, group: int, name: str) -> Iterator[pa.Array]:
    for batch in parquet.iter_batches(100, row_groups=[group], columns=[name], use_threads=False):
        yield batch.column(0)


def _row_groups(documents: Iterable[Document]) -> Iterator[tuple[list[Document], int]]:
    """Yield the documents of each row group, with the bytes of their text."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text.encode("utf-8"))
        if len(group) == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _open_writer(path: Path) -> pq.ParquetWriter:
    """Open a writer with all settings fixed that change bytes. The pinned version of pyarrow decides the rest."""
    return pq.ParquetWriter(
        path,
        SCHEMA,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=["dump", "language"],
        write_statistics=False,
        store_schema=False,
    )


def _table(group: Sequence[Document]) -> pa.Table:
    return pa.table(dict(zip(Document._fields, zip(*group, strict=True), strict=True)), schema=SCHEMA)


def bad_texts(path: Path, column: str) -> tuple[int, int]:
    """Count the texts of a parquet file that are not UTF-8, and its rows."""
    bad = rows = 0
    with open_parquet(path, column=column) as parquet:
        for batch in parquet.iter_batches(columns=[column], use_threads=False):
            rows += len(batch)
            bad += utf8_or_none(batch.column(0)).null_count - batch.column(0).null_count
    return bad, rows


def utf8_or_none(column: pa.Array) -> pa.Array:
    """Return a column of texts as strings, with null for those that are not UTF-8."""
    try:
        column.validate(full=True)  # Arrow does not check UTF-8 when it reads
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array(map(_utf8_or_none, column.cast(pa.large_binary()).to_pylist()), pa.large_string())


def _utf8_or_none(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def describe_file(path: Path, sha256: str | None = None, column: str = TEXT) -> RawFile:
    """Return a parquet file's entry for the manifest.

    Args:
        sha256: the file's verified SHA-256; None computes it.

    Raises:
        UserError: the file is not parquet or has no column of text.
    """
    with open_parquet(path, column=column) as parquet:
        rows = parquet.metadata.num_rows
    return RawFile(path.name, path.stat().st_size, rows, sha256 or sha256_file(path))


def iterate_raw(folder: Path, columns: Sequence[str] = (TEXT,)) -> Iterator[dict[str, Any]]:
    """Yield the documents of a folder in the order of the corpus, as `{column: value}`. Memory holds one row group.

    Raises:
        UserError: the manifest or a file is missing or damaged.
    """
    return (row for _, row in iterate_groups(folder, columns))


def iterate_groups(
    folder: Path, columns: Sequence[str] = (TEXT,), groups: Container[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield documents as `iterate_raw` does, each with the number of its row group in the corpus.

    Args:
        groups: the row groups to read; None for all.
    """
    manifest = read_raw_manifest(folder)
    number = 0
    for file in manifest.files:
        with open_parquet(folder / file.name, REPAIR, manifest.text_column) as parquet:
            for group, rows in enumerate(_rows_of_groups(parquet, file)):
                if rows and (groups is None or number in groups):
                    found = _iterate_group(parquet, group, columns, folder / file.name, manifest)
                    yield from ((number, row) for row in islice(found, rows))
                number += 1


class RowGroup(NamedTuple):
    """A row group of the corpus."""

    rows: int
    text_bytes: int
    """As the file states it; repeated texts may be counted only once."""


def row_groups(folder: Path) -> list[RowGroup]:
    """Return the row groups of a folder in the order of the corpus, from the metadata of its files.

    Raises:
        UserError: the manifest or a file is missing or damaged.
    """
    manifest = read_raw_manifest(folder)
    found = []
    for file in manifest.files:
        with open_parquet(folder / file.name, REPAIR, manifest.text_column) as parquet:
            for group, rows in enumerate(_rows_of_groups(parquet, file)):
                size = text_column(parquet.metadata, group, manifest.text_column).total_uncompressed_size
                found.append(RowGroup(rows, size * rows // max(1, parquet.metadata.row_group(group).num_rows)))
    return found


def _rows_of_groups(parquet: pq.ParquetFile, file: RawFile) -> Iterator[int]:
    """Yield how many rows of each row group belong to the corpus: `download.max_tokens` may end it in the middle of a file."""
    left = file.rows
    for group in range(parquet.num_row_groups):
        rows = min(left, parquet.metadata.row_group(group).num_rows)
        yield rows
        left -= rows


def stated_text_bytes(folder: Path) -> int:
    """Return the bytes of text in a folder, as its files state them."""
    return sum(group.text_bytes for group in row_groups(folder))


def _iterate_group(
    parquet: pq.ParquetFile, group: int, columns: Sequence[str], path: Path, manifest: RawManifest
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group, with None for the columns that the file does not have."""
    stored = {name: manifest.text_column if name == TEXT else name for name in columns}
    here = sorted({name for name in stored.values() if name in parquet.schema_arrow.names})
    for row in _read_group(parquet, group, here, path, manifest):
        yield {name: row.get(column) for name, column in stored.items()}


def _read_group(
    parquet: pq.ParquetFile, group: int, columns: Sequence[str], path: Path, manifest: RawManifest
) -> list[dict[str, Any]]:
    try:
        table = parquet.read_row_group(group, list(columns), use_threads=False)
        if manifest.text_column in columns:
            place, text = table.schema.get_field_index(manifest.text_column), table.column(manifest.text_column)
            if manifest.bad_rows == "skip":
                text = pa.chunked_array(map(utf8_or_none, text.chunks), pa.large_string())
            table = table.set_column(place, manifest.text_column, text.cast(pa.large_string()))
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"row group {group}: {error}", REPAIR) from None
    return rows


def open_parquet(path: Path, remedy: str = "download or make it again", column: str | None = TEXT) -> pq.ParquetFile:
    """Open a parquet file that has a column of text.

    Args:
        remedy: what to do about a damaged one, for the message.
        column: the column's name; None if the file need not have one.

    Raises:
        UserError: the file is missing, damaged or cut short, or has no such column of strings.
    """
    try:
        parquet = pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so part of the corpus is missing; run dvc repro.") from None
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error), remedy) from None
    try:
        if column is not None:
            require_text(parquet.schema_arrow, path, "set download.text_column, or convert the column", column)
    except UserError:
        parquet.close()
        raise
    return parquet


def require_text(schema: pa.Schema, name: object, remedy: str, column: str = TEXT) -> None:
    """Refuse a parquet file that does not have exactly one column of this name, of strings or bytes.

    Args:
        name: the file's name, for the message.
        remedy: what to do, for the message.

    Raises:
        UserError: it has no such column, or several, or one of another type.
    """
    count = schema.names.count(column)
    if not count:
        columns = ", ".join(schema.names)
        raise UserError(
            f"{name} has no column `{column}` (it has {columns}), so there is nothing to train on; {remedy}."
        )
    if count > 1:
        raise UserError(f"{name} has {count} columns `{column}`, so it is not clear which is meant; {remedy}.")
    kind = schema.field(column).type
    if not _is_text(kind):
        raise UserError(
            f"{name}: the column `{column}` holds {kind}, not strings, so there is nothing to train on; {remedy}."
        )


def _is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type can be read as text. A column that holds only nulls has the type null."""
    types = pa.types
    while types.is_dictionary(kind):
        kind = kind.value_type
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return bool(strings or binary or types.is_null(kind))


def text_column(metadata: pq.FileMetaData, group: int, column: str = TEXT) -> pq.ColumnChunkMetaData:
    """Return a file's metadata of its column of text in a row group."""
    columns = metadata.row_group(group)
    return next(found for found in map(columns.column, range(columns.num_columns)) if found.path_in_schema == column)
