"""Read files as documents, in order, and write them as the corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelib.corpus.local_files import saved_parts, validation_names
from pipelib.corpus.local_formats import Reading, read_rows
from pipelib.corpus.local_rows import BadRowError, Tally, document_of
from pipelib.corpus.options import Options
from pipelib.corpus.params import PACKED, kind_of_name
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
        max_tokens: of the text for training, see `first_documents`.
        folder: for the parquet files.
        work: for text that waits for its place in the order.
        source: what printed lines begin with.

    Raises:
        UserError: a file or row cannot be used; the message names the file and the row.
    """
    tally, decoding = Tally(source), Decoding(options.encoding, options.stray_bytes)
    for_validation = validation_names(root, names, options.validation)
    for_training = [name for name in names if name not in for_validation]
    counts: dict[str, Any] = {}
    validation_documents = 0

    def read(names: Sequence[str]) -> Iterator[tuple[str, Document]]:
        # Each split has its own `auto`, so that more text for training leaves the documents for validation as they are.
        txt_bytes = sum(text_bytes(root / name) for name in names if kind_of_name(name) == ".txt")
        reading = Reading(options.text_column, decoding, Cut.of(options.split, options.separator, txt_bytes))
        return _read(root, names, reading, options, tally)

    def training() -> Iterator[Document]:
        if options.shuffle_seed is None:
            return (document for _, document in read(for_training))
        total = sum(text_bytes(root / name) for name in for_training)
        return shuffle(read(for_training), options.shuffle_seed, total, work / "shuffle")

    def documents() -> Iterator[Document]:
        nonlocal validation_documents
        for _, document in read(for_validation):
            validation_documents += 1
            yield document
        yield from first_documents(training(), max_tokens, counts)

    # `documents` is lazy, so only one row group is in memory at a time.
    written = write_raw(documents(), folder)
    tally.require_few_bad()
    tally.report(decoding)
    if for_validation and not validation_documents:
        raise UserError(
            f"download.validation: {', '.join(for_validation[:5])} has no text, so nothing could be validated; name other files."
        )
    more = {"stray_bytes_replaced": decoding.replaced} if options.stray_bytes == "replace" else {}
    counts = {**written.counts, **tally.counts(), **counts, **more}
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
                document = document_of(row, options.text_column, name, number, tally)
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


def text_bytes(path: Path) -> int:
    """Return the bytes of a file's text, about."""
    size = sum(part.stat().st_size for part in [path, *saved_parts(path)])
    return size * _UNPACKED if path.name.lower().endswith((*PACKED, ".parquet")) else size
