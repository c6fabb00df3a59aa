"""The parameters of the download stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pipelib.corpus.hub_benchmarks import known_benchmarks
from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.schema import NaturalInt, OneOf, PositiveInt

SOURCES = Path(__file__).with_name("sources")
READABLE = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
"""The endings of the files that `local` reads."""


def known_sources() -> list[str]:
    """Return the names that `download.source` may have."""
    return sorted(path.stem for path in SOURCES.glob("[a-z]*.py"))


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
    repo: str
    """`hub`: the dataset repository, OWNER/NAME."""
    revision: str
    """`hub`: the commit of the repository, 40 hexadecimal digits; a branch name would not be reproducible."""
    folder: str
    """`hub`: the folder in the repository whose parquet files are the corpus, in the order of their names."""
    max_tokens: PositiveInt | None
    """The corpus is the shortest prefix of the documents with at least this many tokens; null for all documents. A document
    counts as its `token_count` if the dataset has one, else as its UTF-8 bytes divided by 4, rounded up."""
    benchmarks: tuple[Annotated[str, OneOf(known_benchmarks)], ...]
    """The evaluation sets to prepare: `completion` is made from the corpus, the others come from the hub."""
    benchmark_documents: NaturalInt
    """How many documents at the start of the corpus the completion benchmark is made from."""
    models: tuple[Annotated[str, OneOf(PUBLISHED_MODELS.keys)], ...]
    """The published models to download from the hub."""
    seed: NaturalInt
    """Decides the order of the documents of `docs`, and the items and distractors of the completion benchmark."""

    def problems(self) -> Iterator[str]:
        """Yield a message for each invalid combination of values."""
        if self.source == "hub" and not (len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef")):
            yield (
                f"revision: {self.revision!r} is not a commit (40 hexadecimal digits), so the corpus could change "
                "under you; pin the commit that the dataset's page shows under 'History'."
            )
        if self.source == "hub" and self.repo.count("/") != 1:
            yield (
                f"repo: {self.repo!r} is not OWNER/NAME, so the hub would not find it; "
                "FineWeb-Edu is HuggingFaceFW/fineweb-edu."
            )
        if "completion" in self.benchmarks and self.benchmark_documents < 4:
            yield (
                f"benchmark_documents: {self.benchmark_documents} documents cannot give an item and three distractors "
                "from other documents; use at least 4, or drop completion from benchmarks."
            )
        if "completion" not in self.benchmarks and self.benchmark_documents:
            yield (
                f"benchmark_documents: {self.benchmark_documents} documents would be held out for a benchmark that is not "
                "made; set it to 0, or add completion to benchmarks."
            )
        for key, names in (("benchmarks", self.benchmarks), ("models", self.models)):
            if len(set(names)) < len(names):
                yield f"{key}: {list(names)} lists a name twice; list each name once."
