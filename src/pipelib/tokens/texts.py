"""Read text from parquet as arrays of bytes, cut into pieces that can be encoded separately without changing a token."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelib.corpus.parquet import text_column, utf8_or_none
from pipelib.corpus.raw import REPAIR, TEXT, damaged
from pipelib.errors import UserError
from pipelib.vocabulary.engines import Offsets, Texts

CHUNK_BYTES = 4 << 20
"""Bytes of text that are encoded at once."""
PIECE_BYTES = 1 << 20
"""A longer document is encoded in pieces of about this many bytes."""
LARGE_GROUP_BYTES, LARGE_GROUP_ROWS = 64 << 20, 16
"""A row group with more bytes of text is read this many rows at a time, because a few rows may hold most of the text."""
DICTIONARY_ROWS = 128
"""Rows read at a time if the file stores repeated texts only once. It then states less text than there is."""
_BUFFER_BYTES = 1 << 22


# ---- Reading ---------------------------------------------------------------------------------------------------------


def read_texts(
    path: Path, first_group: int, end_group: int, rows: int, column: str = TEXT, skip_bad: bool = False
) -> Iterator[Texts]:
    """Yield the documents of some row groups, a few megabytes at a time, or one longer document. Skip rows without text.

    Args:
        rows: how many rows to read, from the start of the first group.
        column: the column of the text.
        skip_bad: skip rows whose text is not UTF-8, too.

    Raises:
        UserError: the text cannot be read or is not UTF-8, or there are too few rows. The message names file and row.
    """
    row, left = 1, rows
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as parquet:
            row += sum(parquet.metadata.row_group(group).num_rows for group in range(first_group))
            waiting: list[Texts] = []
            for values in _columns(parquet, range(first_group, end_group), column):
                strings = utf8_or_none(values) if skip_bad else values
                texts = _texts_of(strings.slice(0, left), path, row)
                row, left = row + len(values), left - len(values)
                if waiting and sum(len(each.data) for each in (*waiting, texts)) > CHUNK_BYTES:
                    yield _join(waiting)  # before a long document, which stays alone because joining copies it
                    waiting = []
                if len(texts):
                    waiting.append(texts)
                if left <= 0:
                    break
            if waiting:
                yield _join(waiting)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, f"from row {row} on: {error}", REPAIR) from None
    if left > 0:
        raise damaged(path, f"it ends before row {row}, {left} rows early", REPAIR)


def _columns(parquet: pq.ParquetFile, groups: range, name: str) -> Iterator[pa.Array]:
    """Yield the column of text, a few rows at a time: the longer the average row, the fewer."""
    for number in groups:
        column = text_column(parquet.metadata, number, name)
        rows = CHUNK_BYTES * column.num_values // max(1, column.total_uncompressed_size)  # a chunk of average rows
        if column.total_uncompressed_size > LARGE_GROUP_BYTES:
            rows = min(rows, LARGE_GROUP_ROWS)
        elif any("DICTIONARY" in encoding for encoding in column.encodings):
            rows = min(rows, DICTIONARY_ROWS)
        for batch in parquet.iter_batches(max(1, rows), row_groups=[number], columns=[name], use_threads=False):
            yield batch.column(0)


def _texts_of(column: pa.Array, path: Path, row: int) -> Texts:
    """Return the texts of some rows, without those that are null or empty.

    Args:
        row: the number of the first row, for the message.

    Raises:
        UserError: a text is not UTF-8.
    """
    try:
        column.validate(full=True)  # Arrow does not check UTF-8 when it reads
        strings = column.cast(pa.large_string()).drop_null()
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        wrong = next((index for index, value in enumerate(values) if not _is_utf8(value or b"")), 0)
        raise UserError(
            f"{path}, row {row + wrong}: the text is not UTF-8, so it cannot be encoded; {REPAIR}."
        ) from None
    _, offsets, data = strings.buffers()
    if not data:
        return Texts(np.zeros(0, np.uint8), np.zeros(1, np.int64))
    # Use Arrow's buffers directly: no Python object per text.
    ends = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    first, last = int(ends[0]), int(ends[-1])
    bounds = np.append(ends[:-1][np.diff(ends) > 0], last) - first  # drop the starts of empty texts
    return Texts(np.frombuffer(data, np.uint8)[first:last], bounds)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _join(parts: list[Texts]) -> Texts:
    """Join texts into one array."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.data) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return Texts(np.concatenate([part.data for part in parts]), np.concatenate([*offsets, starts[-1:]]))


# ---- Pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Texts that are encoded at once, with long ones cut into pieces."""

    texts: Texts
    document: npt.NDArray[np.int64]
    """The index of each piece's document (pieces,)."""
    leads: npt.NDArray[np.bool_]
    """Whether each piece is the first of its document (pieces,)."""


def chunks(texts: Texts, pre_tokenizer: str) -> Iterator[Chunk]:
    """Yield all texts, about CHUNK_BYTES at a time.

    Args:
        pre_tokenizer: the name of the rule that splits text into words; a cut must not change them.
    """
    offsets, document = _pieces(texts, pre_tokenizer)
    leads = np.diff(document, prepend=-1) > 0
    start = 0
    while start < len(document):
        # At least one piece, even if it alone is longer than a chunk.
        end = max(start + 1, int(np.searchsorted(offsets, offsets[start] + CHUNK_BYTES, "right")) - 1)
        first, last = offsets[start], offsets[end]
        pieces = Texts(texts.data[first:last], offsets[start : end + 1] - first)
        yield Chunk(pieces, document[start:end], leads[start:end])
        start = end


def _pieces(texts: Texts, pre_tokenizer: str) -> tuple[Offsets, npt.NDArray[np.int64]]:
    """Return the offset of every piece, and the index of its document. Most documents are one piece."""
    long = np.diff(texts.offsets) > PIECE_BYTES
    ends = texts.offsets.tolist()
    cuts = [_cuts(texts.data, ends[index], ends[index + 1], pre_tokenizer) for index in np.flatnonzero(long).tolist()]
    document = np.arange(len(texts), dtype=np.int64)
    if not any(cuts):
        return texts.offsets, document
    # A text with n cuts has n + 1 pieces.
    pieces = np.ones(len(texts), np.int64)
    pieces[long] += [len(places) for places in cuts]
    offsets = np.sort(np.concatenate([texts.offsets, *(np.array(places, np.int64) for places in cuts)]))
    return offsets, np.repeat(document, pieces)


def _cuts(data: npt.NDArray[np.uint8], start: int, end: int, pre_tokenizer: str) -> list[int]:
    """Find places, about every PIECE_BYTES, where a long text can be cut without changing a token.

    Text is split into words before bytes are merged. The rules look ahead only within white space, and never look back. So
    these are always the end of a word, whatever follows: a character before white space, an ASCII letter before a digit, and
    a digit before an ASCII letter. Rules other than GPT-2's put line ends into the word of the punctuation before them, so
    only letters and digits end a word there. A text without such a place stays one piece.
    """
    # Search the window after each piece for a place; without one, the piece grows by a window.
    places: list[int] = []
    at = start + PIECE_BYTES
    while at < end:
        window = data[at - 1 : min(end, at + PIECE_BYTES)]
        place = next(
            (
                at + int(found)
                for found in _candidates(window)
                if _ends_word(data, start, at + int(found), pre_tokenizer)
            ),
            None,
        )
        if place is not None:
            places.append(place)
        at = (place if place is not None else at) + PIECE_BYTES
    return places


def _candidates(window: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the places where a text may be cut, judged by the byte before and the byte after."""
    before, after = window[:-1], window[1:]
    white = (after == 0x20) | (after == 0x0A) | (after == 0x0D) | (after == 0x09)
    letter_before, letter_after = _is_letter(before), _is_letter(after)
    digit_before, digit_after = _is_digit(before), _is_digit(after)
    changes = (letter_before & digit_after) | (digit_before & letter_after)
    return np.flatnonzero((white & (before > 0x20) & (before != 0x7F)) | changes)


def _is_letter(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return ((data | 0x20) >= 0x61) & ((data | 0x20) <= 0x7A)


def _is_digit(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return (data >= 0x30) & (data <= 0x39)


def _ends_word(data: npt.NDArray[np.uint8], start: int, place: int, pre_tokenizer: str) -> bool:
    """Return whether the character before a place ends a word. Python's white space includes all that is in GPT-2's."""
    before_line_end = pre_tokenizer != "gpt2" and data[place] in b"\r\n"
    if data[place - 1] < 0x80 and not before_line_end:
        return True
    # A character has at most 4 bytes; "ignore" drops the rest of the one before.
    tail = data[max(start, place - 4) : place].tobytes().decode("utf-8", "ignore")
    return bool(tail) and (tail[-1].isalnum() if before_line_end else not tail[-1].isspace())
