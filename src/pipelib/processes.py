"""Processes: how many to use, how much memory they hold, how they stop on a signal, and how they die with their parent."""

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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a process to stop. A second one ends it immediately."""
WARNING_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that warn of the end: the terminal closes, or the job's time runs out (Slurm, Grid Engine, LSF, CPU time limits).
The shell and the kernel may each send the same warning, so repeated ones mean nothing more."""


def worker_count(max_useful: int) -> int:
    """Return how many processes to use: `$PIPELIB_WORKERS`, else one per core, but at most `max_useful`."""
    return max(1, min(max_useful, positive_int_from_env("PIPELIB_WORKERS") or available_cores()))


def positive_int_from_env(name: str) -> int | None:
    """Read a positive integer from an environment variable; None if it is not set.

    Raises:
        UserError: the value is not a positive integer.
    """
    value = os.environ.get(name, "")
    if value and not (value.isdecimal() and int(value)):
        raise UserError(f"{name}={value} is not valid: it must be a whole number, 1 or more; correct it, or unset it.")
    return int(value) if value else None


def natural_int_from_env(name: str) -> int:
    """Read an integer of at least 0 from an environment variable; 0 if it is not set.

    Raises:
        UserError: the value is not such an integer.
    """
    value = os.environ.get(name, "") or "0"
    if not value.isdecimal():
        raise UserError(f"{name}={value} is not valid: it must be a whole number, 0 or more; correct it, or unset it.")
    return int(value)


def available_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: its CPU affinity, limited by a container's CPU quota (rounded up).

    Args:
        root: the folder that holds /proc and /sys.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *_cpu_quotas(root)])))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota, in cores, of each control group around this process that has one."""
    for group in control_groups("cpu", root):
        quota = f"{system_file(group / 'cpu.cfs_quota_us')} {system_file(group / 'cpu.cfs_period_us')}"
        allowed, _, period = (system_file(group / "cpu.max") or quota).partition(" ")
        if allowed.isdecimal() and period.isdecimal() and int(period):  # "max" and -1 mean no limit
            yield int(allowed) / int(period)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders of this process's control groups, innermost first (cgroup version 2, or a controller's version 1).

    In a container the listed path may exist only on the host. The root of the mounted file system is then the container's
    own group.
    """
    # A line is NUMBER:CONTROLLERS:PATH; version 2 has number 0 and no controllers.
    for line in system_file(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts = ["", "unified"] if not controllers else [controllers, controller]
        if not controllers or controller in controllers.split(","):
            inside = PurePosixPath(path.lstrip("/"))
            for mount in mounts:
                yield from (root / "sys/fs/cgroup" / mount / group for group in (inside, *inside.parents))


def system_file(path: Path) -> str:
    """Read a small file of the system; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def resident_memory() -> int:
    """Return the memory that this process holds, in bytes. Outside Linux, return the peak instead."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory() -> int:
    """Return the peak memory of this process, in bytes, pages of mapped files included."""
    if sys.platform == "linux":  # getrusage would also count the memory of the parent when it forked
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks instead of returning them to the kernel, which would clear them page by page.

    This helps work that allocates and frees the same large arrays again and again. A training step does so with the logits
    and their gradient, 50,304 numbers per token: a step of a small GPT-2 on two cores took 340 ms instead of 607 ms, and
    2.2 GB instead of 1.2 GB (`make bench-train`, docs/log.md). Tokenization does so with its texts and tokens.
    """
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_mmap_threshold, m_trim_threshold = -3, -1  # malloc.h
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def die_with_parent(death_signal: signal.Signals = signal.SIGTERM) -> None:
    """Send `death_signal` to this process when its parent dies.

    So a killed DVC leaves no stage running, and a killed stage leaves no workers. On Linux the kernel sends the signal
    (prctl, PR_SET_PDEATHSIG); elsewhere a thread checks once a second. The parent may already have died, while Python was
    starting: `$PIPELIB_PARENT`, if set, is the process number of the intended parent.
    """
    parent = os.getppid()
    intended = positive_int_from_env("PIPELIB_PARENT") or parent
    os.environ.pop("PIPELIB_PARENT", None)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(death_signal))
        # The parent may have died before prctl, and then the kernel sends nothing.
        if os.getppid() != parent or (intended != parent and _has_ended(intended)):
            os.kill(os.getpid(), death_signal)
    else:
        # Without prctl, a process whose parent died gets another parent: check for that.
        import threading

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os.kill(os.getpid(), death_signal)

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _has_ended(pid: int) -> bool:
    """Return whether a process is gone or a zombie (Linux)."""
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
    """Call `act` with the number of the first stop or warning signal that arrives within the block.

    - Later warnings do nothing.
    - The first stop signal after a warning does nothing either: a scheduler first warns, then stops the job.
    - A second stop signal ends the process immediately. The SIGTERM that the kernel sends when the parent dies
      (`die_with_parent`) does not count as the second one: cancelling a job signals DVC and the stage, and DVC's death sends
      one more.
    - SIGHUP and Ctrl-C stay ignored if they were ignored when this process started (`nohup`, background jobs of a shell).
    """
    parent = os.getppid()
    seen: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        asked_to_stop = any(earlier in STOP_SIGNALS for earlier in seen)
        seen.append(number)
        if len(seen) == 1:
            act(number)
        elif asked_to_stop and number in STOP_SIGNALS and (number != signal.SIGTERM or os.getppid() == parent):
            die_by_signal(number)

    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *WARNING_SIGNALS)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN or number not in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_by_signal(number: int) -> None:
    """Die of a signal immediately, without a traceback or cleanup, as if killed."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def die_on_signals() -> None:
    """Make stop and warning signals end this process immediately, without the traceback that Python would print.

    This is for the seconds in which a process imports, before it calls `on_first_signal`. SIGHUP and Ctrl-C stay ignored
    if they are ignored now.
    """
    for number in (*STOP_SIGNALS, *WARNING_SIGNALS):
        if signal.getsignal(number) != signal.SIG_IGN or number not in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block stop and warning signals for this thread until the block ends. Processes started in the block never get one.

    A signal to the whole process can still arrive through another thread.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, *WARNING_SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Unstoppable(io.FileIO):
    """A file that drops, without an error, what is written after its terminal or pipe was closed."""

    def write(self, data: Any) -> int:
        """See `io.RawIOBase`."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """Let this process continue after its terminal or pipe is closed, so that it can still save its last checkpoint."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Only the process's own stream, not a replacement (pytest's, for example).
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            file = io.BufferedWriter(_Unstoppable(stream.fileno(), "w", closefd=False))
            line_buffering = stream.line_buffering or name == "stderr"
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=line_buffering))


def clear_rank_variables() -> None:
    """Remove the rank variables of a surrounding job (Kubernetes, Slurm's scripts, another torchrun) from the environment.

    They do not describe our ranks: training would wait for ranks that are never started, and lm-eval would leave its result
    to "rank 0". `PET_LOCAL_ADDR` stays, because users set it for us (docs/how-to/several-machines.md).
    """
    for name in list(os.environ):
        if name in _RANK_VARIABLES or (name.startswith(("PET_", "TORCHELASTIC_")) and name != "PET_LOCAL_ADDR"):
            del os.environ[name]


_RANK_VARIABLES = {
    *(f"{whose}{what}" for whose in ("", "LOCAL_", "GROUP_", "ROLE_", "NODE_") for what in ("RANK", "WORLD_SIZE")),
    "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
