"""Processes: how many to use, the memory they hold, and that none outlives the one that started it."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

from pipelib.errors import UserError


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


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


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
