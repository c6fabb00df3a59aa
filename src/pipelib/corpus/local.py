"""The user's own text: parquet, jsonl, jsonl.gz, jsonl.zst and txt files of one folder, read through `datasets`.

Files are taken in the order of their paths. What becomes a document:

- parquet, jsonl: each row, its text in the column `text`; FineWeb-Edu's other columns are kept, unknown ones are not.
- txt: the whole file; one of more than 100,000 characters is cut at the next empty line after each 100,000.

A text of nothing but white space is left out and counted. A text that is missing, null, not a string or not Unicode is
an error that names the file and the row: a corpus that silently lost rows would be a different one.
"""

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelib.corpus.raw import Document, Written, first_documents, open_parquet, write_raw
from pipelib.errors import UserError
from pipelib.files import sha256_file
from pipelib.progress import Progress

TXT_CHARACTERS = 100_000
"""Characters after which a txt file is cut at the next empty line."""
_TXT_LIMIT = 40 * TXT_CHARACTERS  # cut at any line, so that a file without an empty line stays within memory
_BATCH_ROWS = 1000

_COLUMNS: dict[str, type | tuple[type, ...]] = {
    "text": str,
    "id": str,
    "dump": str,
    "url": str,
    "file_path": str,
    "language": str,
    "language_score": (float, int),
    "token_count": int,
    "score": (float, int),
    "int_score": int,
}
"""Columns that are read, and the types that are kept."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class LocalSource:
    """The files under a folder that match a glob and are of a kind that can be read; hidden ones are ignored."""

    path: Path
    pattern: str
    max_tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        """The name (inside the folder), size and SHA-256 of every file, and where the corpus ends if not with them.

        Raises:
            UserError: there is no folder or no file.
        """
        identity = {"kind": "local", "files": self._files}
        return identity if self.max_tokens is None else {**identity, "max_tokens": self.max_tokens}

    @cached_property
    def _files(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "bytes": (self.path / name).stat().st_size, "sha256": sha256_file(self.path / name)}
            for name in self._names()[0]
        ]

    def write(self, folder: Path, work: Path) -> Written:
        """Read every file and write its documents.

        Raises:
            UserError: a file or a row that cannot be used, by name and number.
        """
        names, ignored = self._names()
        if ignored:
            more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
            print(f"local: only {', '.join(_READERS)} are read, so not {', '.join(ignored[:5])}{more}", flush=True)
        empty = 0

        def documents() -> Iterator[Document]:
            nonlocal empty
            for name in names:
                for document in read_file(self.path / name, name, work):
                    if document.text.strip():
                        progress.add(1)
                        yield document
                    else:
                        empty += 1

        progress = Progress("local: reading files", None, "documents")
        counts: dict[str, int] = {}
        written = write_raw(first_documents(documents(), self.max_tokens, counts), folder)
        progress.close()
        return replace(written, counts={**written.counts, "empty_dropped": empty, **counts})

    def _names(self) -> tuple[list[str], list[str]]:
        """The paths inside the folder of the files that are read, sorted, and of those that are of no kind that can be."""
        if not self.path.is_dir():
            raise UserError(
                f"download.path: {self.path} is not a folder, so there is no text; create it and put files there."
            )
        try:
            matches = [path.relative_to(self.path) for path in self.path.glob(self.pattern) if path.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"download.pattern: {self.pattern!r} is not a glob ({error}); **/* takes everything."
            ) from None
        names = sorted(path.as_posix() for path in matches if not any(part.startswith(".") for part in path.parts))
        ignored = [name for name in names if not name.lower().endswith(tuple(_READERS))]
        names = sorted({*names} - {*ignored})
        if not names:
            raise UserError(
                f"download.path: {self.path} has no file that matches download.pattern = {self.pattern!r} and ends in "
                f"{', '.join(_READERS)}, so there is no text; put files there, or set download.source: docs."
            )
        return names, ignored


def read_file(path: Path, name: str, work: Path) -> Iterator[Document]:
    """The documents of one file, empty ones included.

    Args:
        name: what messages and ids call the file.
        work: a folder for what `datasets` leaves behind.

    Raises:
        UserError: a row that cannot be used, or a damaged file.
    """
    read = next(reader for ending, reader in _READERS.items() if path.name.lower().endswith(ending))
    for number, row in read(path, name, work):
        yield _document(row, name, number)


def _document(row: Row, name: str, number: int) -> Document:
    """A row as a document: its text checked, the optional columns kept where their type is right."""
    where = f"{name}, row {number}"
    if "text" not in row:
        raise UserError(
            f"{where}: no `text` (it has {', '.join(row) or 'nothing'}), so it is no document; add or rename it."
        )
    text = row["text"]
    if not isinstance(text, str):
        raise UserError(f"{where}: `text` is {_shown(text)}, not a string, so it cannot be tokenized; mend the row.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: `text` is not Unicode ({error.reason}), so it has no UTF-8; mend the row.") from None
    known = {column: row[column] for column, kinds in _COLUMNS.items() if isinstance(row.get(column), kinds)}
    return Document(**{"id": f"{name}:{number}", "file_path": name, **known})


def _shown(value: object) -> str:
    return "null" if value is None else f"{value!r:.60}"


def _parquet_rows(path: Path, name: str, work: Path) -> Iterator[tuple[int, Row]]:
    with open_parquet(path) as parquet:
        columns = [column for column in parquet.schema_arrow.names if column in _COLUMNS]
    yield from enumerate(_stream("parquet", path, name, work, columns=columns, batch_size=_BATCH_ROWS), start=1)


def _jsonl_rows(path: Path, name: str, work: Path) -> Iterator[tuple[int, Row]]:
    """Each line, read as text so that a bad one can be named and rows need not agree on their columns."""
    for number, line in enumerate(_stream("text", path, name, work, encoding="utf-8-sig"), start=1):
        if not line["text"].strip():
            continue
        try:
            row = json.loads(line["text"])
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"{name}, row {number}: not JSON ({error}), so its text is unknown; mend the line."
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{name}, row {number}: {_shown(row)} is not an object with a `text`; mend the line.")
        yield number, row


def _txt_rows(path: Path, name: str, work: Path) -> Iterator[tuple[int, Row]]:
    lines: list[str] = []
    size, number = 0, 1
    for row in _stream("text", path, name, work, encoding="utf-8-sig", keep_linebreaks=True):
        lines.append(row["text"])
        size += len(row["text"])
        if size >= TXT_CHARACTERS and (not row["text"].strip() or size >= _TXT_LIMIT):
            yield number, {"text": "".join(lines)}
            lines, size, number = [], 0, number + 1
    yield number, {"text": "".join(lines)}


def _stream(kind: str, path: Path, name: str, work: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of one file as `datasets` streams them: nothing is converted on disk, memory holds a batch.

    Raises:
        UserError: the file is damaged, cut short or not UTF-8.
    """
    load_dataset = _load_dataset()
    file = glob.escape(str(path.absolute()))
    before = 0
    try:
        data = load_dataset(
            kind, data_files=file, split="train", streaming=True, cache_dir=str(work / "datasets"), **options
        )
        for batch in data.iter(batch_size=_BATCH_ROWS):
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            yield from rows
            before += len(rows)
    except UserError:
        raise
    except (OSError, EOFError, ValueError) as error:  # Arrow's and the decoders' errors are among these
        why = " ".join(str(error).split())
        raise UserError(
            f"{name} cannot be read past row {before} ({why}), so it is damaged, cut short or not UTF-8 and text would "
            "be lost; fetch or make it again, or move it away."
        ) from None


def _load_dataset() -> Callable[..., Any]:
    """`datasets.load_dataset`, set up for reading local files."""
    import datasets
    import fsspec.compression  # type: ignore[import-untyped]
    import pyarrow as pa

    def open_zstd(file: Any, mode: str = "rb") -> pa.CompressedInputStream:  # noqa: ARG001  (fsspec's interface)
        return pa.CompressedInputStream(file, "zstd")

    datasets.config.TORCH_AVAILABLE = False  # else it imports torch to make its streams torch's
    # fsspec's own reader needs another package, and that one stops at the end of a file's first frame
    fsspec.compression.register_compression("zstd", open_zstd, "zst", force=True)
    loader: Callable[..., Any] = datasets.load_dataset
    return loader


_READERS: dict[str, Callable[[Path, str, Path], Iterator[tuple[int, Row]]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".jsonl.zst": _jsonl_rows,
    ".txt": _txt_rows,
}
"""How each kind of file is read: rows by their number in the file, from 1."""
