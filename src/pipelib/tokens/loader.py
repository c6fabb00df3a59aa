"""Batches as a function of the step: who asks for step n gets the same rows, on any number of ranks, in any order.

The training shards are one stream of tokens; row i is its tokens [i·T, i·T + T], one more than T, since targets are
inputs shifted by one. Each epoch visits every row exactly once, in an order that a seeded permutation computes from the
index alone: nothing is kept, nothing is drawn in turn, and step 4,711 costs what step 0 costs.
"""

import bisect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pipelib.tokens.shards import Manifest, open_shard
from pipelib.vocabulary.tokenizer import Tokens

T = TypeVar("T")

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""`inputs` and `targets`, each (rows, T)."""


class TokenStream:
    """Shards, one after the other, as one array of tokens on disk."""

    def __init__(self, paths: list[Path]) -> None:
        self._shards: list[Tokens] = [open_shard(path) for path in paths]
        self._ends = list(accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> Tokens:
        """Tokens [start, start + count), copied together where they cross from one shard into the next."""
        assert 0 <= start <= start + count <= len(self)
        pieces = []
        index = bisect.bisect_right(self._ends, start)
        while count:
            begin = start - (self._ends[index] - len(self._shards[index]))
            piece = self._shards[index][begin : begin + count]
            pieces.append(piece)
            start, count, index = start + len(piece), count - len(piece), index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Rows:
    """Rows of T + 1 tokens out of a stream."""

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self._stream, self._length = stream, sequence_length

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self._length

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Inputs and targets of the given rows, each (rows, T)."""
        rows = np.empty((len(indices), self._length + 1), np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            row[:] = self._stream.read(index * self._length, self._length + 1)
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def permute(indices: npt.NDArray[np.int64], count: int, key: int) -> npt.NDArray[np.int64]:
    """Where a permutation of range(count), one for every key, takes the given indices.

    A four-round Feistel network over the smallest even number of bits that holds `count`; what falls outside is sent
    through again until it falls inside, which keeps it a permutation (Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, 2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)

    def once(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for number in range(4):
            salt = np.uint64(splitmix64(key + number))
            left, right = right, left ^ (_mix(right ^ salt) & mask)
        return (left << shift) | right

    values = once(indices.astype(np.uint64))
    while (outside := values >= count).any():
        values[outside] = once(values[outside])
    return values.astype(np.int64)


def splitmix64(value: int) -> int:
    """64 well-mixed bits of an integer (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BatchPlan:
    """Which rows make the global batch of each step: a function of (data fingerprint, seed, step) alone."""

    def __init__(self, fingerprint: str, seed: int, row_count: int, rows_per_step: int) -> None:
        self.row_count, self.rows_per_step = row_count, rows_per_step
        self._key = splitmix64(int(fingerprint[:16], 16) ^ splitmix64(seed))

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """The rows of step `step`, in order (rows_per_step,)."""
        places = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step, dtype=np.int64)
        epochs, places = np.divmod(places, self.row_count)
        rows = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = permute(places[here], self.row_count, splitmix64(self._key + epoch))
        return rows

    def share(self, step: int, micro_batch_size: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
        """The rows of one rank's micro-batches of step `step` (micro_steps, micro_batch_size).

        The global batch is cut into micro-batches, and those are dealt to the ranks in turn.
        """
        return self.rows(step).reshape(-1, world_size, micro_batch_size)[:, rank]

    def first_step(self, epoch: int) -> int:
        """The step whose batch has the first row of an epoch, both counted from 0."""
        return epoch * self.row_count // self.rows_per_step

    def epochs(self, steps: int) -> float:
        """Passes over the rows that so many steps make."""
        return steps * self.rows_per_step / self.row_count


class Loader(Generic[T]):
    """One rank's share of every global batch, the next step's read and prepared on a thread while this one trains.

    `BatchPlan.share` deals out the batch, which as a whole does not depend on the number of ranks.

    Args:
        prepare: makes of a micro-batch what `micro_batches` gives.
    """

    def __init__(
        self,
        rows: Rows,
        plan: BatchPlan,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        prepare: Callable[[Batch], T],
    ) -> None:
        self._rows, self._plan, self._size, self._prepare = rows, plan, micro_batch_size, prepare
        self._rank, self._world_size = rank, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[T]]] | None = None
        self.wait = 0.0
        """Seconds that the last call of `micro_batches` took: next to nothing where reading keeps ahead of training."""

    def micro_batches(self, step: int) -> list[T]:
        """This rank's micro-batches of step `step`, in order."""
        started = time.perf_counter()
        due, future = self._ahead or (-1, None)
        batches = future.result() if future is not None and due == step else self._read(step)
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        self.wait = time.perf_counter() - started
        return batches

    def _read(self, step: int) -> list[T]:
        micro_batches = self._plan.share(step, self._size, self._rank, self._world_size)
        return [self._prepare(self._rows.batch(indices)) for indices in micro_batches]


def training_rows(folder: Path, manifest: Manifest, sequence_length: int) -> Rows:
    """The rows of all training shards of a folder."""
    return Rows(TokenStream([folder / shard.name for shard in manifest.split("train")]), sequence_length)


def validation_batches(path: Path, sequence_length: int, rows_per_batch: int, tokens: int | None) -> Iterator[Batch]:
    """The rows of a validation shard in order: as many whole ones as `tokens` tokens make, or every token.

    Where all are asked for, what is left after the last whole row comes as a shorter one, so that each token but the
    very first is a target exactly once.
    """
    stream = TokenStream([path])
    rows = Rows(stream, sequence_length)
    count = len(rows) if tokens is None else min(len(rows), tokens // sequence_length)
    for start in range(0, count, rows_per_batch):
        yield rows.batch(np.arange(start, min(count, start + rows_per_batch), dtype=np.int64))
    rest = len(stream) - 1 - count * sequence_length
    if tokens is None and rest:
        row = stream.read(count * sequence_length, rest + 1).astype(np.int64)[None]
        yield row[:, :-1], row[:, 1:]
