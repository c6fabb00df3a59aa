"""One lock, `flock`: the system frees it when the process that holds it ends, however it ends.

A lock file has the number of the process that took it last, for people. Whether it is held only the system knows.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelib.errors import UserError, tell
from pipelib.files import make_folder

LOCK = "lock"
"""The name of a folder's lock; others of the same folder are called `lock-...`."""


class InUseError(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, wait: bool = False, quiet: bool = False, own: bool = True) -> Iterator[None]:
    """Hold an exclusive lock while the block lasts.

    The lock file and its folder are made if they are not there, and again if `pipelib clean` deletes them at this moment.

    Args:
        path: the lock file.
        wait: wait for a process that holds it, instead of refusing.
        quiet: say nothing while waiting.
        own: the file is there for locking alone. False for one with content, which must exist and is not written.

    Raises:
        InUseError: another process holds it; the message names the process.
    """
    descriptor = _acquire(path, wait, quiet, own)
    try:
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> str:
    """The number of the process that took a lock last, for people; `unknown` where the file does not say."""
    try:
        return re.sub(r"[^0-9]", "", path.read_text(encoding="ascii", errors="replace")[:32]) or "unknown"
    except OSError:
        return "unknown"


def is_held(path: Path) -> bool:
    """Whether some process, this one included, holds a lock. Looking leaves no trace, and makes nobody fail who takes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether some process holds one of a folder's locks."""
    return any(map(is_held, folder.glob(f"{LOCK}*")))


def _acquire(path: Path, wait: bool, quiet: bool, own: bool) -> int:
    """An open file that is locked."""
    while True:
        if own:
            make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT if own else os.O_RDONLY, 0o644)
        except FileNotFoundError:
            if not own:
                raise
            continue  # its folder was deleted in between
        try:
            _take(descriptor, path, wait, quiet)
            if _is_same_file(path, descriptor):
                if own:
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a lock on a file that has been deleted keeps nobody out


def _take(descriptor: int, path: Path, wait: bool, quiet: bool) -> None:
    """Take the exclusive lock. A process that only looks (`is_held`) has a shared one, for an instant: try again."""
    while not _try(descriptor, fcntl.LOCK_EX):
        if _try(descriptor, fcntl.LOCK_SH):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            time.sleep(0.01)
        elif not wait:
            raise InUseError(
                f"{path.parent} is in use by process {holder(path)}, and a second run on the same state would spoil both; "
                f"wait for it, or stop it: kill {holder(path)}"
            )
        else:
            if not quiet:
                tell(f"{path.parent} is in use by process {holder(path)}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return


def _try(descriptor: int, kind: int) -> bool:
    """Whether a lock could be had at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
