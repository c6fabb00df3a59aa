"""The user's own text: parquet, jsonl, jsonl.gz, jsonl.zst and txt files of one folder, or one such file.

Files are read in the order of their paths. These become documents:

- parquet, jsonl: each row, with its text in the column `text`. FineWeb-Edu's other columns are kept, unknown ones are not.
- txt: the whole file. A file of more than 100,000 characters is cut at the next empty line after each 100,000.

A text that is null or only white space is left out and counted. A text that is missing, not a string or not Unicode is
an error that names the file and the row, because rows must not get lost silently. A value that does not fit its optional
column becomes null and is counted.

Nothing here makes a request. `make bench-import` times it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelib.corpus.local_files import LocalFiles, find_files
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.raw import Document, Source, Written, first_documents
from pipelib.errors import UserError, tell
from pipelib.files import is_unicode, sha256_files
from pipelib.progress import Progress

if TYPE_CHECKING:
    from pipelib.corpus.local_formats import Row

_SEPARATOR = "<|endoftext|>"


@dataclass
class _Tally:
    """Counts of what differs between the files and the documents made from them."""

    empty: int = 0
    """Texts that are null or only white space."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Values that do not fit their optional column, by column."""
    separators: int = 0
    """How often `<|endoftext|>` occurs in texts."""
    with_separator: int = 0
    """How many texts contain it."""
    first: dict[str, str] = field(default_factory=dict)
    """By column, or `<|endoftext|>`: the file and row of the first occurrence."""

    def drop(self, column: str, where: str) -> None:
        """Count a value that its column cannot hold."""
        self.dropped[column] += 1
        self.first.setdefault(column, where)

    def separate(self, count: int, where: str) -> None:
        """Count the occurrences of `<|endoftext|>` in a text."""
        self.separators += count
        self.with_separator += 1
        self.first.setdefault(_SEPARATOR, where)

    def counts(self) -> dict[str, int]:
        """Return the counts for the metrics."""
        return {
            "empty_dropped": self.empty,
            "values_dropped": self.dropped.total(),
            "end_of_text_strings": self.separators,
        }

    def report(self) -> None:
        """Print what the user should know."""
        from pipelib.corpus.parquet import SCHEMA

        for column, count in self.dropped.items():
            tell(
                f"local: values that do not fit the column `{column}` ({SCHEMA.field(column).type}) are null in the corpus: "
                f"{count:,}, the first in {self.first[column]}"
            )
        if self.separators:
            tell(
                f"local: texts contain {_SEPARATOR} (occurrences: {self.separators:,}, documents: {self.with_separator:,}, "
                f"first in {self.first[_SEPARATOR]}). It is treated as ordinary text and separates nothing: if it stands "
                "between documents, split them first (docs/how-to/own-data.md says how)"
            )


def source(params: DownloadParams) -> Source:
    """Return this source, with its parameters."""
    return LocalSource(Path(params.path), params.pattern, params.max_tokens)


@dataclass(frozen=True)
class LocalSource:
    """The files under a folder that match a glob, are of a readable kind and are not hidden."""

    path: Path
    """A folder, or a single file."""
    pattern: str
    max_tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        """Return the name (inside the folder), size and SHA-256 of every file, and `max_tokens` if it is set.

        Raises:
            UserError: there is no folder or no file, or something in the folder cannot be read.
        """
        identity = {"kind": "local", "files": self._described}
        return identity if self.max_tokens is None else {**identity, "max_tokens": self.max_tokens}

    @cached_property
    def _files(self) -> LocalFiles:
        return find_files(self.path, self.pattern)

    @cached_property
    def _described(self) -> list[dict[str, Any]]:
        paths = [self._files.root / name for name in self._files.names]
        return [
            {"name": name, "bytes": path.stat().st_size, "sha256": sha256}
            for name, path, sha256 in zip(self._files.names, paths, sha256_files(paths), strict=True)
        ]

    def write(self, folder: Path, work: Path) -> Written:  # noqa: ARG002  (quick enough to start again)
        """Read every file and write its documents.

        Raises:
            UserError: a file or row cannot be used; the message names the file and the row.
        """
        from pipelib.corpus.local_formats import read_rows
        from pipelib.corpus.parquet import write_raw

        files, tally = self._files, _Tally()
        if files.ignored:
            more = f" and {len(files.ignored) - 5} more" if len(files.ignored) > 5 else ""
            shown = ", ".join(files.ignored[:5])
            tell(f"local: these files are ignored, because their kind cannot be read: {shown}{more}")
        progress = Progress("local: reading files", None, "documents")

        def documents() -> Iterator[Document]:
            for name in files.names:
                for number, row in read_rows(files.root / name, name):
                    document = _document(row, name, number, tally)
                    if document is not None:
                        progress.add(1)
                        yield document

        # `documents` is lazy, so only one row group is in memory at a time.
        counts: dict[str, int] = {}
        written = write_raw(first_documents(documents(), self.max_tokens, counts), folder)
        progress.close()
        tally.report()
        return replace(written, counts={**written.counts, **tally.counts(), **counts})


# ---- One row ---------------------------------------------------------------------------------------------------------


def _document(row: "Row", name: str, number: int, tally: _Tally) -> Document | None:
    """Make a document from a row; None if its text is null or only white space."""
    where = f"{name}, row {number}"
    if "text" not in row:
        raise UserError(
            f"{where}: there is no `text` (only {', '.join(row) or 'an empty object'}), so the row is not a document; add or "
            "rename the column."
        )
    text = _text(row["text"], where)
    if not text or text.isspace():
        tally.empty += 1
        return None
    if _SEPARATOR in text:
        tally.separate(text.count(_SEPARATOR), where)
    # The file's name and the row are the defaults; the file's own columns replace them.
    values: dict[str, Any] = {"id": f"{name}:{number}", "file_path": name}
    for column, value in row.items():
        if column in _OPTIONAL and value is not None:
            usable = _OPTIONAL[column](value)
            if usable is None:
                tally.drop(column, where)
            else:
                values[column] = usable
    return Document(text, **values)


def _text(value: object, where: str) -> str:
    """Return a row's text; empty if it is null.

    Raises:
        UserError: the text cannot be tokenized.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        raise UserError(f"{where}: `text` is not UTF-8 ({value!r:.60}), so it cannot be tokenized; fix this row.")
    if not isinstance(value, str):
        raise UserError(f"{where}: `text` is {value!r:.60}, not a string, so it cannot be tokenized; fix this row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: `text` is not Unicode ({error.reason}), so it has no UTF-8; fix this row.") from None
    return value


def _as_text(value: object) -> object:
    return value if isinstance(value, str) and is_unicode(value) else None


def _as_float(value: object) -> object:
    """Convert an int to the nearest float, as JSON's decimal numbers are converted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _as_int(value: object) -> object:
    fits = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return value if fits else None


def _as_count(value: object) -> object:
    """Like `_as_int`, but a negative number of tokens counts as unknown."""
    return _as_int(value) if not isinstance(value, int) or value >= 0 else None


_OPTIONAL: dict[str, Callable[[object], object]] = {
    "id": _as_text,
    "dump": _as_text,
    "url": _as_text,
    "file_path": _as_text,
    "language": _as_text,
    "language_score": _as_float,
    "token_count": _as_count,
    "score": _as_float,
    "int_score": _as_int,
}
"""The optional columns, each with the function that converts a value; it returns None if the value does not fit."""
