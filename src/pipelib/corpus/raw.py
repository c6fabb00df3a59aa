"""Raw text: documents, the files that hold them, and the manifest that says what they are; see `parquet.py` for the files.

Every source ends here and every reader starts here: `000_00000.parquet`, `001_00000.parquet`, ... hold the documents of
the corpus in their order, and `manifest.json` names the files in that order. Nothing in either tells when, where or by
whom they were written, so equal text gives equal bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipelib.errors import UserError, how_to_repair
from pipelib.files import read_json, sha256_file, write_json
from pipelib.workspace.places import HERE, MANIFEST

REPAIR = how_to_repair(str(HERE.raw))
"""The remedy for a damaged file of raw text."""


class Document(NamedTuple):
    """One document in FineWeb-Edu's columns; what its source does not know is None."""

    text: str
    id: str | None = None
    dump: str | None = None
    """The edition of the source: a Common Crawl dump, or a package and its version."""
    url: str | None = None
    file_path: str | None = None
    language: str | None = None
    language_score: float | None = None
    token_count: int | None = None
    """GPT-2 tokens, where somebody counted them."""
    score: float | None = None
    """FineWeb-Edu's grade of educational value, 0 to 5."""
    int_score: int | None = None


@dataclass(frozen=True)
class RawFile:
    """One parquet file of the corpus, as the manifest lists it."""

    name: str
    bytes: int
    rows: int
    """Rows from its start that belong to the corpus: fewer than it has where `download.max_tokens` ends the corpus in it."""
    sha256: str


@dataclass(frozen=True)
class RawManifest:
    """What a folder of raw text holds."""

    source: Mapping[str, Any]
    """Where the text came from: `kind`, and what pins it (versions, revision, hashes)."""
    files: tuple[RawFile, ...]
    """In the order of the corpus."""

    @property
    def documents(self) -> int:
        """Documents in all files."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class Written:
    """What a source put into a folder of raw text."""

    files: tuple[RawFile, ...]
    """In the order of the corpus; none if there was no document."""
    counts: Mapping[str, int]
    """What was kept and what was left out, for the metrics."""


class Source(Protocol):
    """Where text comes from. `docs.py`, `local.py` and `hub.py` each have one."""

    def identity(self) -> dict[str, Any]:
        """`kind`, and everything that pins the text; nothing absolute, no dates. It decides the stage's fingerprint."""

    def write(self, folder: Path, work: Path) -> Written:
        """Put the corpus into `folder` as parquet files.

        Args:
            folder: where the files go; it does not exist yet.
            work: kept until the stage has finished, so that a killed run can go on from it.
        """


BYTES_PER_TOKEN = 4
"""UTF-8 bytes that count as a token where nobody counted a document's; GPT-2 makes 3.3 to 4.5 of English ones."""


def estimated_tokens(text_bytes: int, token_count: int | None) -> int:
    """What a document counts towards `download.max_tokens`: its `token_count` if it is not negative, else a token for every
    four bytes.
    """
    return token_count if token_count is not None and token_count >= 0 else -(-text_bytes // BYTES_PER_TOKEN)


def first_documents(
    documents: Iterable[Document], max_tokens: int | None, counts: dict[str, int]
) -> Iterator[Document]:
    """The shortest prefix of the documents with at least `max_tokens` tokens, or all of them.

    Args:
        max_tokens: None for all, which are not counted.
        counts: gets `tokens_estimated`.
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


def write_manifest(folder: Path, source: Mapping[str, Any], files: Sequence[RawFile]) -> RawManifest:
    """Write a folder's manifest; the last file to appear in it."""
    manifest = RawManifest(source, tuple(files))
    lines = [asdict(file) for file in manifest.files]
    write_json(folder / MANIFEST, {"source": source, "files": lines, "documents": manifest.documents})
    return manifest


def read_raw_manifest(folder: Path) -> RawManifest:
    """The manifest of a folder of raw text.

    Raises:
        UserError: there is none, or it has another shape.
    """
    path = folder / MANIFEST
    value = read_json(path)
    try:
        return RawManifest(value["source"], tuple(RawFile(**file) for file in value["files"]))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a manifest of raw text ({error!r}), so its files cannot be trusted; {REPAIR}."
        ) from None


def damaged(path: Path, why: str, remedy: str) -> UserError:
    """The error for a parquet file that cannot be read."""
    return UserError(
        f"{path} cannot be read as parquet ({' '.join(why.split())}), so it is damaged or cut short and its text would "
        f"be lost; {remedy}."
    )


def require_file(folder: Path, file: RawFile) -> None:
    """Read a file of a corpus and refuse it if a byte changed since the manifest beside it was written.

    A flipped bit inside a page can decode to other text without an error.

    Raises:
        UserError: its SHA-256 is another one.
    """
    actual = sha256_file(folder / file.name)
    if actual != file.sha256:
        raise UserError(
            f"{folder / file.name} has sha256 {actual} and its manifest says {file.sha256}: its bytes changed, so its text "
            f"may have; {REPAIR}."
        )
