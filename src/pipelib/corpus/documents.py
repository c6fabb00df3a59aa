"""Read files as documents, in order and on all cores, and write them as the corpus."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelib.corpus.bundles import FileSlice, bundles_of, text_bytes, useful_processes
from pipelib.corpus.local_files import validation_names
from pipelib.corpus.local_formats import WHOLE, Reading, read_rows
from pipelib.corpus.local_rows import BadRowError, Tally, document_of
from pipelib.corpus.options import Options
from pipelib.corpus.params import kind_of_name
from pipelib.corpus.parquet import file_name, write_raw
from pipelib.corpus.raw import Document, Written, first_documents
from pipelib.corpus.shuffle import shuffle
from pipelib.corpus.split import Cut
from pipelib.corpus.text_files import Decoding
from pipelib.errors import UserError
from pipelib.files import sync_folder
from pipelib.pool import Pool
from pipelib.processes import worker_count
from pipelib.progress import Progress


@dataclass(frozen=True)
class WrittenBundle:
    """The documents of a bundle, as parquet files."""

    written: Written
    tally: Tally


@dataclass(frozen=True)
class FileImport:
    """How files become the corpus. Its bundles can be written in any process."""

    root: Path
    """The folder that the names are relative to."""
    validation: Reading
    """How the files for validation are read."""
    training: Reading
    """How the others are read. Each split has its own `split: auto`, so that more text for training leaves the documents for
    validation as they are."""
    for_validation: frozenset[str]
    """The names of the files for validation."""
    options: Options
    max_tokens: int | None
    """Of the text for training, see `first_documents`."""
    scratch: Path
    """For text that waits for its place in the order."""

    @property
    def is_in_one_piece(self) -> bool:
        """Whether a document's place depends on those before it."""
        return self.max_tokens is not None or self.options.shuffle_seed is not None

    def write(self, bundle: Sequence[FileSlice], folder: Path, progress: Progress | None = None) -> WrittenBundle:
        """Write the documents of a bundle, which has files for validation before those for training.

        Raises:
            UserError: a file or row cannot be used; the message names the file and the row.
        """
        tally, counts = Tally(), dict[str, Any]()
        decoding, replaced = self.training.decoding, self.training.decoding.replaced
        held_out = [part for part in bundle if part.name in self.for_validation]
        others = bundle[len(held_out) :]
        validation_documents = 0

        def documents() -> Iterator[Document]:
            nonlocal validation_documents
            for _, document in self._read(held_out, self.validation, tally, progress):
                validation_documents += 1
                yield document
            named = self._read(others, self.training, tally, progress)
            yield from first_documents(self._in_order(named, others), self.max_tokens, counts)

        written = write_raw(documents(), folder)  # `documents` is lazy, so only one row group is in memory at a time
        tally.replaced = decoding.replaced - replaced
        counts = {**written.counts, **counts}
        return WrittenBundle(replace(written, counts=counts, validation_documents=validation_documents), tally)

    def _in_order(self, named: Iterator[tuple[str, Document]], parts: Sequence[FileSlice]) -> Iterator[Document]:
        if self.options.shuffle_seed is None:
            return (document for _, document in named)
        return shuffle(named, self.options.shuffle_seed, sum(part.text_bytes for part in parts), self.scratch)

    def _read(
        self, parts: Sequence[FileSlice], reading: Reading, tally: Tally, progress: Progress | None
    ) -> Iterator[tuple[str, Document]]:
        """Yield the documents of some slices, each with its file and row."""
        for part in parts:
            for number, row in read_rows(self.root / part.name, part.name, reading, part.slice):
                tally.rows += 1
                try:
                    if isinstance(row, BadRowError):
                        raise row
                    document = document_of(row, self.options.text_column, part.name, number, tally)
                except BadRowError as bad:
                    if self.options.bad_rows == "refuse":
                        raise
                    tally.skip(bad)
                    continue
                if document is not None:
                    if progress:
                        progress.add(1)
                    yield f"{part.name}:{number}", document


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
    decoding = Decoding(options.encoding, options.stray_bytes)
    for_validation = validation_names(root, names, options.validation)
    for_training = [name for name in names if name not in for_validation]

    def reading(names: Sequence[str]) -> Reading:
        txt_bytes = sum(text_bytes(root / name) for name in names if kind_of_name(name) == ".txt")
        return Reading(options.text_column, decoding, Cut.of(options.split, options.separator, txt_bytes))

    task = FileImport(
        root,
        reading(for_validation),
        reading(for_training),
        frozenset(for_validation),
        options,
        max_tokens,
        work / "shuffle",
    )
    bundles = _write_bundles(task, [*for_validation, *for_training], folder, source)
    tally = Tally(source)
    for bundle in bundles:
        tally.add(bundle.tally)
    tally.require_few_bad()
    tally.report(decoding.encoding)
    held_out = sum(bundle.written.validation_documents or 0 for bundle in bundles)
    if for_validation and not held_out:
        raise UserError(
            f"download.validation: {', '.join(for_validation[:5])} has no text, so nothing could be validated; name other files."
        )
    counts = Counter[str]()
    for bundle in bundles:
        counts.update(bundle.written.counts)
    more = {"stray_bytes_replaced": tally.replaced} if options.stray_bytes == "replace" else {}
    files = tuple(file for bundle in bundles for file in bundle.written.files)
    return Written(
        files, {**counts, **tally.counts(), **more}, validation_documents=held_out if for_validation else None
    )


def _write_bundles(task: FileImport, names: Sequence[str], folder: Path, source: str) -> list[WrittenBundle]:
    """Write the documents of some files, with several processes if there is enough text."""
    parts = [FileSlice(name, WHOLE, text_bytes(task.root / name)) for name in names]
    written: list[WrittenBundle] = []
    total, label = sum(part.text_bytes for part in parts), f"{source}: reading files"
    processes = useful_processes(total)
    if task.is_in_one_piece or processes == 1:
        progress = Progress(label, None, "documents")
        written.append(task.write(parts, folder, progress))
        progress.close()
        return written
    progress = Progress(label, total, "bytes")
    with Pool(worker_count(processes), _start, task, finish_tasks=False) as pool:
        bundles = list(bundles_of(task.root, names, task.training, pool.in_order))
        drafts = [folder / f"bundle {number}" for number in range(len(bundles))]
        for bundle, done in zip(bundles, pool.in_order(_write_here, zip(bundles, drafts, strict=True)), strict=True):
            if isinstance(done, UserError):
                raise done
            progress.add(sum(part.text_bytes for part in bundle))
            written.append(done)
    progress.close()
    return _named_as_one(written, drafts, folder)


def _named_as_one(bundles: Sequence[WrittenBundle], drafts: Sequence[Path], folder: Path) -> list[WrittenBundle]:
    """Move the parquet files of all bundles into one folder, with names as if one process had written them."""
    named: list[WrittenBundle] = []
    number = 0
    for bundle, draft in zip(bundles, drafts, strict=True):
        files = []
        for file in bundle.written.files:
            files.append(replace(file, name=file_name(number)))
            (draft / file.name).rename(folder / files[-1].name)
            number += 1
        draft.rmdir()
        named.append(replace(bundle, written=replace(bundle.written, files=tuple(files))))
    sync_folder(folder)
    return named


_task: FileImport


def _start(task: FileImport) -> None:
    global _task
    _task = task


def _write_here(bundle: Sequence[FileSlice], folder: Path) -> WrittenBundle | UserError:
    """Write a bundle in the worker that calls this. An error is returned, because one of an earlier bundle comes first."""
    try:
        return _task.write(bundle, folder)
    except UserError as error:
        return UserError(str(error))
