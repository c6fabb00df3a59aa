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

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelib.corpus.local_files import LocalFiles, find_files
from pipelib.corpus.options import PLAIN, Options
from pipelib.corpus.params import DownloadParams, encoding_name, kind_of_name
from pipelib.corpus.raw import Source, Written
from pipelib.errors import tell
from pipelib.files import sha256_files


def source(params: DownloadParams) -> Source:
    """Return this source, with its parameters."""
    options = Options(
        text_column=params.text_column,
        bad_rows=params.bad_rows,
        encoding=encoding_name(params.encoding) or params.encoding,
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
    options: Options = PLAIN

    def identity(self) -> dict[str, Any]:
        """Return the name (inside the folder), size and SHA-256 of every file, and every parameter that changes documents.

        Raises:
            UserError: there is no folder or no file, or something in the folder cannot be read.
        """
        decides = self.options.decides()
        if not any(kind_of_name(name) == ".txt" for name in self._files.names):
            decides.pop("split", None)
        identity = {"kind": "local", "files": self._described, **decides}
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
        from pipelib.corpus.documents import write_documents

        files = self._files
        if files.ignored:
            more = f" and {len(files.ignored) - 5} more" if len(files.ignored) > 5 else ""
            shown = ", ".join(files.ignored[:5])
            tell(f"local: these files are ignored, because their kind cannot be read: {shown}{more}")
        return write_documents(files.root, files.names, self.options, self.max_tokens, folder, work)
