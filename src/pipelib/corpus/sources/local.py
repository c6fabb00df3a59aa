"""The user's own text: parquet, JSON, csv and txt files of one folder, also compressed, or one such file.

Files are read in the order of their paths. These become documents:

- parquet, jsonl, json, csv, tsv, and folders that `datasets` saved: each row, with its text in `download.text_column`.
  FineWeb-Edu's other columns are kept, unknown ones are not.
- txt: what `download.split` says; see `split.py`.

A text that is null or only white space is left out and counted. A row without text, or with one that is not a string or not
Unicode, is an error that names the file and the row, because rows must not get lost silently; `download.bad_rows: skip`
leaves out and counts it. A value that does not fit its optional column becomes null and is counted.

Nothing here makes a request. `make bench-import` times it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelib.corpus.local_files import LocalFiles, find_files, visible_matches
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.raw import TEXT, Document, Source, Written, first_documents
from pipelib.errors import UserError, tell
from pipelib.files import sha256_files
from pipelib.progress import Progress

_UNPACKED = 5
"""Bytes of text in a byte of a compressed file, about."""


@dataclass(frozen=True)
class Options:
    """How files become documents. The defaults are what versions without these parameters did."""

    text_column: str = TEXT
    bad_rows: str = "refuse"
    encoding: str = "utf-8"
    stray_bytes: str = "refuse"
    split: str = "whole"
    separator: str = "<|endoftext|>"
    shuffle_seed: int | None = None
    """Decides the order; None for the order of the files."""
    validation: str | None = None

    def decides(self) -> dict[str, Any]:
        """Return what differs from the defaults."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Options, name)}


def source(params: DownloadParams) -> Source:
    """Return this source, with its parameters."""
    options = Options(
        text_column=params.text_column,
        bad_rows=params.bad_rows,
        encoding=params.encoding,
        stray_bytes=params.stray_bytes,
        split=params.split,
        separator=params.separator if params.split == "separator" else Options.separator,
        shuffle_seed=params.seed if params.shuffle else None,
        validation=params.validation,
    )
    return LocalSource(Path(params.path), params.pattern, params.max_tokens, options)


@dataclass(frozen=True)
class LocalSource:
    """The files under a folder that match a glob, are of a readable kind and are not hidden."""

    path: Path
    """A folder, or a single file."""
    pattern: str
    max_tokens: int | None = None
    options: Options = Options()

    def identity(self) -> dict[str, Any]:
        """Return the name (inside the folder), size and SHA-256 of every file, and every parameter that changes documents.

        Raises:
            UserError: there is no folder or no file, or something in the folder cannot be read.
        """
        identity = {"kind": "local", "files": self._described, **self.options.decides()}
        return identity if self.max_tokens is None else {**identity, "max_tokens": self.max_tokens}

    @cached_property
    def _files(self) -> LocalFiles:
        return find_files(self.path, self.pattern)

    @cached_property
    def _described(self) -> list[dict[str, Any]]:
        names = self._files.all_names
        paths = [self._files.root / name for name in names]
        return [
            {"name": name, "bytes": path.stat().st_size, "sha256": sha256}
            for name, path, sha256 in zip(names, paths, sha256_files(paths), strict=True)
        ]

    def write(self, folder: Path, work: Path) -> Written:
        """Read every file and write its documents.

        Raises:
            UserError: a file or row cannot be used; the message names the file and the row.
        """
        from pipelib.corpus.local_formats import Reading
        from pipelib.corpus.local_rows import Tally
        from pipelib.corpus.parquet import write_raw
        from pipelib.corpus.shuffle import shuffle
        from pipelib.corpus.split import Cut
        from pipelib.corpus.text_files import Decoding

        files, options, tally = self._files, self.options, Tally()
        if files.ignored:
            more = f" and {len(files.ignored) - 5} more" if len(files.ignored) > 5 else ""
            shown = ", ".join(files.ignored[:5])
            tell(f"local: these files are ignored, because their kind cannot be read: {shown}{more}")
        decoding = Decoding(options.encoding, options.stray_bytes)
        cut = Cut.of(
            options.split, options.separator, sum(self._bytes(name) for name in files.names if ".txt" in name.lower())
        )
        reading = Reading(options.text_column, decoding, cut)
        for_validation = self._validation_names()
        for_training = [name for name in files.names if name not in for_validation]
        validation_documents = 0

        def documents() -> Iterator[Document]:
            nonlocal validation_documents
            for _, document in self._read(for_validation, reading, tally):
                validation_documents += 1
                yield document
            rest = self._read(for_training, reading, tally)
            if options.shuffle_seed is None:
                yield from (document for _, document in rest)
            else:
                total = sum(map(self._bytes, for_training))
                yield from shuffle(rest, options.shuffle_seed, total, work / "shuffle")

        # `documents` is lazy, so only one row group is in memory at a time.
        counts: dict[str, int] = {}
        written = write_raw(first_documents(documents(), self.max_tokens, counts), folder)
        tally.require_few_bad()
        tally.report(decoding)
        counts = {**written.counts, **tally.counts(), **counts}
        if options.stray_bytes == "replace":
            counts["stray_bytes_replaced"] = decoding.replaced
        return replace(written, counts=counts, validation_documents=validation_documents if for_validation else None)

    def _read(self, names: list[str], reading: Any, tally: Any) -> Iterator[tuple[str, Document]]:
        """Yield the documents of some files, each with its file and row."""
        from pipelib.corpus.local_formats import read_rows
        from pipelib.corpus.local_rows import BadRowError, document_of

        progress = Progress("local: reading files", None, "documents")
        for name in names:
            for number, row in read_rows(self._files.root / name, name, reading):
                tally.rows += 1
                try:
                    if isinstance(row, BadRowError):
                        raise row
                    document = document_of(row, reading.text_column, name, number, tally)
                except BadRowError as bad:
                    if self.options.bad_rows == "refuse":
                        raise
                    tally.skip(bad)
                    continue
                if document is not None:
                    progress.add(1)
                    yield f"{name}:{number}", document
        if names:
            progress.close()

    def _bytes(self, name: str) -> int:
        """Return the bytes of a file's text, about."""
        from pipelib.corpus.params import PACKED

        size = (self._files.root / name).stat().st_size
        return size * _UNPACKED if name.lower().endswith((*PACKED, ".parquet")) else size

    def _validation_names(self) -> list[str]:
        """Return the files whose documents are the validation split, in order.

        Raises:
            UserError: no file matches, or all do.
        """
        pattern = self.options.validation
        if pattern is None:
            return []
        matches = {name.as_posix() for name in visible_matches(self._files.root, pattern)}
        found = [name for name in self._files.names if name in matches]
        if not found or len(found) == len(self._files.names):
            which = "none" if not found else "each"
            raise UserError(
                f"download.validation: {pattern!r} matches {which} of the {len(self._files.names)} files that are read, so "
                f"there would be no text for {'validation' if not found else 'training'}; name some of them, or set it to null."
            )
        return found
