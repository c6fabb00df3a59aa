"""Exact deduplication: find documents with equal texts by their hashes. The first one in the order of the corpus stays."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from pipelib.tokens.unit_file import Hashes

_BLOCK = 1 << 20


def find_duplicates(parts: Iterable[Hashes], documents: int) -> npt.NDArray[np.bool_]:
    """Return which documents have the hash of an earlier one (documents,).

    This needs at most 32 bytes of memory per document: for its hash, its place in the sorted order, and the sort itself.

    Args:
        parts: the 128-bit hashes of all documents (part, 2), in the order of the corpus.
        documents: the number of documents.
    """
    # Two arrays of 64 bits, because NumPy has no 128-bit integers.
    high, low = np.empty(documents, np.uint64), np.empty(documents, np.uint64)
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        high[start:end], low[start:end] = part[:, 0], part[:, 1]
    assert end == documents, f"{end} hashes for {documents} documents"
    order = np.lexsort((low, high))  # stable: equal hashes stay in the order of the corpus
    duplicate = np.zeros(documents, bool)
    # Compare each document with its predecessor in the sorted order, block by block to bound memory.
    for start in range(1, documents, _BLOCK):
        before, after = order[start - 1 : start - 1 + _BLOCK], order[start : start + _BLOCK]
        before = before[: len(after)]
        duplicate[after] = (high[before] == high[after]) & (low[before] == low[after])
    return duplicate
