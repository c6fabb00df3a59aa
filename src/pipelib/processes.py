"""Processes: how many to use, the memory they hold, how they are asked to stop, and that none outlives its parent."""

import errno
import io
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from pipelib.errors import UserError

ORDERS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a process to stop. A second one ends it at once."""
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that announce the end: of the terminal, or of the job's time, as Slurm, Grid Engine, LSF and limits on CPU time do.
They may come several times, from the shell and from the kernel, and each time they mean the same."""


def worker_count(most: int) -> int:
    """Processes to use: `$PIPELIB_WORKERS`, else one for every core, but no more than there is work for."""
    return max(1, min(most, positive_setting("PIPELIB_WORKERS") or available_cores()))


def positive_setting(name: str) -> int | None:
    """A number that the user may set in the environment; None where it is not set.

    Raises:
        UserError: it is not a whole number, or less than 1.
    """
    wish = os.environ.get(name, "")
    if wish and not (wish.isdecimal() and int(wish)):
        raise UserError(
            f"{name}={wish} is not a whole number from 1 on, so it cannot be followed; give one, or unset it."
        )
    return int(wish) if wish else None


def natural_setting(name: str) -> int:
    """A number from 0 on that the user may set in the environment; 0 where it is not set.

    Raises:
        UserError: it is not a whole number.
    """
    wish = os.environ.get(name, "") or "0"
    if not wish.isdecimal():
        raise UserError(
            f"{name}={wish} is not a whole number from 0 on, so it cannot be followed; give one, or unset it."
        )
    return int(wish)


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those it may run on, but no more than a container's quota of CPU time, rounded up.

    Args:
        root: where /proc and /sys are.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """The cores' worth of CPU time that each control group around this process allows, where it limits it."""
    for group in control_groups("cpu", root):
        quota = f"{system_file(group / 'cpu.cfs_quota_us')} {system_file(group / 'cpu.cfs_period_us')}"
        allowed, _, period = (system_file(group / "cpu.max") or quota).partition(" ")
        if allowed.isdecimal() and period.isdecimal() and int(period):  # "max" or -1 is no limit
            yield int(allowed) / int(period)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of the control groups that this process is in, innermost first: version 2, or version 1 of a controller.

    In a container the path may be one that only the host has; the file system's own root is then the container's group.
    """
    for line in system_file(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts = ["", "unified"] if not controllers else [controllers, controller]
        if not controllers or controller in controllers.split(","):
            inside = PurePosixPath(path.lstrip("/"))
            for mount in mounts:
                yield from (root / "sys/fs/cgroup" / mount / group for group in (inside, *inside.parents))


def system_file(path: Path) -> str:
    """A small file of the system; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def resident_memory() -> int:
    """Memory that this process holds, in bytes; where the system does not tell, the most that it ever held."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory() -> int:
    """The most memory that this process ever held, in bytes, pages of mapped files included."""
    if sys.platform == "linux":  # getrusage counts what the parent held when it forked
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> None:
    """Have glibc reuse large freed blocks instead of returning them to the kernel, which would clear them page by page.

    For work that takes and frees the same large arrays over and over. A training step does with the logits and their
    gradient, 50,304 numbers a token: a step of a small GPT-2 on two cores took 340 ms instead of 607 ms, and 2.2 GB instead
    of 1.2 GB (`make bench-train`, docs/log.md). Tokenization does with its texts and tokens.
    """
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_mmap_threshold, m_trim_threshold = -3, -1  # malloc.h
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def tie_to_parent(death_signal: signal.Signals = signal.SIGTERM) -> None:
    """Have `death_signal` end this process when the process that started it dies.

    So a killed DVC leaves no stage running, and a killed stage no workers. On Linux the kernel does it at once
    (prctl, PR_SET_PDEATHSIG); elsewhere a thread looks once a second. The process that is meant may have died before this
    call, while Python was starting; `$PIPELIB_PARENT`, where it is set, says which one it was.
    """
    parent = os.getppid()
    meant = positive_setting("PIPELIB_PARENT") or parent
    os.environ.pop("PIPELIB_PARENT", None)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(death_signal))
        if os.getppid() != parent or (meant != parent and _has_ended(meant)):
            os.kill(os.getpid(), death_signal)
    else:
        import threading

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os.kill(os.getpid(), death_signal)

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _has_ended(pid: int) -> bool:
    """Whether a process is gone, or nothing but its exit status is left of it (Linux)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


class Stopped(KeyboardInterrupt):
    """This process was asked to stop, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def on_first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Within the block the first signal of `ORDERS` and `WARNINGS` calls `act` with its number.

    After it a warning does nothing more, and one order neither: a scheduler warns, and later orders. A second order ends the
    process at once. The system's SIGTERM for the death of the process that started this one (`tie_to_parent`) is not a second
    one: who stops a whole job signals DVC, which dies of it, and the stage. SIGHUP and Ctrl-C stay ignored where they were
    when this process started, as `nohup` and a shell's background jobs have it.
    """
    parent = os.getppid()
    seen: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        ordered = any(earlier in ORDERS for earlier in seen)
        seen.append(number)
        if len(seen) == 1:
            act(number)
        elif ordered and number in ORDERS and (number != signal.SIGTERM or os.getppid() == parent):
            end_by(number)

    before = {number: signal.getsignal(number) for number in (*ORDERS, *WARNINGS)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN or number not in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by(number: int) -> None:
    """Die of a signal at once, without a traceback; what is on disk is what a kill leaves."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def die_of_signals() -> None:
    """From here on a signal that asks to stop ends this process at once and without a traceback, as Python's start does not.

    For the seconds in which a process imports, before it knows better (`on_first_signal`). SIGHUP and Ctrl-C stay ignored
    where they are.
    """
    for number in (*ORDERS, *WARNINGS):
        if signal.getsignal(number) != signal.SIG_IGN or number not in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Within the block this thread gets no signal that asks to stop; it does after it. Processes started in it never get one.

    A signal to the whole process can still arrive through another thread.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*ORDERS, *WARNINGS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Unstoppable(io.FileIO):
    """A file whose readers may go away: what is written to a closed terminal or pipe is lost, without an error."""

    def write(self, data: Any) -> int:
        """See `io.RawIOBase`."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """Have this process print on where nobody can read it: a terminal may be closed before the last checkpoint is saved."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            file = io.BufferedWriter(_Unstoppable(stream.fileno(), "w", closefd=False))
            line_buffering = stream.line_buffering or name == "stderr"
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=line_buffering))


def leave_other_jobs() -> None:
    """Forget the ranks that a job around this process names (Kubernetes, Slurm's scripts, another torchrun).

    They are not ours: a training would wait for ranks that nobody starts, and lm-eval would leave its result to "rank 0".
    `PET_LOCAL_ADDR` stays, which people set for us (docs/how-to/several-machines.md).
    """
    for name in list(os.environ):
        if name in _RANK_VARIABLES or (name.startswith(("PET_", "TORCHELASTIC_")) and name != "PET_LOCAL_ADDR"):
            del os.environ[name]


_RANK_VARIABLES = {
    *(f"{whose}{what}" for whose in ("", "LOCAL_", "GROUP_", "ROLE_", "NODE_") for what in ("RANK", "WORLD_SIZE")),
    "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
