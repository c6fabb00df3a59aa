"""The text that a vocabulary is trained on, and the text that is held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelib.corpus.parquet import iterate_groups, iterate_raw, row_groups
from pipelib.corpus.raw import TEXT, read_raw_manifest
from pipelib.errors import UserError
from pipelib.vocabulary.params import VocabularyParams

SMALL_BYTES, LARGE_BYTES, LEAST_BYTES = 1_000_000, 400_000_000, 4096
"""The text of the validation split of a small and of a large corpus, and the least there is."""
KIND = "dump"
"""The column that tells kinds of text apart: a package, or a Common Crawl dump."""


@dataclass(frozen=True)
class HeldOut:
    """A document that no vocabulary is trained on."""

    text: str
    kind: str


def held_out(raw: Path, params: VocabularyParams, benchmark_documents: int) -> Iterator[HeldOut]:
    """Yield the documents of the validation split. Documents without text do not count.

    Args:
        benchmark_documents: as many documents at the start have to be in it.

    Raises:
        UserError: it would be too small for the benchmark.
    """
    count, key = read_raw_manifest(raw).validation_documents, "download.validation"
    if count is None and params.validation_documents != "auto":
        count, key = params.validation_documents, "vocabulary.validation_documents"
    if count is not None and count < benchmark_documents:
        raise UserError(
            f"{key}: {count} documents are fewer than the {benchmark_documents} that the benchmark is made of, so the model "
            "would be tested on training text; take more, or lower download.benchmark_documents."
        )
    total = sum(group.text_bytes for group in row_groups(raw))
    wanted = min(LARGE_BYTES, max(LEAST_BYTES, min(SMALL_BYTES, total // 10), total // 256))
    found = size = 0
    for row in iterate_raw(raw, (TEXT, KIND)):
        if found >= (count if count is not None else benchmark_documents) and (count is not None or size >= wanted):
            return
        if row[TEXT]:
            found, size = found + 1, size + len(row[TEXT].encode("utf-8"))
            yield HeldOut(row[TEXT], row[KIND] if isinstance(row[KIND], str) else "")


def training_texts(raw: Path, skip: int, max_bytes: int) -> Iterator[str]:
    """Yield texts behind the first `skip` documents: all of them, or row groups spread over them. They have `max_bytes` at most.

    They are a function of the corpus and the numbers.
    """
    left = max_bytes
    for text in _texts(raw, skip, max_bytes):
        content = text.encode("utf-8")
        if len(content) > left:  # the start of the text that does not fit
            if text := content[:left].decode("utf-8", errors="ignore"):
                yield text
            return
        left -= len(content)
        yield text


def _texts(raw: Path, skip: int, max_bytes: int) -> Iterator[str]:
    groups = row_groups(raw)
    boundary, inside = _find(raw, skip)
    later = range(boundary + 1, len(groups))
    if sum(group.text_bytes for group in groups[boundary:]) > max_bytes and later:
        sizes = [groups[number].text_bytes for number in later]
        count = max(1, min(len(later), max_bytes * len(later) // max(1, sum(sizes))))
        chosen, inside = {later[place * len(later) // count] for place in range(count)}, 0
    else:
        chosen = set(range(boundary, len(groups)))
    texts = (row[TEXT] for _, row in iterate_groups(raw, (TEXT,), chosen) if row[TEXT])
    return islice(texts, inside, None)


def _find(raw: Path, document: int) -> tuple[int, int]:
    """Return the row group of a document, and how many documents are before it in the row group. Empty ones do not count."""
    current, inside = 0, 0
    for number, (group, _) in enumerate(item for item in iterate_groups(raw) if item[1][TEXT]):
        if group != current:
            current, inside = group, 0
        if number == document:
            return current, inside
        inside += 1
    return len(row_groups(raw)), 0
