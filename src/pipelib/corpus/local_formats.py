"""Read the user's files as rows: parquet, jsonl, jsonl.gz, jsonl.zst and txt."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import orjson
import pyarrow as pa

from pipelib.corpus.parquet import SCHEMA, open_parquet
from pipelib.errors import UserError

TXT_CHARACTERS = 100_000
"""A txt file is cut at the next empty line after this many characters."""
_TXT_LIMIT = 40 * TXT_CHARACTERS  # then cut at any line, so that a file without empty lines fits in memory
_BLOCK_CHARACTERS = 1 << 20
_BATCH_ROWS = 1000
_LONGEST = 64  # bytes at the start of a file that are enough to tell its kind

_OWN = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1\x15"}
"""The first bytes of files of each kind."""
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
"""The first bytes of files that are not what their names say, with what they are and what to do."""

Row = Mapping[str, Any]


def read_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Yield the rows of one file with their numbers, from 1. A txt file has one row, with a `text`, per document.

    Args:
        name: what messages call the file.

    Raises:
        UserError: the file is damaged, cut short, not UTF-8, or not what its name says; or a line is not an object.
    """
    ending = path.suffix.lower()
    read = {".parquet": _parquet_rows, ".txt": _txt_rows}.get(ending, _jsonl_rows)
    number = 0
    try:
        with path.open("rb") as file:
            head = file.read(_LONGEST)
        if not head and ending in (".gz", ".zst"):
            raise EOFError("it is empty")  # gzip and zstd would read it as empty text
        _refuse_foreign(head, ending, name)
        for number, row in read(path, name):
            yield number, row
    except UserError:
        raise
    except UnicodeDecodeError:
        raise _not_text(path, name) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:  # Arrow's are OSErrors and ValueErrors
        raise _damaged(name, number, error) from None


# ---- Kinds of files --------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:  # noqa: ARG001  (the same signature as the other readers)
    with open_parquet(path) as parquet:
        names = parquet.schema_arrow.names
        columns = [column for column in SCHEMA.names if names.count(column) == 1]  # skip ambiguous ones
        number = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns):
            for row in zip(*map(_values, batch.columns), strict=True):
                number += 1
                yield number, dict(zip(batch.schema.names, row, strict=True))


def _values(column: pa.Array) -> list[object]:
    """Return a column's values: strings, numbers and None. Strings that are not UTF-8 stay bytes.

    In a column of another type, each value is represented by the type.
    """
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
    """Yield each line as a row. Lines are read as text, so that errors can name them and rows may have different columns."""
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
    """Parse a line of JSON. orjson is twice as fast; `json` accepts more, and its errors are clearer."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _txt_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Yield the whole file as one row, or a row for each piece if the file is cut."""
    number, text = 1, ""
    with _open_text(path, name) as file:
        while block := file.read(_BLOCK_CHARACTERS) + file.readline():  # whole lines, because cuts are at line ends
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
    """Return where the document that begins at `start` ends; 0 if more of the file is needed to tell."""
    end = text.find("\n", start + TXT_CHARACTERS - 1) + 1
    while end:
        line = text.rfind("\n", start, end - 1) + 1
        if end - start >= _TXT_LIMIT or text[line:end].isspace():
            return end
        end = text.find("\n", end) + 1
    return 0


def _open_text(path: Path, name: str) -> io.TextIOWrapper:
    """Open a file as text: unpacked if its name says so, every line end as `\\n`, without UTF-8's byte order mark."""
    file = _open_bytes(path)
    if path.suffix.lower() in _OWN:  # the content may be compressed twice, or have another encoding
        _refuse_foreign(file.peek(_LONGEST), "", f"{name}, unpacked,")
    return io.TextIOWrapper(file, encoding="utf-8-sig")


def _open_bytes(path: Path) -> Any:
    """Open a file as bytes, unpacked if its name says so. The stream can be read by lines, and has `peek`."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


# ---- What is wrong with a file ----------------------------------------------------------------------------------------


def _refuse_foreign(head: bytes, ending: str, name: str) -> None:
    """Refuse a file that begins like one of another kind."""
    for start, what in _FOREIGN.items():
        if head.startswith(start) and start != _OWN.get(ending):
            raise UserError(f"{name} is {what}. It was not read, because its text would be wrong.")


def _damaged(name: str, number: int, error: Exception) -> UserError:
    """Return the error for a file that cannot be read to its end."""
    why = " ".join(str(error).split()) or type(error).__name__
    if "too much memory" in why:  # libzstd's message for a window of more than 128 MB
        return UserError(
            f"{name} was compressed with a long window (zstd --long), which needs more memory than allowed here, so it "
            "was not read; compress it again: zstd -d --long=31 -c FILE | zstd -o NEW_FILE."
        )
    return UserError(
        f"{name} cannot be read after row {number} ({why}), so it is damaged or cut short and text would be lost; get or "
        "make it again, or move it away."
    )


def _not_text(path: Path, name: str) -> UserError:
    """Return the error for a file that is not UTF-8 or has NUL bytes, with the first such line."""
    number = 0
    with suppress(OSError, EOFError, zlib.error), _open_bytes(path) as file:
        for line in file:
            position = _first_bad_byte(line)
            if position is not None:
                number += 1 + _line_breaks(line[:position])
                byte = line[position]
                what = "a NUL byte" if byte == 0 else f"the byte 0x{byte:02x}, which is not UTF-8"
                encoding = "UTF-16" if byte == 0 else "CP1252"
                return UserError(
                    f"{name}, line {number}: there is {what}, so the file is in another encoding or damaged and its text "
                    f"would be wrong; convert it (for example iconv -f {encoding} -t UTF-8), or get it again."
                )
            number += _line_breaks(line)
    return _damaged(name, number, ValueError("not UTF-8"))


def _first_bad_byte(line: bytes) -> int | None:
    """Return the position of the first byte of a line that is NUL or not UTF-8; None if there is none."""
    nul = line.find(b"\0")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start if nul < 0 else min(nul, error.start)
    return nul if nul >= 0 else None


def _line_breaks(data: bytes) -> int:
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
