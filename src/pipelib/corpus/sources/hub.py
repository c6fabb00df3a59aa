"""FineWeb-Edu, or another dataset of parquet or text files, from the Hugging Face hub.

The list of files, with sizes and SHA-256, comes from the repository's tree at a pinned commit and is part of the corpus's
identity. `hub_lists.py` checks and stores it, `hub_transfer.py` downloads the files, and `hub_store.py` stores the verified
files for all runs.

`download.max_tokens` takes a prefix of the documents. No file is rewritten for it: the manifest says how many rows of the
last file belong to the corpus, and later files are neither downloaded nor listed. The number of files that this needs is
known only after the first one. So files are downloaded in waves, and each wave has only files that are certainly needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipelib.corpus.hub_lists import HubFile, list_files
from pipelib.corpus.hub_store import HubStore, open_store
from pipelib.corpus.hub_transfer import DEFAULT_RETRY, HubRepo, Retry
from pipelib.corpus.options import Options
from pipelib.corpus.params import KINDS, DownloadParams
from pipelib.corpus.raw import TEXT, RawFile, Source, Written
from pipelib.errors import tell
from pipelib.files import link_or_copy

if TYPE_CHECKING:
    import pyarrow as pa

DENSITY_MARGIN = 1.05
"""A file may have this many times the tokens per byte measured so far. A wave assumes so, so as not to download too much."""


def source(params: DownloadParams) -> Source:
    """Return this source, with its parameters."""
    return HubSource(
        params.repo, params.revision, params.folder, params.max_tokens,
        text_column=params.text_column, bad_rows=params.bad_rows,
    )  # fmt: skip


@dataclass(frozen=True)
class HubSource:
    """The parquet files of one folder of a dataset repository, at a pinned commit, in the order of their names."""

    repo: str
    revision: str
    folder: str
    max_tokens: int | None = None
    retry: Retry = DEFAULT_RETRY
    text_column: str = TEXT
    bad_rows: str = "refuse"

    def identity(self) -> dict[str, Any]:
        """Return the repository, the commit, and every file of the folder. The hub is asked once; its answer is stored.

        Raises:
            UserError: the hub refuses, is unreachable, or has no such revision or folder; or no file can be read.
        """
        identity = {
            "kind": "hub",
            "repo": self.repo,
            "revision": self.revision,
            "folder": self.folder,
            "files": [file.identity() for file in self._files],
        }
        more: dict[str, Any] = {"max_tokens": self.max_tokens} if self.max_tokens is not None else {}
        # What is usual is left out, so that the corpora of earlier versions are those of today.
        more |= {"text_column": self.text_column} if self.text_column != TEXT else {}
        more |= {"bad_rows": self.bad_rows} if self.bad_rows != "refuse" else {}
        return {**identity, **more}

    def write(self, folder: Path, work: Path) -> Written:
        """Download the files that the store lacks. Link parquet files, unchanged, into `folder`; write others as parquet.

        Raises:
            UserError: a file cannot be downloaded or has no column of text, or the disk is too small.
        """
        if subfolders := sorted({file.path.rpartition("/")[0] for file in self._files} - {self.folder.strip("/")}):
            tell(
                f"hub: {self.folder or 'the top folder'} has no readable files, so the files of its subfolders are used "
                f"({', '.join(subfolders[:5])}{', ...' if len(subfolders) > 5 else ''}); to use one of them, set download.folder"
            )
        with open_store(self._repo, self.retry) as store:
            if not self._are_parquet:
                return self._write_text(store, folder, work)
            self._require_text(store)
            if self.max_tokens is None:
                paths = store.fetch(self._files)
                files = [self._link(file, path, folder) for file, path in zip(self._files, paths, strict=True)]
                counts: dict[str, Any] = {}
            else:
                files, tokens = self._write_prefix(store, folder, self.max_tokens)
                counts = {"tokens_estimated": tokens}
        if self.bad_rows == "skip":
            counts |= self._count_bad(folder, files)
        return Written(tuple(files), counts, text_column=self.text_column, bad_rows=self.bad_rows)

    @property
    def _repo(self) -> HubRepo:
        return HubRepo(self.repo, self.revision)

    @cached_property
    def _files(self) -> list[HubFile]:
        return list_files(self._repo, self.folder, KINDS, self.retry)

    @property
    def _are_parquet(self) -> bool:
        return self._files[0].path.endswith(".parquet")

    def _require_text(self, store: HubStore) -> None:
        """Refuse a dataset without a column of text before its files are downloaded. The end of the first file tells."""
        from pipelib.corpus.parquet import open_parquet, require_text

        first = self._files[0]
        footer = store.footer(first)
        schema = None if footer is None else _schema(footer)
        if schema is None:  # for example, the server cannot send a part of a file: download it whole
            (path,) = store.fetch([first])
            open_parquet(path, column=self.text_column).close()
            return
        require_text(
            schema,
            f"{first.path} of {self.repo}",
            "set download.text_column, name another dataset or folder (download.repo, download.folder), or download it, convert "
            "the column, and set download.source to local",
            self.text_column,
        )

    def _write_text(self, store: HubStore, folder: Path, work: Path) -> Written:
        """Download text files, jsonl for example, and write their documents."""
        from pipelib.corpus.documents import write_documents

        store.fetch(self._files)
        options = Options(text_column=self.text_column, bad_rows=self.bad_rows)
        names = [file.path for file in self._files]
        return write_documents(store.folder, names, options, self.max_tokens, folder, work, source="hub")

    def _count_bad(self, folder: Path, files: Sequence[RawFile]) -> dict[str, Any]:
        """Count the texts that readers of the corpus will skip, and refuse too many of them."""
        from pipelib.corpus.local_rows import Tally
        from pipelib.corpus.parquet import bad_texts

        tally = Tally("hub")
        for file in files:
            bad, rows = bad_texts(folder / file.name, self.text_column)
            tally.rows += rows
            if bad:
                tally.bad["not UTF-8"] += bad
                tally.first.setdefault("not UTF-8", f"in {file.name}")
        tally.require_few_bad()
        for reason, count in tally.bad.items():
            tell(f"hub: texts are left out ({reason}): {count:,}, the first {tally.first[reason]}")
        return {"bad_rows": dict(tally.bad)} if tally.bad else {}

    def _link(self, file: HubFile, path: Path, folder: Path) -> RawFile:
        """Link a verified file into `folder`, and return its entry for the manifest."""
        from pipelib.corpus.parquet import describe_file

        name = quote(
            file.path.removeprefix(f"{self.folder.strip('/')}/"), safe=""
        )  # subfolders may have files of one name
        link_or_copy(path, folder / name)
        return describe_file(folder / name, file.sha256 or None, self.text_column)

    def _write_prefix(self, store: HubStore, folder: Path, max_tokens: int) -> tuple[list[RawFile], int]:
        """Download and link files, wave by wave, until their documents have `max_tokens` tokens."""
        from pipelib.corpus.parquet import first_rows

        written: list[RawFile] = []
        tokens = 0
        while tokens < max_tokens and len(written) < len(self._files):
            # Estimate from the files so far how many more are needed, then count their tokens.
            size = sum(file.bytes for file in written)
            wave = _needed(self._files[len(written) :], max_tokens - tokens, tokens / size if size else 0.0)
            for file, path in zip(wave, store.fetch(wave), strict=True):
                if tokens >= max_tokens:
                    break
                rows, counted = first_rows(path, max_tokens - tokens, self.text_column)
                written.append(replace(self._link(file, path, folder), rows=rows))
                tokens += counted
        return written, tokens


def _schema(footer: bytes) -> "pa.Schema | None":
    """Return the schema of a parquet file from its metadata; None if that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(pa.BufferReader(footer))
        return schema if schema.names else None  # names that are not UTF-8 are an error here
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None


def _needed(files: Sequence[HubFile], tokens: int, density: float) -> Sequence[HubFile]:
    """Return the first files, at least one, that are certainly needed for `tokens` tokens, even if they are dense.

    Args:
        density: the tokens per byte measured so far; 0 if unknown, and then one file is returned to measure it.
    """
    if not density:
        return files[:1]
    count, size = 1, files[0].bytes
    while count < len(files) and DENSITY_MARGIN * density * size < tokens:
        size += files[count].bytes
        count += 1
    return files[:count]
