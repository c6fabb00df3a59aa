"""Raw text: documents, the files that hold them, and their manifest. `parquet.py` reads and writes the files.

Every source writes this format, and every reader reads it: `000_00000.parquet`, `001_00000.parquet`, ... hold the
documents of the corpus in order, and `manifest.json` lists the files in that order. They do not record when, where or by
whom they were written, so equal text gives equal bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipelib.errors import UserError, how_to_repair
from pipelib.files import read_json, sha256_file, write_json
from pipelib.workspace.places import HERE, MANIFEST

TEXT = "text"
"""The column of the text in files that sources write, and in most datasets."""
REPAIR = how_to_repair(str(HERE.raw))
"""The remedy for a damaged file of raw text."""


class Document(NamedTuple):
    """One document in FineWeb-Edu's columns. Values that its source does not know are None."""

    text: str
    id: str | None = None
    dump: str | None = None
    """The version of the source: a Common Crawl dump, or a package and its version."""
    url: str | None = None
    file_path: str | None = None
    language: str | None = None
    language_score: float | None = None
    token_count: int | None = None
    """The number of GPT-2 tokens, if the dataset gives it."""
    score: float | None = None
    """FineWeb-Edu's grade of educational value, 0 to 5."""
    int_score: int | None = None


@dataclass(frozen=True)
class RawFile:
    """One parquet file of the corpus, as the manifest lists it."""

    name: str
    bytes: int
    rows: int
    """Rows, from its start, that belong to the corpus: fewer than it has if `download.max_tokens` ends the corpus in it."""
    sha256: str


@dataclass(frozen=True)
class RawManifest:
    """The manifest of a folder of raw text."""

    source: Mapping[str, Any]
    """Where the text came from: `kind`, and what pins it (versions, revision, hashes)."""
    files: tuple[RawFile, ...]
    """The files in the order of the corpus."""
    text_column: str = TEXT
    """The column of the text."""
    bad_rows: str = "refuse"
    """What readers do with a text that is not UTF-8: refuse, or skip and count it."""
    validation_documents: int | None = None
    """How many documents at the start are the validation split; None if that is the first shard."""

    @property
    def documents(self) -> int:
        """The number of documents in all files."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class Written:
    """What a source wrote into a folder of raw text."""

    files: tuple[RawFile, ...]
    """The files in the order of the corpus; empty if there was no document."""
    counts: Mapping[str, Any]
    """How much was kept and left out, for the metrics."""
    text_column: str = TEXT
    bad_rows: str = "refuse"
    validation_documents: int | None = None
    """These three: see `RawManifest`."""


class Source(Protocol):
    """A source of text. `docs.py`, `local.py` and `hub.py` in `sources` each have one."""

    def identity(self) -> dict[str, Any]:
        """Return `kind` and everything that pins the text, without absolute paths or dates.

        It decides the stage's fingerprint.
        """

    def write(self, folder: Path, work: Path) -> Written:
        """Put the corpus into `folder` as parquet files.

        Args:
            folder: the folder for the files; it does not exist yet.
            work: kept until the stage has finished, so that a killed run can resume from it.
        """


def benchmark_documents(folder: Path) -> int:
    """Return how many documents at the start of the corpus a benchmark was made from, from the manifest of the benchmarks."""
    entry = read_json(folder / MANIFEST).get("completion.jsonl", {})
    return int(entry.get("documents", 0))


BYTES_PER_TOKEN = 4
"""UTF-8 bytes that count as one token if a document has no `token_count`. A GPT-2 token is 3.3 to 4.5 bytes of English."""


def estimated_tokens(text_bytes: int, token_count: int | None) -> int:
    """Return how many tokens a document counts towards `download.max_tokens`.

    This is its `token_count` if it has one that is not negative, else one token for every four bytes.
    """
    return token_count if token_count is not None and token_count >= 0 else -(-text_bytes // BYTES_PER_TOKEN)


def first_documents(
    documents: Iterable[Document], max_tokens: int | None, counts: dict[str, int]
) -> Iterator[Document]:
    """Yield the shortest prefix of the documents with at least `max_tokens` tokens, or all of them.

    Args:
        max_tokens: None for all documents; their tokens are not counted then.
        counts: gets the key `tokens_estimated`.
    """
    if max_tokens is None:
        yield from documents
        return
    counts["tokens_estimated"] = 0
    for document in documents:
        counts["tokens_estimated"] += estimated_tokens(len(document.text.encode("utf-8")), document.token_count)
        yield document
        if counts["tokens_estimated"] >= max_tokens:
            return


def write_manifest(folder: Path, source: Mapping[str, Any], written: Written) -> RawManifest:
    """Write a folder's manifest. It must be the last file written there."""
    manifest = RawManifest(source, written.files, written.text_column, written.bad_rows, written.validation_documents)
    fields = {"source": source, "files": [asdict(file) for file in manifest.files], "documents": manifest.documents}
    # What is usual is not written, so that the manifests of earlier versions are those of today.
    more = {
        name: getattr(manifest, name) for name in _OPTIONAL if getattr(manifest, name) != getattr(RawManifest, name)
    }
    write_json(folder / MANIFEST, {**fields, **more})
    return manifest


_OPTIONAL = ("text_column", "bad_rows", "validation_documents")


def read_raw_manifest(folder: Path) -> RawManifest:
    """Read the manifest of a folder of raw text.

    Raises:
        UserError: it is missing, or not such a manifest.
    """
    path = folder / MANIFEST
    value = read_json(path)
    try:
        more = {name: value[name] for name in _OPTIONAL if name in value}
        return RawManifest(value["source"], tuple(RawFile(**file) for file in value["files"]), **more)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a manifest of raw text ({error!r}), so its files cannot be trusted; {REPAIR}."
        ) from None


def damaged(path: Path, why: str, remedy: str) -> UserError:
    """Return the error for a parquet file that cannot be read."""
    return UserError(
        f"{path} cannot be read as parquet ({' '.join(why.split())}), so it is damaged or cut short and its text would "
        f"be lost; {remedy}."
    )


def require_file(folder: Path, file: RawFile) -> None:
    """Read a file of a corpus, and refuse it if any byte differs from when its manifest was written.

    Parquet does not detect this: a flipped bit inside a page can decode to other text without an error.

    Raises:
        UserError: its SHA-256 is not that of the manifest.
    """
    actual = sha256_file(folder / file.name)
    if actual != file.sha256:
        raise UserError(
            f"{folder / file.name} has sha256 {actual} and its manifest says {file.sha256}: its bytes changed, so its text "
            f"may be wrong; {REPAIR}."
        )
