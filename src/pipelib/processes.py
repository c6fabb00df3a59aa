"""Processes: how many to use, and that none outlives the one that started it."""

import os
import signal
import sys
import time

from pipelib.errors import UserError


def worker_count(most: int) -> int:
    """Processes to use: `$PIPELIB_WORKERS`, else one for every core, but no more than there is work for."""
    wish = os.environ.get("PIPELIB_WORKERS", "")
    if wish and not (wish.isdecimal() and int(wish)):
        raise UserError(
            f"PIPELIB_WORKERS={wish} is not a number of processes; give 1 or more, or unset it for one a core."
        )
    return max(1, min(most, int(wish) if wish else available_cores()))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def tie_to_parent(death_signal: signal.Signals = signal.SIGTERM) -> None:
    """Have `death_signal` end this process when the process that started it dies.

    So a killed DVC leaves no stage running, and a killed stage no workers. On Linux the kernel does it at once
    (prctl, PR_SET_PDEATHSIG); elsewhere a thread looks once a second.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(death_signal))
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), death_signal)
    else:
        import threading

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os.kill(os.getpid(), death_signal)

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
