"""Read the user's files as rows: parquet, JSON, csv, txt, and folders that `datasets` saved; most of them also compressed."""

import csv
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import orjson
import pyarrow as pa

from pipelib.corpus.local_files import saved_parts
from pipelib.corpus.local_rows import BadRowError, Row
from pipelib.corpus.params import kind_of_name
from pipelib.corpus.parquet import SCHEMA, open_parquet, require_text
from pipelib.corpus.split import Cut, cut_text
from pipelib.corpus.text_files import Decoding, damaged_file, require_intact
from pipelib.corpus.tsv_quotes import has_quoting
from pipelib.errors import UserError
from pipelib.schema import kind_of

_BATCH_ROWS = 1000
_BLOCK_CHARACTERS = 1 << 20

Numbered = tuple[int, Row | BadRowError]
"""A row, or what is wrong with it, and its number in the file, from 1."""


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_column: str | None
    """The column of a document's text; None reads all columns as they are, for rows that are not documents."""
    decoding: Decoding
    cut: Cut
    """How txt files are cut into documents."""


@dataclass(frozen=True)
class Slice:
    """A part of a large file, so that several processes can read it. A file whose rows cannot be found has one slice."""

    start: int = 0
    """Where it begins: a row group of a parquet file, a byte of a jsonl file."""
    end: int | None = None
    """Where the next one begins; None for the last one."""
    before: int = 0
    """The file's rows before it."""


WHOLE = Slice()
"""The slice that is a whole file."""


def read_rows(path: Path, name: str, reading: Reading, rows: Slice = WHOLE) -> Iterator[Numbered]:
    """Yield the rows of one file. A txt file has one row per document, with its text in the text column.

    Args:
        name: what messages call the file.

    Raises:
        UserError: the file is damaged, cut short, has another encoding, or is not what its name says.
    """
    number = rows.before
    try:
        require_intact(path, name)
        for number, row in _reader(path)(path, name, reading, rows):
            yield number, row
    except UserError:
        raise
    except UnicodeError:
        raise reading.decoding.not_text(path, name) from None
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, lzma.LZMAError) as error:
        raise damaged_file(name, number, error) from None


def _reader(path: Path) -> Callable[[Path, str, Reading, Slice], Iterator[Numbered]]:
    """Return what reads a file, by the ending of its name."""
    if saved_parts(path):
        return _whole(_saved_rows)
    match kind_of_name(path.name):
        case ".parquet":
            return _parquet_rows
        case ".json":
            return _whole(_json_rows)
        case ".csv" | ".tsv":
            return _whole(_csv_rows)
        case ".txt":
            return _whole(_txt_rows)
        case _:
            return _jsonl_rows


def _whole(
    read: Callable[[Path, str, Reading], Iterator[Numbered]],
) -> Callable[[Path, str, Reading, Slice], Iterator[Numbered]]:
    """Make a reader of slices of one whose files have a single slice."""
    return lambda path, name, reading, _: read(path, name, reading)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, name: str, reading: Reading, rows: Slice) -> Iterator[Numbered]:  # noqa: ARG001  (as all readers)
    with open_parquet(path, column=reading.text_column) as parquet:
        if reading.text_column is None:
            yield from _whole_rows(parquet.iter_batches(_BATCH_ROWS))
            return
        columns = _columns(parquet.schema_arrow.names, reading)
        groups = range(parquet.num_row_groups)[rows.start : rows.end]
        batches = parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns)
        yield from _arrow_rows(batches, reading, rows.before)


def _saved_rows(path: Path, name: str, reading: Reading) -> Iterator[Numbered]:
    """Yield the rows of a folder that `Dataset.save_to_disk` wrote."""
    from datasets import load_from_disk

    if len(saved_parts(path)) == 1:  # no rows: `datasets` fails
        return
    dataset = load_from_disk(str(path.parent))
    if reading.text_column is None:
        tables = dataset.with_format("arrow").iter(_BATCH_ROWS)
        yield from _whole_rows(batch for table in tables for batch in table.to_batches())
        return
    require_text(dataset.features.arrow_schema, name, "set download.text_column", reading.text_column)
    chosen = dataset.select_columns(_columns(dataset.column_names, reading)).with_format("arrow")
    yield from _arrow_rows((batch for table in chosen.iter(_BATCH_ROWS) for batch in table.to_batches()), reading)


def _whole_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Numbered]:
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _columns(names: list[str], reading: Reading) -> list[str]:
    """Return which of a table's columns are read. Ambiguous ones are not."""
    return [name for name in dict.fromkeys((*SCHEMA.names, reading.text_column)) if names.count(str(name)) == 1]


def _arrow_rows(batches: Iterator[pa.RecordBatch], reading: Reading, before: int = 0) -> Iterator[Numbered]:
    number = before
    for batch in batches:
        columns = [
            _values(column, reading.decoding if name == reading.text_column else None)
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        ]
        for row in zip(*columns, strict=True):
            number += 1
            yield number, dict(zip(batch.schema.names, row, strict=True))


def _values(column: pa.Array, decoding: Decoding | None) -> list[object]:
    """Return a column's values: strings, numbers and None. Strings with stray bytes stay bytes.

    In a column of another type, each value is represented by the type.

    Args:
        decoding: for the column of text, which may hold bytes.
    """
    while pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return cast("list[object]", column.to_pylist())
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not is_string and (decoding is None or pa.types.is_null(kind)):
        return [kind if valid else None for valid in column.is_valid().to_pylist()]
    if is_string:
        with suppress(UnicodeDecodeError):
            return cast("list[object]", column.to_pylist())
    decoding = decoding or Decoding("utf-8", "refuse")
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return [_decoded(value, decoding, is_string) for value in values]


def _decoded(value: bytes | None, decoding: Decoding, is_utf8: bool) -> str | bytes | None:
    try:
        return None if value is None else decoding.decode(value, is_utf8=is_utf8)
    except UnicodeDecodeError:
        return value


def _csv_rows(path: Path, name: str, reading: Reading) -> Iterator[Numbered]:
    """Yield the rows of a csv or tsv file, whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    kind = kind_of_name(name)[1:]
    delimiter = {"csv": ",", "tsv": "\t"}[kind]
    is_quoted = kind == "csv" or has_quoting(path, name, reading.decoding)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    with reading.decoding.open(path, name, newline="") as file:  # a line end may be part of a text
        lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        header = next(lines, [])
        _require_text_column(header, name, reading.text_column)
        number = 0
        while True:
            before = lines.line_num
            try:
                values = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                if lines.line_num - before > 1:  # the lines after an open quote are in this row
                    raise ValueError(f"line {before + 1} opens a quote that is not closed well: {error}") from None
                number += 1
                what = f"{name}, row {number}: line {lines.line_num} is not {kind} ({error}), so its text is unknown"
                yield number, BadRowError(f"not {kind}", what)
                continue
            if any("\0" in value for value in values):
                raise reading.decoding.not_text(path, name)
            if values:  # not for an empty line
                number += 1
                yield number, _csv_row(f"{name}, row {number}", header, values)


def _require_text_column(header: list[str], name: str, text_column: str | None) -> None:
    if text_column is None:
        return
    count = header.count(text_column)
    if count == 1:
        return
    found = f"{name} has {f'{count} columns' if count else 'no column'} `{text_column}` in its first line"
    shown = ", ".join(header)[:200].encode("unicode_escape").decode("ascii")
    remedy = "set download.text_column, or add a first line that names the columns"
    if len(header) == 1 and ";" in header[0]:
        remedy = "its values seem to be separated by semicolons: write it again with commas, or with tabs as .tsv"
    raise UserError(f"{found} ({shown}), so it is unknown which is the text; {remedy}.")


def _csv_row(where: str, header: list[str], values: list[str]) -> Row | BadRowError:
    if len(values) != len(header):
        reason = "too many values" if len(values) > len(header) else "too few values"
        return BadRowError(
            reason, f"{where} has {len(values)} values for {len(header)} columns, so it is unknown which is the text"
        )
    row: dict[str, Any] = dict(zip(header, values, strict=True))
    for column in row.keys() & _NUMBERS:
        row[column] = _number(row[column])
    return row


_NUMBERS = {field.name for field in SCHEMA if not pa.types.is_string(field.type)}


def _number(value: str) -> object:
    """Return a number of a csv file; None if there is none, and the value itself if it is not a number."""
    try:
        number = float(value.replace("_", "?"))  # Python would read 1_0 as 10
    except ValueError:
        return value or None
    return int(number) if number.is_integer() else number


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, name: str, reading: Reading, rows: Slice) -> Iterator[Numbered]:
    """Yield each line as a row. Lines are read as text, so that errors can name them and rows may have different columns."""
    with reading.decoding.open(path, name, start=rows.start, end=rows.end) as file:
        for number, line in enumerate(file, start=rows.before + 1):
            if line.isspace():
                continue
            try:
                row = _parse(line)
            except (ValueError, RecursionError) as error:
                if "\0" in line:
                    raise reading.decoding.not_text(path, name) from None
                what = f"{name}, row {number}: this line is not JSON ({error}), so its text is unknown"
                yield number, BadRowError(_json_defect(line, error), what)
            else:
                yield number, _object(row, f"{name}, row {number}")


def _parse(line: str) -> Any:
    """Parse a line of JSON. orjson is twice as fast; `json` accepts more, and its errors are clearer."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _json_defect(line: str, error: Exception) -> str:
    """Return a name for what is wrong with a line, for counting."""
    if isinstance(error, RecursionError):
        return "JSON is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        if error.msg == "Extra data":
            return "text after JSON"
        if error.msg.startswith("Unterminated string") or error.pos >= len(line.rstrip()):
            return "JSON is cut short"
    return "not JSON"


def _json_rows(path: Path, name: str, reading: Reading) -> Iterator[Numbered]:
    """Yield each object as a row: those of an array, or those that follow each other."""
    with reading.decoding.open(path, name) as file:
        for number, value in enumerate(_json_values(file), start=1):
            yield number, _object(value, f"{name}, row {number}")


def _object(value: Any, where: str) -> Row | BadRowError:
    if isinstance(value, dict):
        return value
    what = f"{where}: {value!r:.60} is not an object with a text, so the row is not a document"
    return BadRowError(f"row is {kind_of(value)}", what)


def _json_values(file: io.TextIOBase) -> Iterator[Any]:
    """Yield the values of an array, or values that follow each other. Memory holds a block of the file, or one value.

    Raises:
        ValueError: something is not JSON, or the array does not end.
    """
    decoder, text, ended = json.JSONDecoder(), "", False
    in_array = False
    while not ended:
        block = file.read(max(_BLOCK_CHARACTERS, len(text)))  # twice as much each time if a value is longer
        text, position, ended = text + block, 0, not block
        while True:
            position = cast("re.Match[str]", (_BETWEEN if in_array else _SPACE).match(text, position)).end()
            if position == len(text):
                break
            if text[position] == ("]" if in_array else "["):  # several arrays may follow each other
                in_array, position = not in_array, position + 1
                continue
            try:
                value, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                if ended:
                    raise ValueError(f"{text[position:][:40]!r} is not JSON: {error.msg}") from None
                break
            if isinstance(value, int | float) and not ended and not _AFTER_NUMBER.match(text, end):
                break  # it may continue in the next block
            if isinstance(value, list) and any(isinstance(item, dict) for item in value):
                raise ValueError("an array is inside of an array, and it is unknown which has the documents")
            yield value
            position = end
        text = text[position:]
    if in_array:
        raise ValueError("its array does not end")


_SPACE, _BETWEEN, _AFTER_NUMBER = re.compile(r"\s*"), re.compile(r"[\s,]*"), re.compile(r"[\s,\]]")


# ---- Text ------------------------------------------------------------------------------------------------------------


def _txt_rows(path: Path, name: str, reading: Reading) -> Iterator[Numbered]:
    """Yield a row for each document of the file; see `split.py`."""
    with reading.decoding.open(path, name) as file:
        for number, text in enumerate(cut_text(file, reading.cut), start=1):
            if "\0" in text:
                raise reading.decoding.not_text(path, name)
            yield number, {str(reading.text_column): text}
