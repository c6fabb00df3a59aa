"""A process pool that survives the death of a worker at any moment, SIGKILL included.

Each worker has its own pipe to this process. The workers of `concurrent.futures.ProcessPoolExecutor` share one pipe: when
a worker dies while it sends a result of more than 16 KB, the reader waits for the rest forever (observed with CPython
3.11). Here the pipe of a dead worker closes, and the wait ends with an error.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Self

from pipelib.errors import UserError
from pipelib.processes import die_with_parent, signals_blocked


class Pool:
    """Worker processes, each started when there is work for it.

    They are spawned, not forked: this works the same on every system, and is safe while this process has threads
    (MLflow's).
    """

    def __init__(
        self, max_processes: int, start: Callable[..., object], *arguments: object, finish_tasks: bool = True
    ) -> None:
        """Args:
        max_processes: how many may run at once.
        start: called with `arguments` in each process before its first task; a module-level function.
        finish_tasks: on an error or a stop, let each worker finish its current task; otherwise kill it.
        """
        self._max_processes, self._start, self._finish_tasks = max_processes, (start, arguments), finish_tasks
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let each worker finish its current task, or kill it, and wait until all have ended."""
        if error is not None and not self._finish_tasks:
            for process in self._processes:
                process.kill()
        # A worker whose pipe is closed ends when it next reads or writes.
        for connection in (*self._idle, *self._busy):
            connection.close()
        for process in self._processes:
            process.join()

    def in_order(self, task: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the results in the order of the calls; otherwise as `run`. Results that come too early wait in memory."""
        early: dict[int, Any] = {}
        after = 0
        for number, result in self.run(task, calls):
            early[number] = result
            while after in early:
                yield early.pop(after)
                after += 1

    def run(self, task: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield the index of each call and the result of `task(*call)`, as the calls finish.

        An error in a task or in `start` is raised here too, as a RuntimeError if it cannot be pickled. After an error the
        pool must not be used.

        Args:
            task: a module-level function.
            calls: taken one by one, when there is a worker for them.

        Raises:
            UserError: a worker was killed.
        """
        waiting = enumerate(calls)
        self._dispatch(task, waiting)
        while self._busy:
            for ready in wait([*self._busy]):
                assert isinstance(ready, Connection)
                with _explain_dead_worker():
                    result, error = ready.recv()
                if error is not None:
                    raise error
                number = self._busy.pop(ready)
                self._idle.append(ready)
                self._dispatch(
                    task, waiting
                )  # before the yield, so that no worker is idle while the caller uses the result
                yield number, result

    def _dispatch(self, task: Callable[..., Any], waiting: Iterator[tuple[int, tuple[Any, ...]]]) -> None:
        """Give a waiting call to every idle worker, and to new workers up to the limit."""
        while self._idle or len(self._processes) < self._max_processes:
            if (numbered := next(waiting, None)) is None:
                return
            number, call = numbered
            connection = self._idle.pop() if self._idle else self._start_process()
            self._busy[connection] = number
            with _explain_dead_worker():
                connection.send((task, call))

    def _start_process(self) -> Connection:
        """Start a worker and return this end of its pipe."""
        mine, its = self._context.Pipe()
        process = self._context.Process(target=_work, args=(its, len(self._processes), *self._start), daemon=True)
        resource_tracker.ensure_running()  # otherwise `start` would do it, and unblock the signals
        with signals_blocked():  # the worker inherits the block and keeps it: this process decides when to stop
            process.start()
        its.close()  # otherwise the pipe would stay open after the worker's death
        self._processes.append(process)
        return mine


@contextmanager
def _explain_dead_worker() -> Iterator[None]:
    """Raise a UserError if the worker at the other end of a pipe is dead."""
    try:
        yield
    except (EOFError, OSError):
        raise UserError(
            "a worker was killed (by the system, if memory ran out), so this stage is not complete; run dvc repro again, with "
            "fewer workers if memory is short (PIPELIB_WORKERS=1)."
        ) from None


_number = 0


def worker_number() -> int:
    """The number of this worker process in its pool, from 0."""
    return _number


def _work(connection: Connection, number: int, start: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Run one task after the other in a worker, until the pipe closes."""
    global _number
    _number = number
    die_with_parent(signal.SIGKILL)  # all other stop signals are blocked here
    start_error = None
    try:
        start(*arguments)
    except Exception as error:
        start_error = _pickle_error(error)
    try:
        while True:
            request = connection.recv_bytes()
            connection.send_bytes(_run_task(request) if start_error is None else start_error)
    except (EOFError, OSError):  # the parent has closed the pipe, or is dead
        return


def _run_task(request: bytes) -> memoryview:
    """Run a pickled task and return its pickled result or error."""
    try:
        task, call = pickle.loads(request)
        return ForkingPickler.dumps((task(*call), None))
    except Exception as error:
        return _pickle_error(error)


def _pickle_error(error: Exception) -> memoryview:
    """Pickle an error with its traceback; if the error cannot be pickled, only the traceback."""
    text = f"In a worker: {''.join(traceback.format_exception(error))}"
    error.add_note(text)
    try:
        data = ForkingPickler.dumps((None, error))
        pickle.loads(data)  # fails for an error whose __init__ needs more arguments than its message
    except Exception:
        return ForkingPickler.dumps((None, RuntimeError(text)))
    return data
