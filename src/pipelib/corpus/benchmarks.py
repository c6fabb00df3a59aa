"""Benchmarks: four-way completion and held-out documents, both made from the corpus itself, and sets from the hub.

A completion item is a passage of a document: 24 to 48 words of context and the 6 to 12 words that follow. The three
wrong endings have the same number of words. They come from three other documents, at the same relative position, so
neither length nor position reveals the right ending. A scorer joins `ctx + " " + ending`, as HellaSwag's does. Chance is
0.25.

In a text without spaces between words, such as Chinese or Thai, each letter counts as a word. A scorer joins with a space
there too, as lm-eval does in `xstorycloze_zh`; it stands before the wrong endings as well.

Everything is a function of the documents and the seed: positions and lengths are drawn with SHA-256, which is the same in
every version of Python. Expect 2,105 items from the first 480 documents of the offline corpus, seed 1337.

The sets from the hub are those that lm-eval 0.4.13 scores, each from the repository and the split that its task file
names. They are JSON lines with the dataset's own columns, which `dataset_path: json` reads.
"""

import bisect
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelib.corpus.hub_benchmarks import HUB_BENCHMARKS
from pipelib.corpus.hub_lists import HubPin
from pipelib.corpus.hub_transfer import HubRepo
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.parquet import iterate_raw, stated_text_bytes
from pipelib.corpus.raw import damaged
from pipelib.errors import UserError
from pipelib.files import sha256_file, write_atomic, write_json, write_text
from pipelib.workspace.places import MANIFEST

CONTEXT_WORDS = (24, 48)
"""Minimum and maximum words of a context. The first items of a document have the shorter contexts."""
ENDING_WORDS = (6, 12)
"""Minimum and maximum words of an ending."""
SLOT_WORDS = 20
"""Minimum distance in words between the slots of two endings of one document. Endings never overlap, but contexts may,
because half of all documents are shorter than two complete items."""
ITEMS_PER_DOCUMENT = 6
"""Maximum items from one document, so that long documents do not dominate."""
CHOICES = 4

_WITHOUT_SPACES = (
    r"\u0e00-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese; Khmer
    r"\u3001-\u312f\u3400-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff"  # kana, Chinese characters, their punctuation
)
"""The letters of scripts without spaces between words, as ranges of a regular expression."""
_LETTER = re.compile(rf"[{_WITHOUT_SPACES}]")
_LETTERS = re.compile(rf"(?:[{_WITHOUT_SPACES}]|[^\s{_WITHOUT_SPACES}]+)[^\w\s]*")
"""A letter, or a word of another script; with the marks and the punctuation that follow it."""
_WORDS = re.compile(r"\S+")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Text:
    """A document with the positions of its words."""

    index: int
    """Its number in the corpus, from 0."""
    id: str
    text: str
    words: Sequence[tuple[int, int]]
    """Where each word starts and ends in `text`."""

    def stretch(self, first: int, count: int) -> str:
        """Return `count` words, starting with word `first`, with the white space between them."""
        return self.text[self.words[first][0] : self.words[first + count - 1][1]]


class _Draws:
    """A reproducible sequence of pseudorandom integers. Its name decides the values."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0

    def below(self, limit: int) -> int:
        """Return the next number, from 0 to `limit` - 1."""
        digest = hashlib.sha256(f"{self._name} {self._count}".encode()).digest()
        self._count += 1
        return int.from_bytes(digest[:8], "big") % limit

    def between(self, low: int, high: int) -> int:
        """Return the next number, from `low` to `high`, both included."""
        return low + self.below(high - low + 1)


def completion_items(documents: Iterable[Row], seed: int) -> list[dict[str, Any]]:
    """Make four-way completion items in HellaSwag's schema.

    An item is left out if an earlier item has the same right ending, or if there are not three different wrong endings.
    Both happen when documents share a template.

    Args:
        documents: rows with `text` and `id`, in the order of the corpus. Documents of fewer than 44 words give no items.
        seed: decides the positions of the items, their wrong endings, and the position of the right answer.
    """
    texts = [_text(index, row) for index, row in enumerate(documents)]
    usable = [text for text in texts if _slots(text)]
    items: list[dict[str, Any]] = []
    seen: set[str] = set()
    for text in usable:
        for slot in range(_slots(text)):
            # Each item has its own sequence, so that one item does not change the draws of the next.
            draws = _Draws(f"{seed} {text.index} {slot}")
            item = _item(text, slot, usable, draws)
            if item is None or _normalized(item["endings"][item["label"]]) in seen:
                continue
            seen.add(_normalized(item["endings"][item["label"]]))
            items.append({"ind": len(items), **item})
    return items


def _text(index: int, row: Row) -> _Text:
    is_without_spaces = 2 * len(_LETTER.findall(row["text"])) > len(row["text"])
    words = [match.span() for match in (_LETTERS if is_without_spaces else _WORDS).finditer(row["text"])]
    return _Text(index, row["id"] or f"document {index}", row["text"], words)


def _slots(text: _Text) -> int:
    """Return how many items a document gives."""
    return min(ITEMS_PER_DOCUMENT, max(0, len(text.words) - CONTEXT_WORDS[0]) // SLOT_WORDS)


def _item(text: _Text, slot: int, texts: Sequence[_Text], draws: _Draws) -> dict[str, Any] | None:
    """Make one item; None if there are not three different wrong endings."""
    # The words after the first minimal context are divided into slots; the ending is at a random place in its slot.
    width = (len(text.words) - CONTEXT_WORDS[0]) // _slots(text)
    count = draws.between(*ENDING_WORDS)
    start = CONTEXT_WORDS[0] + slot * width + draws.between(0, width - count)
    context = min(start, draws.between(*CONTEXT_WORDS))
    right = text.stretch(start, count)
    endings = _wrong_endings(right, text, start / (len(text.words) - count), count, texts, draws)
    if endings is None:
        return None
    label = draws.below(CHOICES)
    endings.insert(label, right)
    ctx = text.stretch(start - context, context)
    return {
        "activity_label": "Text",
        "ctx_a": ctx,
        "ctx_b": "",
        "ctx": ctx,
        "endings": endings,
        "label": label,
        "split": "val",
        "source_id": f"{text.id}~{start}",
        "document": text.index,
    }


def _wrong_endings(
    right: str, text: _Text, position: float, count: int, texts: Sequence[_Text], draws: _Draws
) -> list[str] | None:
    """Take `count` words at the relative `position` (0 to 1) of three other documents; None if that fails too often."""
    endings: list[str] = []
    taken = {_normalized(right)}
    sources = {text.index}
    for _ in range(20 * CHOICES):  # give up after 80 tries: the documents may share one template
        other = texts[draws.below(len(texts))]
        ending = other.stretch(int(position * (len(other.words) - count)), count)
        if other.index in sources or _normalized(ending) in taken:
            continue
        endings.append(ending)
        taken.add(_normalized(ending))
        sources.add(other.index)
        if len(endings) == CHOICES - 1:
            return endings
    return None


def _normalized(text: str) -> str:
    """Normalize case and white space, to compare endings."""
    return " ".join(text.split()).casefold()


def hub_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet or JSON lines file from the hub, unchanged.

    Raises:
        UserError: the file is neither. That is possible if its SHA-256 is only known from a mirror's list.
    """
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches():
                    yield from batch.to_pylist()
        else:
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, str(error), "delete it, check HF_ENDPOINT if you use a mirror, and run dvc repro") from None


def hellaswag_items(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Yield HellaSwag's rows in our schema: the label as a number, and no document of the corpus."""
    for row in rows:
        yield {
            "ind": row["ind"],
            "activity_label": row["activity_label"],
            "ctx_a": row["ctx_a"],
            "ctx_b": row["ctx_b"],
            "ctx": row["ctx"],
            "endings": row["endings"],
            "label": int(row["label"]),
            "split": row["split"],
            "source_id": row["source_id"],
            "document": None,
        }


def write_benchmarks(
    params: DownloadParams,
    raw: Path,
    folder: Path,
    fetch: Callable[[HubPin], AbstractContextManager[Path]],
    at_most: int | None = None,
) -> dict[str, Any]:
    """Make the evaluation sets that `download.benchmarks` names.

    Args:
        raw: the finished raw text.
        folder: gets one `.jsonl` per set, and `manifest.json`. `hellaswag.jsonl` is always written, with a single empty line
            if the set is not named.
        fetch: opens a verified file of the hub.
        at_most: for `benchmark_documents: auto`, the documents that are for validation.

    Returns:
        The manifest: for each file the number of items, the corpus documents it was made from, its SHA-256, and how it was
        made.

    Raises:
        UserError: the corpus is too short for both a benchmark and training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {}

    def add(name: str, rows: Iterable[Row], documents: int, made: str) -> None:
        items = _write_jsonl(folder / name, rows)
        manifest[name] = {"items": items, "documents": documents, "sha256": sha256_file(folder / name), "made": made}

    if "completion" in params.benchmarks:
        head = _first_documents(raw, params.benchmark_documents, at_most)
        items = completion_items(head, params.seed)
        _require_items(items, len(head))
        made = f"from the first documents of the corpus, seed {params.seed}, {CHOICES} choices"
        add("completion.jsonl", items, len(head), made)
        add(
            "heldout.jsonl",
            ({"text": row["text"]} for row in head if row["text"]),
            len(head),
            "the first documents of the corpus",
        )
    for name, benchmark in HUB_BENCHMARKS.items():
        if name in params.benchmarks:
            pin = HubPin(HubRepo(benchmark.repo, benchmark.revision), benchmark.path, benchmark.sha256)
            with fetch(pin) as path:
                rows = hellaswag_items(hub_rows(path)) if name == "hellaswag" else hub_rows(path)
                made = f"{pin.path} of {pin.repo.name} at {pin.repo.revision}, SHA-256 {sha256_file(path)}"
                add(f"{name}.jsonl", rows, 0, made)
    if "hellaswag" not in params.benchmarks:
        # The train stage depends on this file alone, so that other sets do not re-run it. It holds a newline because DVC
        # warns about an empty file whenever it hashes one.
        write_text(folder / "hellaswag.jsonl", "\n")
    write_json(folder / MANIFEST, manifest)
    return manifest


AUTO_DOCUMENTS, AUTO_BYTES = 480, 1_000_000
"""`benchmark_documents: auto` takes this many documents at most, and this many bytes of text: about 256,000 tokens."""


def _first_documents(raw: Path, count: int | Literal["auto"], at_most: int | None) -> list[dict[str, Any]]:
    """Return the first documents, with null texts as empty ones. Fail unless the corpus has more documents.

    Args:
        count: how many; `auto` takes a tenth of the text, and see `AUTO_DOCUMENTS`.
        at_most: for `auto`; None for no further limit.
    """
    most = AUTO_DOCUMENTS if count == "auto" else count
    rows = islice(iterate_raw(raw, ("text", "id")), most + 1)  # one more, to see whether any is left to train on
    head = [{**row, "text": row["text"] or ""} for row in rows]
    wanted = _automatic_count(head, stated_text_bytes(raw), at_most) if count == "auto" else count
    if len(head) <= wanted:
        raise UserError(
            f"download.benchmark_documents: {wanted}, but the corpus has only {len(head)} documents, so none would be "
            "left to train on; lower it (a tenth of the corpus is enough), add text, or drop completion from "
            "download.benchmarks."
        )
    return head[:wanted]


def _automatic_count(head: Sequence[Row], text_bytes: int, at_most: int | None) -> int:
    """Return how many documents make the benchmark; see `_first_documents`."""
    ends = list(accumulate(len(row["text"].encode("utf-8")) for row in head))
    # If the user names the documents for validation, all of them may be in the benchmark.
    limit = AUTO_BYTES if at_most is not None else min(AUTO_BYTES, text_bytes // 10)
    count = min(AUTO_DOCUMENTS, bisect.bisect_right(ends, limit), max(0, len(head) - 1))
    if at_most is not None:
        count = min(count, at_most)
    if count < CHOICES:
        takes = "a tenth of the text" if at_most is None else "documents for validation"
        raise UserError(
            f"download.benchmark_documents: auto takes {takes}, and that is {count} documents where a benchmark needs "
            f"{CHOICES}, so none can be made; {_MORE_DOCUMENTS}."
        )
    return count


_MORE_DOCUMENTS = (
    "add text, cut it into more documents (download.split), put them into another order (download.shuffle), or go without: set "
    "download.benchmarks and evaluate.tasks to []"
)


def _require_items(items: Sequence[Row], documents: int) -> None:
    if not items:
        raise UserError(
            f"download.benchmark_documents: the first {documents} documents give no completion items, because fewer than "
            f"four of them have {CONTEXT_WORDS[0] + SLOT_WORDS} words; {_MORE_DOCUMENTS}."
        )


def _write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines, and return how many there are."""
    count = 0
    with write_atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
            count += 1
    return count
