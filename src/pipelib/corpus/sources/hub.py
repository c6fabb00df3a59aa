"""FineWeb-Edu, or another dataset of parquet files, from the Hugging Face hub.

The list of files, with sizes and SHA-256, comes from the repository's tree at a pinned commit and is part of the corpus's
identity. `hub_lists.py` judges and keeps it; `hub_store.py` keeps the verified files, whatever the stage's other parameters;
`hub_transfer.py` fetches them.

`download.max_tokens` takes a prefix of the documents. No file is rewritten for it: the manifest says how many rows of the
last file belong to the corpus, and the files after it are neither fetched nor listed. How many files that takes shows when
the first one is here, so they come in waves, each of files that are needed for certain.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelib.corpus.hub_lists import HubFile, list_files
from pipelib.corpus.hub_store import HubStore, open_store
from pipelib.corpus.hub_transfer import DEFAULT_RETRY, HubRepo, Retry
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.raw import RawFile, Source, Written
from pipelib.files import link_or_copy

if TYPE_CHECKING:
    import pyarrow as pa

DENSITY_MARGIN = 1.05
"""How many times the tokens per byte that were measured a file may have; a wave counts on it, so as not to fetch too much."""


def source(params: DownloadParams) -> Source:
    """The source that the parameters choose."""
    return HubSource(params.repo, params.revision, params.folder, params.max_tokens)


@dataclass(frozen=True)
class HubSource:
    """The parquet files of one folder of a dataset repository, at a pinned commit, in the order of their names."""

    repo: str
    revision: str
    folder: str
    max_tokens: int | None = None
    retry: Retry = DEFAULT_RETRY

    def identity(self) -> dict[str, Any]:
        """The repository, the commit, and every file of the folder; the hub is asked once, and its answer is kept.

        Raises:
            UserError: the hub refuses, has no such revision or folder, or stays unreachable; or no file is parquet.
        """
        identity = {
            "kind": "hub",
            "repo": self.repo,
            "revision": self.revision,
            "folder": self.folder,
            "files": [asdict(file) for file in self._files],
        }
        return identity if self.max_tokens is None else {**identity, "max_tokens": self.max_tokens}

    def write(self, folder: Path, work: Path) -> Written:  # noqa: ARG002  (the store outlives it)
        """Link every file, fetched or stored and in either case verified, into `folder`, unchanged.

        Raises:
            UserError: a file cannot be had or has no column of text, or the disk is too small.
        """
        with open_store(self._repo, self.retry) as store:
            self._require_text(store)
            if self.max_tokens is None:
                paths = store.fetch(self._files)
                return Written(tuple(map(_link, self._files, paths, repeat(folder))), {})
            return self._write_prefix(store, folder, self.max_tokens)

    @property
    def _repo(self) -> HubRepo:
        return HubRepo(self.repo, self.revision)

    @cached_property
    def _files(self) -> list[HubFile]:
        return list_files(self._repo, self.folder, ".parquet", self.retry)

    def _require_text(self, store: HubStore) -> None:
        """Refuse a dataset without a column of text before its files come: the end of the first file tells."""
        from pipelib.corpus.parquet import open_parquet, require_text

        first = self._files[0]
        footer = store.footer(first)
        schema = None if footer is None else _schema(footer)
        if schema is None:  # a server that gives no parts of files
            (path,) = store.fetch([first])
            open_parquet(path).close()
            return
        require_text(
            schema,
            f"{first.path} of {self.repo}",
            "name another dataset or folder (download.repo, download.folder), or download it, rename or convert the column, "
            "and set download.source to local",
        )

    def _write_prefix(self, store: HubStore, folder: Path, max_tokens: int) -> Written:
        """Link files until their documents have `max_tokens` tokens, wave by wave."""
        from pipelib.corpus.parquet import first_rows

        written: list[RawFile] = []
        tokens = 0
        while tokens < max_tokens and len(written) < len(self._files):
            size = sum(file.bytes for file in written)
            wave = _needed(self._files[len(written) :], max_tokens - tokens, tokens / size if size else 0.0)
            for file, path in zip(wave, store.fetch(wave), strict=True):
                if tokens >= max_tokens:
                    break
                rows, counted = first_rows(path, max_tokens - tokens)
                written.append(replace(_link(file, path, folder), rows=rows))
                tokens += counted
        return Written(tuple(written), {"tokens_estimated": tokens})


def _schema(footer: bytes) -> "pa.Schema | None":
    """The columns of a parquet file, by its metadata; None where that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(pa.BufferReader(footer))
        return schema if schema.names else None  # names that are not UTF-8 are an error here
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None


def _link(file: HubFile, path: Path, folder: Path) -> RawFile:
    """Put a verified file into `folder`, and describe it."""
    from pipelib.corpus.parquet import describe_file

    link_or_copy(path, folder / path.name)
    return describe_file(folder / path.name, file.sha256)


def _needed(files: Sequence[HubFile], tokens: int, density: float) -> Sequence[HubFile]:
    """The files at the start of `files` without which there are not `tokens` tokens, even if they are dense; at least one.

    Args:
        density: tokens per byte that were measured; 0 where nothing was, so that one file shows it.
    """
    if not density:
        return files[:1]
    count, size = 1, files[0].bytes
    while count < len(files) and DENSITY_MARGIN * density * size < tokens:
        size += files[count].bytes
        count += 1
    return files[:count]
