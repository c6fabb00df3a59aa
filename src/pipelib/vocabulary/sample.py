"""The text that a vocabulary is trained on, and the text that is held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelib.corpus.parquet import RowGroup, iterate_raw, row_groups
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
    count = read_raw_manifest(raw).validation_documents
    if count is None and params.validation_documents != "auto":
        count = params.validation_documents
    if count is not None and count < benchmark_documents:
        raise UserError(
            f"vocabulary.validation_documents: {count} documents are fewer than the {benchmark_documents} that the benchmark is "
            "made of, so the model would be tested on training text; raise it, or lower download.benchmark_documents."
        )
    total = sum(group.text_bytes for group in row_groups(raw))
    wanted = min(LARGE_BYTES, max(LEAST_BYTES, min(SMALL_BYTES, total // 10), total // 256))
    found = size = 0
    for row in iterate_raw(raw, (TEXT, KIND)):
        if found >= (count if count is not None else benchmark_documents) and (count is not None or size >= wanted):
            return
        if row[TEXT]:
            found, size = found + 1, size + len(row[TEXT].encode("utf-8"))
            yield HeldOut(row[TEXT], row[KIND] or "")


def training_texts(raw: Path, skip: int, max_bytes: int) -> Iterator[str]:
    """Yield the texts behind the first `skip` documents, or row groups spread over them that have about `max_bytes`.

    They are a function of the corpus and the numbers, and end before the text that passes `max_bytes`, except the first.
    """
    size = 0
    for text in _texts(raw, skip, max_bytes):
        size += len(text.encode("utf-8"))
        if size > max_bytes and size > len(text.encode("utf-8")):
            return
        yield text


def _texts(raw: Path, skip: int, max_bytes: int) -> Iterator[str]:
    groups = row_groups(raw)
    seen = 0  # documents in the row groups so far
    for number in range(len(groups)):
        texts = [row[TEXT] for row in iterate_raw(raw, groups={number}) if row[TEXT]]
        if seen + len(texts) > skip:
            break
        seen += len(texts)
    else:
        return
    rest, later = texts[skip - seen :], groups[number + 1 :]
    chosen = _spread(later, max_bytes - sum(map(len, rest)))
    if len(chosen) == len(later):
        yield from rest
    else:
        chosen = _spread(later, max_bytes)
    yield from (row[TEXT] for row in iterate_raw(raw, groups={number + 1 + place for place in chosen}) if row[TEXT])


def _spread(groups: list[RowGroup], max_bytes: int) -> list[int]:
    """Return the places of row groups with about `max_bytes` of text, spread evenly; all of them if they have no more."""
    total = sum(group.text_bytes for group in groups)
    if total <= max_bytes:
        return list(range(len(groups)))
    count = max(1, max_bytes * len(groups) // total)
    return [place * len(groups) // count for place in range(count)]
