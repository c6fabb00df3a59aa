"""Put documents into a pseudorandom order. Memory holds a part of them, however many there are."""

import hashlib
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelib.corpus.raw import Document
from pipelib.files import remove

BUCKET_BYTES = 64 << 20
"""Bytes of text in a bucket, on average; a bucket is sorted in memory."""
_BUFFER_BYTES = 64 << 20


def shuffle(
    documents: Iterable[tuple[str, Document]],
    seed: int,
    total_bytes: int,
    folder: Path,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[Document]:
    """Yield the documents in an order that is a function of their names and the seed.

    More documents do not change the order of those that were there. The text is on disk a second time until the end.

    Args:
        documents: each with a name that no other has.
        total_bytes: about the bytes of their text.
        folder: for the text until it is sorted; what is there is removed.
    """
    remove(folder)
    folder.mkdir(parents=True)
    count = max(1, -(-total_bytes // bucket_bytes))
    _fill_buckets(documents, seed, count, folder)
    for number in range(count):
        path = folder / str(number)
        if path.exists():
            yield from (document for _, document in sorted(_read(path), key=lambda item: item[0]))
            path.unlink()
    remove(folder)


Keyed = tuple[int, Document]


def _fill_buckets(documents: Iterable[tuple[str, Document]], seed: int, count: int, folder: Path) -> None:
    """Write each document into the bucket of its key: the first bucket has the smallest keys."""
    waiting: list[list[Keyed]] = [[] for _ in range(count)]
    size = 0
    for name, document in documents:
        key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()[:8], "big")
        waiting[key * count >> 64].append((key, document))
        size += len(document.text)
        if size >= _BUFFER_BYTES:
            _write(waiting, folder)
            size = 0
    _write(waiting, folder)


def _write(waiting: list[list[Keyed]], folder: Path) -> None:
    for number, bucket in enumerate(waiting):
        if bucket:
            with (folder / str(number)).open("ab") as file:
                pickle.dump(bucket, file, pickle.HIGHEST_PROTOCOL)
            bucket.clear()


def _read(path: Path) -> Iterator[Keyed]:
    with path.open("rb") as file:
        while file.peek(1):
            yield from pickle.load(file)
