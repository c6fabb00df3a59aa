"""The parameters of the download stage."""

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipelib.corpus.hub_benchmarks import known_benchmarks
from pipelib.corpus.published_models import PUBLISHED_MODELS, is_downloaded
from pipelib.schema import NaturalInt, OneOf, PositiveInt

SOURCES = Path(__file__).with_name("sources")
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""The endings of compressed files."""
TEXT_KINDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".txt")
"""The endings of the text files that `local` reads, also compressed."""
KINDS = ((".parquet",), *(tuple(kind + packed for packed in ("", *PACKED)) for kind in TEXT_KINDS))
"""The endings of each kind of file. The hub's folders have files about the data, too, so the first kind that is there counts."""
READABLE = tuple(ending for endings in KINDS for ending in endings)
"""The endings of all files that `local` reads."""
CONVERSATION_KINDS = tuple(kind for kind in KINDS if ".txt" not in kind)
"""The endings of files that may hold conversations: those with rows."""
KINDS_IN_WORDS = (
    ".parquet, .jsonl, .ndjson, .json, .csv, .tsv, .txt, also with .gz, .bz2, .xz or .zst, or a saved dataset"
)
SAVED_DATASET = "state.json"
"""The file that stands for a folder of `datasets`' `save_to_disk`."""


NO_TEXT_ENCODINGS = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape")
"""Encodings that Python knows and no text file has."""


def encoding_name(encoding: str) -> str | None:
    """Return Python's name of an encoding of text files; None if there is no such encoding."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding).close()
    except (LookupError, ValueError):
        return None
    name = codecs.lookup(encoding).name
    return None if name.replace("-", "_") in NO_TEXT_ENCODINGS else name


def kind_of_name(name: str) -> str:
    """Return the ending of a file's name that says its kind, in lower case: `.csv` of `a.csv.gz`; empty if there is none."""
    name = name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    _, dot, ending = name.removesuffix(packed).rpartition(".")
    return dot + ending if dot else ""


def known_sources() -> list[str]:
    """Return the names that `download.source` may have."""
    return sorted(path.stem for path in SOURCES.glob("[a-z]*.py"))


def is_commit(revision: str) -> bool:
    """Return whether a revision is 40 hexadecimal digits. The name of a branch would not be reproducible."""
    return len(revision) == 40 and set(revision) <= set("0123456789abcdef")


@dataclass(frozen=True)
class HubConversationsParams:
    """Section `download.conversations` of params.yaml: a folder of a dataset on the hub, for `finetune.source: hub`."""

    repo: str
    """The dataset repository, OWNER/NAME."""
    revision: str
    """The commit of the repository, 40 hexadecimal digits."""
    folder: str
    """The folder in the repository; empty for the top one. Its files of one kind are taken, parquet first."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each invalid value."""
        if not is_commit(self.revision):
            yield (
                f"revision: {self.revision!r} is not a commit (40 hexadecimal digits), so the conversations could change under "
                "you; pin the commit that the dataset's page shows under 'History'."
            )
        if self.repo.count("/") != 1:
            yield f"repo: {self.repo!r} is not OWNER/NAME, so the hub would not find it; write both."


@dataclass(frozen=True)
class DownloadParams:
    """Section `download` of params.yaml."""

    source: Annotated[str, OneOf(known_sources)]
    """The source of the text, one of the files in `corpus/sources`: `docs`, the docstrings of the installed packages;
    `local`, the user's files; `hub`, the Hugging Face hub."""
    path: str
    """`local`: the folder of the user's files, or one file. The stage depends on it for every source."""
    pattern: str
    """`local`: which files of that folder to read, as a glob."""
    text_column: str
    """`local` and `hub`: the column, or key, of a row's text."""
    bad_rows: Literal["refuse", "skip"]
    """What to do with a row that is not a document. `skip` leaves it out and counts it, up to 1 % of all rows."""
    encoding: str
    """`local`: the encoding of text files, by Python's names."""
    stray_bytes: Literal["refuse", "replace"]
    """`local`: what to do with bytes that are not of that encoding. `replace` puts U+FFFD for them and counts them."""
    split: Literal["auto", "whole", "line", "empty_line", "separator"]
    """`local`: the documents of a txt file. `whole`: the file, cut at the next empty line after each 100,000 characters;
    `auto`: the same, cut into about 500 documents if all files together have less than 50 MB; `line`; `empty_line`: what is
    between empty lines; `separator`: what is between `separator`."""
    separator: str
    """`local`: the text between documents, for `split: separator`."""
    shuffle: bool
    """`local`: put the documents into an order that `seed` decides, before the validation split is cut."""
    validation: str | None
    """`local`: a glob for the files whose documents are the validation split; null for the first shard of the corpus."""
    repo: str
    """`hub`: the dataset repository, OWNER/NAME."""
    revision: str
    """`hub`: the commit of the repository, 40 hexadecimal digits; a branch name would not be reproducible."""
    folder: str
    """`hub`: the folder in the repository whose files are the corpus, in the order of their names: the parquet files, or if there
    are none, the text files of one kind."""
    max_tokens: PositiveInt | None
    """The corpus is the shortest prefix of the documents with at least this many tokens; null for all documents. A document
    counts as its `token_count` if the dataset has one, else as its UTF-8 bytes divided by 4, rounded up."""
    benchmarks: tuple[Annotated[str, OneOf(known_benchmarks)], ...]
    """The evaluation sets to prepare: `completion` is made from the corpus, the others come from the hub."""
    benchmark_documents: NaturalInt | Literal["auto"]
    """How many documents at the start of the corpus the completion benchmark is made from. `auto`: 480, or fewer if they
    have more than 1 MB of text or a tenth of the corpus."""
    models: tuple[str, ...]
    """The published models to download from the hub: OpenAI's by name, others as OWNER/NAME@COMMIT."""
    conversations: HubConversationsParams | None
    """The conversations to download from the hub, for `finetune.source: hub`; null: none."""
    seed: NaturalInt
    """Decides the order of the documents of `docs`, and the items and distractors of the completion benchmark."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each invalid combination of values."""
        if self.source == "hub" and not is_commit(self.revision):
            yield (
                f"revision: {self.revision!r} is not a commit (40 hexadecimal digits), so the corpus could change "
                "under you; pin the commit that the dataset's page shows under 'History'."
            )
        if self.source == "hub" and self.repo.count("/") != 1:
            yield (
                f"repo: {self.repo!r} is not OWNER/NAME, so the hub would not find it; "
                "FineWeb-Edu is HuggingFaceFW/fineweb-edu."
            )
        yield from self._problems_of_local()
        number = self.benchmark_documents
        if "completion" in self.benchmarks and number != "auto" and number < 4:
            yield (
                f"benchmark_documents: {self.benchmark_documents} documents cannot give an item and three wrong endings "
                "from other documents; use at least 4, or drop completion from benchmarks."
            )
        if "completion" not in self.benchmarks and number not in (0, "auto"):
            yield (
                f"benchmark_documents: {self.benchmark_documents} documents would be held out for a benchmark that is not "
                "made; set it to 0, or add completion to benchmarks."
            )
        for place, name in enumerate(self.models):
            if is_downloaded(name):
                continue
            if name.partition("@")[0].count("/") == 1:
                yield (
                    f"models[{place}]: {name!r} is not pinned, so the weights could change under you; write OWNER/NAME@COMMIT, "
                    "with the 40 hexadecimal digits that the model's page shows under 'History'."
                )
            else:
                problem = OneOf(PUBLISHED_MODELS.keys).problem(name)
                yield f"models[{place}]: {name!r} {problem} Models of others are written OWNER/NAME@COMMIT."
        for key, names in (("benchmarks", self.benchmarks), ("models", self.models)):
            if len(set(names)) < len(names):
                yield f"{key}: {list(names)} lists a name twice; list each name once."

    def _problems_of_local(self) -> Iterator[str]:
        """Yield what is wrong with the parameters of `local`."""
        if encoding_name(self.encoding) is None:
            yield (
                f"encoding: {self.encoding!r} is not a text encoding that Python knows, so no file can be read; use utf-8, "
                "utf-16, cp1252, gbk or another of its names."
            )
        if not self.separator:
            yield "separator: it is empty, so it cannot be between documents; the usual one is <|endoftext|>."
        if not self.text_column:
            yield "text_column: it is empty, so no column is the text; the usual one is text."
