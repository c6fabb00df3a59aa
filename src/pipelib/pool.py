"""A pool of processes that any of them may leave at any instant, by SIGKILL too, without the others waiting for it.

Each has a pipe of its own to this process. In `concurrent.futures.ProcessPoolExecutor` all share one: when a process dies in
the middle of a result of more than 16 KB, the reader waits for its rest for ever, and so does everybody else (observed with
CPython 3.11). Here the dead one's pipe ends, and with it the wait.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Self

from pipelib.errors import UserError
from pipelib.processes import signals_held_back, tie_to_parent


class Pool:
    """Processes that are started when there is work for them.

    They are spawned, not forked: the same on every system, and safe beside the threads of this process (MLflow's).
    """

    def __init__(self, most: int, start: Callable[..., object], *arguments: object) -> None:
        """Args:
        most: processes at a time.
        start: called with `arguments` in each process before its first task; a function of a module.
        """
        self._most, self._start = most, (start, arguments)
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let each finish the task it is at, and end."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        for process in self._processes:
            process.join()

    def run(self, task: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """The number of each call and what `task(*call)` returns, as they get done.

        Args:
            task: a function of a module.

        Raises:
            UserError: a process was killed. Whatever a task or `start` raises is raised here too, as RuntimeError if it cannot
                travel, and the pool takes no more.
        """
        waiting = deque(enumerate(calls))
        self._hand_out(task, waiting)
        while self._busy:
            for ready in wait([*self._busy]):
                assert isinstance(ready, Connection)
                with _alive():
                    result, error = ready.recv()
                if error is not None:
                    raise error
                number = self._busy.pop(ready)
                self._idle.append(ready)
                self._hand_out(task, waiting)  # before the caller looks at the result, so that nobody is idle meanwhile
                yield number, result

    def _hand_out(self, task: Callable[..., Any], waiting: "deque[tuple[int, tuple[Any, ...]]]") -> None:
        """Give every process that is idle, or could be started, one of the calls that wait."""
        while waiting and (self._idle or len(self._processes) < self._most):
            connection = self._idle.pop() if self._idle else self._begin()
            number, call = waiting.popleft()
            self._busy[connection] = number
            with _alive():
                connection.send((task, call))

    def _begin(self) -> Connection:
        """A new process, at the other end of a pipe that nobody else holds."""
        mine, its = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(its, *self._start), daemon=True)
        resource_tracker.ensure_running()  # else `start` would, and let signals through that are held back
        with signals_held_back():  # in the new process for good: they are for the one that waits for it
            process.start()
        its.close()
        self._processes.append(process)
        return mine


@contextmanager
def _alive() -> Iterator[None]:
    """UserError where the process at the other end of a pipe is dead."""
    try:
        yield
    except (EOFError, OSError):
        raise UserError(
            "a worker was killed, by the system if memory ran out, so this stage is not complete; run dvc repro again, with "
            "fewer workers if memory is short (PIPELIB_WORKERS=1)."
        ) from None


def _serve(connection: Connection, start: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """What a process does: a task at a time, until nobody has another one for it."""
    tie_to_parent(signal.SIGKILL)  # it gets no other signal
    not_started = None
    try:
        start(*arguments)
    except Exception as error:
        not_started = _in_words(error)
    try:
        while True:
            asked = connection.recv_bytes()
            connection.send_bytes(_answer(asked) if not_started is None else not_started)
    except (EOFError, OSError):  # the one that waits is gone, or wants no more
        return


def _answer(asked: bytes) -> memoryview:
    """The result of a task or its error, as it travels."""
    try:
        task, call = pickle.loads(asked)
        return ForkingPickler.dumps((task(*call), None))
    except Exception as error:
        return _in_words(error)


def _in_words(error: Exception) -> memoryview:
    """An error as it travels, with its traceback; of one that cannot, the traceback alone."""
    words = f"In a worker: {''.join(traceback.format_exception(error))}"
    error.add_note(words)
    try:
        data = ForkingPickler.dumps((None, error))
        pickle.loads(data)  # some can be written and not be read: those whose __init__ wants more than a text
    except Exception:
        return ForkingPickler.dumps((None, RuntimeError(words)))
    return data
