"""Read files as documents, in order, and write them as the corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelib.corpus.local_files import visible_matches
from pipelib.corpus.local_formats import Reading, read_rows
from pipelib.corpus.local_rows import BadRowError, Tally, document_of
from pipelib.corpus.options import Options
from pipelib.corpus.params import PACKED
from pipelib.corpus.parquet import write_raw
from pipelib.corpus.raw import Document, Written, first_documents
from pipelib.corpus.shuffle import shuffle
from pipelib.corpus.split import Cut
from pipelib.corpus.text_files import Decoding
from pipelib.errors import UserError
from pipelib.progress import Progress

_UNPACKED = 5
"""Bytes of text in a byte of a compressed file, about."""


def write_documents(
    root: Path,
    names: Sequence[str],
    options: Options,
    max_tokens: int | None,
    folder: Path,
    work: Path,
    source: str = "local",
) -> Written:
    """Read files and write their documents as parquet.

    Args:
        root: the folder that the names are relative to.
        names: the files, in order.
        max_tokens: see `first_documents`.
        folder: for the parquet files.
        work: for text that waits for its place in the order.
        source: what printed lines begin with.

    Raises:
        UserError: a file or row cannot be used; the message names the file and the row.
    """
    tally, decoding = Tally(source), Decoding(options.encoding, options.stray_bytes)
    txt_bytes = sum(_text_bytes(root / name) for name in names if ".txt" in name.lower())
    reading = Reading(options.text_column, decoding, Cut.of(options.split, options.separator, txt_bytes))
    for_validation = _validation_names(root, names, options.validation)
    for_training = [name for name in names if name not in for_validation]
    validation_documents = 0

    def documents() -> Iterator[Document]:
        nonlocal validation_documents
        for _, document in _read(root, for_validation, reading, options, tally):
            validation_documents += 1
            yield document
        rest = _read(root, for_training, reading, options, tally)
        if options.shuffle_seed is None:
            yield from (document for _, document in rest)
        else:
            total = sum(_text_bytes(root / name) for name in for_training)
            yield from shuffle(rest, options.shuffle_seed, total, work / "shuffle")

    # `documents` is lazy, so only one row group is in memory at a time.
    counts: dict[str, Any] = {}
    written = write_raw(first_documents(documents(), max_tokens, counts), folder)
    tally.require_few_bad()
    tally.report(decoding)
    counts = {**written.counts, **tally.counts(), **counts}
    if options.stray_bytes == "replace":
        counts["stray_bytes_replaced"] = decoding.replaced
    return replace(written, counts=counts, validation_documents=validation_documents if for_validation else None)


def _read(
    root: Path, names: Sequence[str], reading: Reading, options: Options, tally: Tally
) -> Iterator[tuple[str, Document]]:
    """Yield the documents of some files, each with its file and row."""
    progress = Progress(f"{tally.source}: reading files", None, "documents")
    for name in names:
        for number, row in read_rows(root / name, name, reading):
            tally.rows += 1
            try:
                if isinstance(row, BadRowError):
                    raise row
                document = document_of(row, reading.text_column, name, number, tally)
            except BadRowError as bad:
                if options.bad_rows == "refuse":
                    raise
                tally.skip(bad)
                continue
            if document is not None:
                progress.add(1)
                yield f"{name}:{number}", document
    if names:
        progress.close()


def _text_bytes(path: Path) -> int:
    """Return the bytes of a file's text, about."""
    size = path.stat().st_size
    return size * _UNPACKED if path.name.lower().endswith((*PACKED, ".parquet")) else size


def _validation_names(root: Path, names: Sequence[str], pattern: str | None) -> list[str]:
    """Return the files whose documents are the validation split, in order.

    Raises:
        UserError: no file matches, or all do.
    """
    if pattern is None:
        return []
    matches = {name.as_posix() for name in visible_matches(root, pattern)}
    found = [name for name in names if name in matches]
    if not found or len(found) == len(names):
        which = "none" if not found else "each"
        raise UserError(
            f"download.validation: {pattern!r} matches {which} of the {len(names)} files that are read, so there would be no "
            f"text for {'validation' if not found else 'training'}; name some of them, or set it to null."
        )
    return found
