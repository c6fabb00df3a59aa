"""Batches as a function of the step: step n always gets the same rows, on any number of ranks and in any order.

The training shards form one stream of tokens. Row i is its tokens [i·T, i·T + T], which is T + 1 tokens, because the
targets are the inputs shifted by one. Each epoch visits every row exactly once, in an order that a seeded permutation
computes from the index alone. So the loader has no state, and step 4,711 costs the same as step 0.
"""

import bisect
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pipelib.tokens.shards import Manifest, ShardFile, shard_tokens
from pipelib.vocabulary.tokenizer import Tokens

T = TypeVar("T")

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""`inputs` and `targets`, each (rows, T)."""


MAX_OPEN_SHARDS = 64
"""Files that a stream keeps open: far below the usual limit of 1,024 per process."""


class TokenStream:
    """Several shards, concatenated, as one array of tokens on disk.

    A shard is opened when its first token is needed, so thousands of shards cost nothing at the start. Tokens are read by
    position, not through a memory map: if the corpus does not fit into memory, each row of 2 KB would fault in 128 KB and
    more (docs/log.md has the figures).

    Args:
        shards: the number of tokens of each file.
    """

    def __init__(self, shards: Mapping[Path, int]) -> None:
        self._paths, self._sizes = list(shards), list(shards.values())
        self._ends = list(accumulate(self._sizes))  # where each shard ends in the stream
        self._open = lru_cache(MAX_OPEN_SHARDS)(ShardFile)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> Tokens:
        """Return tokens [start, start + count).

        Raises:
            UserError: a shard is missing, is not a shard, or is shorter than it was said to be.
        """
        assert 0 <= start <= start + count <= len(self)
        pieces = []
        index = bisect.bisect_right(self._ends, start)
        while count:
            begin = start - (self._ends[index] - self._sizes[index])
            piece = self._open(self._paths[index]).read(begin, min(count, self._sizes[index] - begin))
            pieces.append(piece)
            start, count, index = start + len(piece), count - len(piece), index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class RowSource(Protocol):
    """Rows of equal length, by their number."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the inputs and targets of the given rows, each (rows, T), and whatever else the objective takes."""
        ...


class Rows:
    """A stream of tokens as rows of T + 1 tokens."""

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self._stream, self._length = stream, sequence_length

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self._length

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return the inputs and targets of the given rows, each (rows, T)."""
        rows = np.empty((len(indices), self._length + 1), np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            row[:] = self._stream.read(index * self._length, self._length + 1)  # + 1: the last token is only a target
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def permute(indices: npt.NDArray[np.int64], count: int, key: int) -> npt.NDArray[np.int64]:
    """Permute the given indices by a pseudorandom permutation of range(count). Each key gives another permutation.

    This is a four-round Feistel network over the smallest even number of bits that holds `count`. A value outside the range
    goes through the network again until it is inside, which keeps it a permutation (Black and Rogaway, Ciphers with
    Arbitrary Finite Domains, 2002).
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

    # The network permutes a power of two, which may be larger than `count`: repeat for the values outside.
    values = once(indices.astype(np.uint64))
    while (outside := values >= count).any():
        values[outside] = once(values[outside])
    return values.astype(np.int64)


def splitmix64(value: int) -> int:
    """Hash an integer to 64 bits (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BatchPlan:
    """Which rows form the global batch of each step: a function of (data fingerprint, seed, step) alone."""

    def __init__(self, fingerprint: str, seed: int, row_count: int, rows_per_step: int) -> None:
        self.row_count, self.rows_per_step = row_count, rows_per_step
        self._key = splitmix64(int(fingerprint[:16], 16) ^ splitmix64(seed))

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the rows of step `step`, in order (rows_per_step,)."""
        positions = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step, dtype=np.int64)
        epochs, positions = np.divmod(positions, self.row_count)
        rows = np.empty_like(positions)
        # A batch may span several epochs, and each epoch has its own permutation.
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = permute(positions[here], self.row_count, splitmix64(self._key + epoch))
        return rows

    def share(self, step: int, micro_batch_size: int, rank: int, world_size: int) -> npt.NDArray[np.int64]:
        """Return the rows of one rank's micro-batches of step `step` (micro_steps, micro_batch_size).

        The global batch is cut into micro-batches, which go to the ranks in turn.
        """
        return self.rows(step).reshape(-1, world_size, micro_batch_size)[:, rank]  # (micro_steps, ranks, rows)

    def first_step(self, epoch: int) -> int:
        """Return the step whose batch has the first row of an epoch. Both are counted from 0."""
        return epoch * self.row_count // self.rows_per_step

    def epochs(self, steps: int) -> float:
        """Return how many passes over the rows this many steps make."""
        return steps * self.rows_per_step / self.row_count


class Loader(Generic[T]):
    """One rank's share of every global batch. A thread reads and prepares the next step's share during the current step.

    The global batch does not depend on the number of ranks; `BatchPlan.share` distributes it.

    Args:
        prepare: converts a micro-batch to what `micro_batches` returns.
    """

    def __init__(
        self,
        rows: RowSource,
        plan: BatchPlan,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        prepare: Callable[[tuple[npt.NDArray[np.int64], ...]], T],
    ) -> None:
        self._rows, self._plan, self._size, self._prepare = rows, plan, micro_batch_size, prepare
        self._rank, self._world_size = rank, world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[list[T]]] | None = None
        self.wait = 0.0
        """Seconds that the last call of `micro_batches` took: almost zero if reading is faster than training."""

    def micro_batches(self, step: int) -> list[T]:
        """Return this rank's micro-batches of step `step`, in order."""
        started = time.perf_counter()
        due, future = self._ahead or (-1, None)
        # After a rollback, the step that was read ahead is not the requested one.
        batches = future.result() if future is not None and due == step else self._read(step)
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        self.wait = time.perf_counter() - started
        return batches

    def _read(self, step: int) -> list[T]:
        micro_batches = self._plan.share(step, self._size, self._rank, self._world_size)
        return [self._prepare(self._rows.batch(indices)) for indices in micro_batches]


def training_rows(folder: Path, manifest: Manifest, sequence_length: int) -> Rows:
    """Return the rows of all training shards of a folder."""
    return Rows(TokenStream({folder / shard.name: shard.tokens for shard in manifest.split("train")}), sequence_length)


def validation_batches(path: Path, sequence_length: int, rows_per_batch: int, tokens: int | None) -> Iterator[Batch]:
    """Yield the rows of a validation shard in order, as batches.

    Args:
        tokens: use this many tokens, rounded down to whole rows. None uses every token: a last, shorter row holds the
            rest, so that each token but the very first is a target exactly once.
    """
    stream = TokenStream({path: shard_tokens(path)})
    rows = Rows(stream, sequence_length)
    count = len(rows) if tokens is None else min(len(rows), tokens // sequence_length)
    for start in range(0, count, rows_per_batch):
        yield rows.batch(np.arange(start, min(count, start + rows_per_batch), dtype=np.int64))
    rest = len(stream) - 1 - count * sequence_length
    if tokens is None and rest:
        row = stream.read(count * sequence_length, rest + 1).astype(np.int64)[None]
        yield row[:, :-1], row[:, 1:]
