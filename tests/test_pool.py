"""Workers give what their tasks return; errors and kills end the wait for them."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from pipelib.errors import UserError
from pipelib.pool import Pool, worker_number


def nothing() -> None: ...


def note(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def fail(number: int) -> int:
    raise UserError(f"{number} is no good")


def test_each_result_comes_with_the_number_of_its_call(tmp_path: Path) -> None:
    with Pool(2, note, tmp_path) as pool:
        first, second = dict(pool.run(square, [(n,) for n in range(20)])), dict(pool.run(square, [(7,)]))
    assert {number: result for number, (result, _) in first.items()} == {n: n * n for n in range(20)}
    started = {int(path.name) for path in tmp_path.iterdir()}
    assert {process for _, process in [*first.values(), *second.values()]} <= started
    assert len(started) == 2


def test_no_more_processes_than_calls(tmp_path: Path) -> None:
    with Pool(5, note, tmp_path) as pool:
        assert len(list(pool.run(square, [(1,)]))) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_to_do_starts_nothing(tmp_path: Path) -> None:
    with Pool(5, note, tmp_path) as pool:
        assert list(pool.run(square, [])) == []
    assert not list(tmp_path.iterdir())


def test_each_worker_has_a_number() -> None:
    with Pool(3, nothing) as pool:
        numbers = dict(pool.run(number_slowly, [(0.3,)] * 3))
    assert sorted(numbers.values()) == [0, 1, 2]


def number_slowly(seconds: float) -> int:
    time.sleep(seconds)
    return worker_number()


def test_a_stop_kills_workers_whose_tasks_are_long() -> None:
    started = time.monotonic()
    with Pool(1, nothing, finish_tasks=False) as pool:
        next(pool.run(number_slowly, [(0.0,), (600.0,)]))
        pool.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert time.monotonic() - started < 60


def test_an_error_of_a_task_is_raised_here_and_says_where_it_was() -> None:
    with Pool(2, nothing) as pool, pytest.raises(UserError, match="3 is no good") as raised:
        list(pool.run(fail, [(3,)]))
    assert "in fail" in raised.value.__notes__[0]


class UnreadableError(Exception):
    """Can be pickled, and not be unpickled."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"{number} is {what}")


class UnwritableError(Exception):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.made_by = lambda: None


def fail_unreadably() -> None:
    raise UnreadableError(3, "no good")


def fail_unwritably() -> None:
    raise UnwritableError("3 is no good")


@pytest.mark.parametrize("task", [fail_unreadably, fail_unwritably])
def test_an_error_that_cannot_travel_comes_as_text(task: Callable[[], None]) -> None:
    with Pool(1, nothing) as pool, pytest.raises(RuntimeError, match=f"(?s)in {task.__name__}.*Error: 3 is no good"):
        list(pool.run(task, [()]))


def test_an_error_of_the_start_is_raised_here() -> None:
    with Pool(2, fail, 3) as pool, pytest.raises(UserError, match="3 is no good") as raised:
        list(pool.run(square, [(1,), (2,)]))
    assert "in fail" in raised.value.__notes__[0]


def test_what_cannot_travel_is_an_error_and_no_wait() -> None:
    with Pool(1, nothing) as pool, pytest.raises(Exception, match="local object"):
        list(pool.run(_lambda, [()]))


def _lambda() -> object:
    return lambda: None


def test_killed_in_the_middle_of_a_result_it_is_not_waited_for(tmp_path: Path) -> None:
    with Pool(2, nothing) as pool:
        results = pool.run(take_turns, [(tmp_path, True), (tmp_path, False)])
        assert next(results) == (0, b"")
        (tmp_path / "go").touch()
        wait([*pool._busy])  # more is coming than a pipe holds, and nobody reads it
        os.kill(int((tmp_path / "second").read_text(encoding="ascii")), signal.SIGKILL)
        with pytest.raises(UserError, match=r"a worker was killed.*PIPELIB_WORKERS=1"):
            list(results)


def take_turns(folder: Path, is_first: bool) -> bytes:
    """The first returns once the second has begun, the second when it is told to."""
    if not is_first:
        (folder / ".second").write_text(str(os.getpid()), encoding="ascii")
        (folder / ".second").rename(folder / "second")
    while not (folder / ("second" if is_first else "go")).exists():
        time.sleep(0.01)
    return b"" if is_first else bytes(1 << 24)


@pytest.mark.parametrize("idle", [True, False])
def test_killed_with_or_without_a_task(tmp_path: Path, idle: bool) -> None:
    with Pool(1, note, tmp_path) as pool:
        if idle:
            list(pool.run(square, [(1,)]))
            (victim,) = (int(path.name) for path in tmp_path.iterdir())
            os.kill(victim, signal.SIGKILL)
        with pytest.raises(UserError, match="a worker was killed"):
            list(pool.run(square if idle else die, [(1,)]))


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
