"""Worker processes, each with its own tokenizer."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pipelib.pool import Pool
from pipelib.processes import keep_freed_memory, peak_memory, worker_count
from pipelib.tokens.units import DoneUnit, Unit, encode_unit
from pipelib.vocabulary.engines import Engine, load_engine
from pipelib.vocabulary.tokenizer import Tokenizer

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of `$PIPELIB_WORKERS` processes (default: one per core). `$PIPELIB_TOKENIZER` selects their engine."""

    def __init__(self, tasks: int, tokenizer: Tokenizer) -> None:
        """Args:
        tasks: the maximum number of tasks; no more workers than that are started.
        """
        self.count = worker_count(tasks)
        self.engine = os.environ.get("PIPELIB_TOKENIZER", "gigatoken")
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """The seconds that all workers together spent on each step."""
        self.peak_memory = 0
        """The peak memory of any worker so far, in bytes."""
        self._pool = Pool(self.count, _start, self.engine, tokenizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)

    def each(
        self,
        step: str,
        task: Callable[..., Result],
        items: Sequence[Item],
        *arguments: Any,
        done: Callable[[Item], None] = lambda _: None,
    ) -> list[Result]:
        """Return `task(item, *arguments)` for every item, in the order of the items.

        Args:
            step: the name under which the workers' time is counted.
            task: a module-level function, called in a worker.
            done: called in this process for each finished item.

        Raises:
            UserError: a worker was killed.
        """
        # Results arrive in any order, so collect them by the index of their item.
        results: dict[int, Result] = {}
        for number, result in self._run(step, task, items, *arguments):
            results[number] = result
            done(items[number])
        return [results[number] for number in range(len(items))]

    def stream(
        self, step: str, task: Callable[..., Result], items: Sequence[Item], *arguments: Any
    ) -> Iterator[Result]:
        """Yield `task(item, *arguments)` for every item, as the calls finish; otherwise as `each`."""
        for _, result in self._run(step, task, items, *arguments):
            yield result

    def _run(
        self, step: str, task: Callable[..., Result], items: Sequence[Item], *arguments: Any
    ) -> Iterator[tuple[int, Result]]:
        calls = [(task, item, *arguments) for item in items]
        for number, (result, seconds, peak) in self._pool.run(_timed, calls):
            self.seconds[step] += seconds
            self.peak_memory = max(self.peak_memory, peak)
            yield number, result


def _timed(task: Callable[..., Result], *arguments: Any) -> tuple[Result, float, int]:
    """Return a task's result, the seconds it took, and the peak memory of its worker."""
    started = time.perf_counter()
    result = task(*arguments)
    return result, time.perf_counter() - started, peak_memory()


_engine: tuple[str, Tokenizer]


def _start(name: str, tokenizer: Tokenizer) -> None:
    global _engine
    keep_freed_memory()
    _engine = name, tokenizer


@cache
def worker_engine() -> Engine:
    """Return the engine of the worker that calls this. It is loaded on first use."""
    return load_engine(*_engine)


def encode_here(unit: Unit, store: Path) -> DoneUnit:
    """Encode a unit in the worker that calls this."""
    path = unit.file(store)
    return DoneUnit(path, unit.identity, *encode_unit(unit, worker_engine(), path))
