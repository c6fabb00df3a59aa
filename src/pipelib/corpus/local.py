"""The user's own text: parquet, jsonl, jsonl.gz, jsonl.zst and txt files of one folder, or one such file.

Files are taken in the order of their paths. What becomes a document:

- parquet, jsonl: each row, its text in the column `text`; FineWeb-Edu's other columns are kept, unknown ones are not.
- txt: the whole file; one of more than 100,000 characters is cut at the next empty line after each 100,000.

A text that is null or only white space is left out and counted. A text that is missing, not a string or not Unicode is
an error that names the file and the row: a corpus that silently lost rows would be a different one. A value of an optional
column that does not fit it becomes null and is counted.

Nothing here makes a request. `make bench-import` times it.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import orjson
import pyarrow as pa

from pipelib.corpus.local_files import LocalFiles, find_files
from pipelib.corpus.raw import SCHEMA, Document, Written, first_documents, open_parquet, write_raw
from pipelib.errors import UserError
from pipelib.files import sha256_files
from pipelib.progress import Progress

TXT_CHARACTERS = 100_000
"""Characters after which a txt file is cut at the next empty line."""
_TXT_LIMIT = 40 * TXT_CHARACTERS  # cut at any line, so that a file without an empty line stays within memory
_BLOCK_CHARACTERS = 1 << 20
_BATCH_ROWS = 1000
_SEPARATOR = "<|endoftext|>"
_LONGEST = 64  # bytes at the start of a file that tell what it is

_OWN = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1\x15"}
"""How files of a kind begin."""
_FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\n": "a pointer of git LFS, not the text; run `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex, not the text; run `git annex get`",
    _OWN[".gz"]: "compressed by gzip; name it .jsonl.gz if it is jsonl, or unpack it",
    _OWN[".zst"]: "compressed by zstd; name it .jsonl.zst if it is jsonl, or unpack it",
    _OWN[".parquet"]: "parquet; name it .parquet",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"%PDF-": "a PDF; extract its text",
    b"\xff\xfe\x00\x00": "UTF-32; convert it (iconv -f UTF-32 -t UTF-8)",
    b"\x00\x00\xfe\xff": "UTF-32; convert it (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
}
"""How files begin that are not what their names say: what they are, and what to do."""

Row = Mapping[str, Any]


@dataclass
class _Tally:
    """What was found that is not in the documents as it was in the files."""

    empty: int = 0
    """Texts that are null or only white space."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Values of optional columns that do not fit, by column."""
    separators: int = 0
    """How often texts spell `<|endoftext|>`."""
    with_separator: int = 0
    """In how many texts."""
    first: dict[str, str] = field(default_factory=dict)
    """By column, or `<|endoftext|>`: the file and row where it was met first."""

    def drop(self, column: str, where: str) -> None:
        """Count a value that its column cannot hold."""
        self.dropped[column] += 1
        self.first.setdefault(column, where)

    def separate(self, count: int, where: str) -> None:
        """Count what a text spells `<|endoftext|>`."""
        self.separators += count
        self.with_separator += 1
        self.first.setdefault(_SEPARATOR, where)

    def counts(self) -> dict[str, int]:
        """For the metrics."""
        return {
            "empty_dropped": self.empty,
            "values_dropped": self.dropped.total(),
            "end_of_text_strings": self.separators,
        }

    def report(self) -> None:
        """Say what the user should know."""
        for column, count in self.dropped.items():
            print(
                f"local: {count:,} values do not fit the column `{column}` ({SCHEMA.field(column).type}), so they are null in "
                f"the corpus; the first is in {self.first[column]}",
                flush=True,
            )
        if self.separators:
            print(
                f"local: {_SEPARATOR} occurs {self.separators:,} times in {self.with_separator:,} documents, first in "
                f"{self.first[_SEPARATOR]}. It is taken as text and separates nothing: if it stands between documents, "
                "split them first (docs/how-to/own-data.md says how)",
                flush=True,
            )


@dataclass(frozen=True)
class LocalSource:
    """The files under a folder that match a glob and are of a kind that can be read; hidden ones are ignored."""

    path: Path
    """A folder, or a single file."""
    pattern: str
    max_tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        """The name (inside the folder), size and SHA-256 of every file, and where the corpus ends if not with them.

        Raises:
            UserError: there is no folder or no file, or something in it that cannot be read.
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
            UserError: a file or a row that cannot be used, by name and number.
        """
        files, tally = self._files, _Tally()
        if files.ignored:
            more = f" and {len(files.ignored) - 5} more" if len(files.ignored) > 5 else ""
            shown = ", ".join(files.ignored[:5])
            print(f"local: these files are of a kind that is not read: {shown}{more}", flush=True)
        progress = Progress("local: reading files", None, "documents")

        def documents() -> Iterator[Document]:
            for name in files.names:
                for document in read_file(files.root / name, name, tally):
                    progress.add(1)
                    yield document

        counts: dict[str, int] = {}
        written = write_raw(first_documents(documents(), self.max_tokens, counts), folder)
        progress.close()
        tally.report()
        return replace(written, counts={**written.counts, **tally.counts(), **counts})


def read_file(path: Path, name: str, tally: _Tally) -> Iterator[Document]:
    """The documents of one file.

    Args:
        name: what messages and ids call the file.
        tally: counts what is left out.

    Raises:
        UserError: a row that cannot be used, or a damaged file.
    """
    ending = path.suffix.lower()
    read = {".parquet": _parquet_rows, ".txt": _txt_rows}.get(ending, _jsonl_rows)
    number = 0
    try:
        with path.open("rb") as file:
            _refuse_foreign(file.read(_LONGEST), ending, name)
        for number, row in read(path, name):
            document = _document(row, name, number, tally)
            if document is not None:
                yield document
    except UserError:
        raise
    except UnicodeDecodeError:
        raise _not_text(path, name) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:  # Arrow's are OSErrors and ValueErrors
        raise _damaged(name, number, error) from None


def _refuse_foreign(head: bytes, ending: str, name: str) -> None:
    """Refuse a file that begins like one of another kind."""
    for start, what in _FOREIGN.items():
        if head.startswith(start) and start != _OWN.get(ending):
            raise UserError(f"{name} is {what}. It was not read, since its text would be wrong.")


def _damaged(name: str, number: int, error: Exception) -> UserError:
    """The error for a file that cannot be read to its end."""
    why = " ".join(str(error).split()) or type(error).__name__
    if "too much memory" in why:  # libzstd's words for a window of more than 128 MB
        return UserError(
            f"{name} was compressed with a long window (zstd --long), which this reader does not have the memory for, so it "
            "was not read; pack it again: zstd -d --long=31 -c FILE | zstd -o NEW_FILE."
        )
    return UserError(
        f"{name} cannot be read after row {number} ({why}), so it is damaged or cut short and text would be lost; get or "
        "make it again, or move it away."
    )


def _not_text(path: Path, name: str) -> UserError:
    """The error for a file that is not UTF-8 or has NUL bytes, with the line where that begins."""
    number = 0
    with suppress(OSError, EOFError, zlib.error), _open_bytes(path) as file:
        for line in file:
            place = _first_bad_byte(line)
            if place is not None:
                number += 1 + _line_breaks(line[:place])
                byte = line[place]
                what = "a NUL byte" if byte == 0 else f"the byte 0x{byte:02x}, which is not UTF-8"
                encoding = "UTF-16" if byte == 0 else "CP1252"
                return UserError(
                    f"{name}, line {number}: there is {what}, so the file is in another encoding or damaged and its text "
                    f"would be wrong; convert it (for example iconv -f {encoding} -t UTF-8), or get it again."
                )
            number += _line_breaks(line)
    return _damaged(name, number, ValueError("not UTF-8"))


def _first_bad_byte(line: bytes) -> int | None:
    """Where a line first is not UTF-8 or has a NUL byte."""
    nul = line.find(b"\0")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start if nul < 0 else min(nul, error.start)
    return nul if nul >= 0 else None


def _line_breaks(data: bytes) -> int:
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


# ---- One row ---------------------------------------------------------------------------------------------------------


def _document(row: Row, name: str, number: int, tally: _Tally) -> Document | None:
    """A row as a document; None where its text is null or only white space."""
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
    """A row's text; empty where it is null.

    Raises:
        UserError: it cannot be tokenized.
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
    return value if isinstance(value, str) and _is_unicode(value) else None


def _as_float(value: object) -> object:
    """A whole number becomes the nearest float, as JSON's decimal numbers do."""
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
    """As `_as_int`; a negative number of tokens is not known."""
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
"""The optional columns, and what each keeps of a value: None where it cannot hold it."""


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ---- Kinds of files --------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:  # noqa: ARG001  (as its neighbours)
    with open_parquet(path) as parquet:
        names = parquet.schema_arrow.names
        columns = [column for column in SCHEMA.names if names.count(column) == 1]
        number = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns):
            for row in zip(*map(_values, batch.columns), strict=True):
                number += 1
                yield number, dict(zip(batch.schema.names, row, strict=True))


def _values(column: pa.Array) -> list[object]:
    """A column's values: strings, numbers and None; bytes where a string is not UTF-8; its type for every other value."""
    while pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return cast("list[object]", column.to_pylist())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return [kind if valid else None for valid in column.is_valid().to_pylist()]
    try:
        return cast("list[object]", column.to_pylist())
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value and value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _jsonl_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Each line, read as text so that a bad one can be named and rows need not agree on their columns."""
    with _open_text(path, name) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = _parse(line)
            except (ValueError, RecursionError) as error:
                if "\0" in line:
                    raise _not_text(path, name) from None
                raise UserError(
                    f"{name}, row {number}: this line is not JSON ({error}), so its text is unknown; fix this row."
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{name}, row {number}: {row!r:.60} is not an object with a `text`, so the row is not a document; fix "
                    "this row."
                )
            yield number, row


def _parse(line: str) -> Any:
    """The value of a line of JSON. orjson takes half the time, and refuses what `json` takes or can say better."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _txt_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """The whole file, or what lies between its cuts."""
    number, text = 1, ""
    with _open_text(path, name) as file:
        while block := file.read(_BLOCK_CHARACTERS) + file.readline():
            if "\0" in block:
                raise _not_text(path, name)
            text += block
            start = 0
            while end := _cut(text, start):
                yield number, {"text": text[start:end]}
                start, number = end, number + 1
            text = text[start:]
    if text or number == 1:
        yield number, {"text": text}


def _cut(text: str, start: int) -> int:
    """Where the document that begins at `start` ends; 0 where that takes more of the file."""
    end = text.find("\n", start + TXT_CHARACTERS - 1) + 1
    while end:
        line = text.rfind("\n", start, end - 1) + 1
        if end - start >= _TXT_LIMIT or text[line:end].isspace():
            return end
        end = text.find("\n", end) + 1
    return 0


def _open_text(path: Path, name: str) -> io.TextIOWrapper:
    """A file's text: unpacked where its name says so, every line end as `\\n`, without a byte order mark of UTF-8."""
    file = _open_bytes(path)
    if path.suffix.lower() in _OWN:  # what is packed may be packed again, or another encoding
        _refuse_foreign(file.peek(_LONGEST), "", f"{name}, unpacked,")
    return io.TextIOWrapper(file, encoding="utf-8-sig")


def _open_bytes(path: Path) -> Any:
    """A file's bytes, unpacked where its name says so: a stream that can be read by lines, and peeked into."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")
