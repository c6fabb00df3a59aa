"""Locks with `flock`: the system releases a lock when the process that holds it ends, even by SIGKILL.

A lock file holds the number of the process that took the lock last, for people to read. Its content does not say whether
the lock is held; only the system can tell.
"""

import errno
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
"""The name of a folder's lock. Further locks of the same folder are named `lock-...`."""


class InUseError(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, wait: bool = False, quiet: bool = False, own: bool = True) -> Iterator[None]:
    """Hold an exclusive lock while the block lasts.

    The lock file and its folder are created if they are missing, or if `pipelib clean` deletes them at this moment.

    Args:
        path: the lock file.
        wait: wait for a process that holds the lock, instead of raising an error.
        quiet: print nothing while waiting.
        own: whether the file exists only for locking. False: it has other content, so it must exist and is not written.

    Raises:
        InUseError: another process holds the lock; the message names the process.
    """
    descriptor = _acquire(path, wait, quiet, own)
    try:
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> str:
    """Return the number of the process that took a lock last, for messages; `unknown` if the file does not say."""
    try:
        return re.sub(r"[^0-9]", "", path.read_text(encoding="ascii", errors="replace")[:32]) or "unknown"
    except OSError:
        return "unknown"


def is_held(path: Path) -> bool:
    """Return whether any process, including this one, holds a lock.

    The check changes nothing, and a process that takes the lock at the same moment does not fail.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try(descriptor, path, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Return whether any process holds one of a folder's locks."""
    return any(map(is_held, folder.glob(f"{LOCK}*")))


def _acquire(path: Path, wait: bool, quiet: bool, own: bool) -> int:
    """Lock a file and return its descriptor."""
    while True:
        if own:
            make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT if own else os.O_RDONLY, 0o644)
        except FileNotFoundError:
            if not own:
                raise
            continue  # the folder was deleted after make_folder
        try:
            _take(descriptor, path, wait, quiet)
            # While we waited, `pipelib clean` may have deleted the file, and another process may have made a new one.
            if _is_same_file(path, descriptor):
                if own:
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was deleted meanwhile, so this lock would exclude no other process: try again


def _take(descriptor: int, path: Path, wait: bool, quiet: bool) -> None:
    """Take the exclusive lock. Retry while `is_held` of another process briefly holds a shared lock."""
    while not _try(descriptor, path, fcntl.LOCK_EX):
        if _try(descriptor, path, fcntl.LOCK_SH):  # then only shared locks are held, which `is_held` releases at once
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            time.sleep(0.01)
        elif not wait:
            raise InUseError(
                f"{path.parent} is in use by process {holder(path)}, and a second run on the same state would damage both; "
                f"wait for it, or stop it: kill {holder(path)}"
            )
        else:
            if not quiet:
                tell(f"{path.parent} is in use by process {holder(path)}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return


def _try(descriptor: int, path: Path, kind: int) -> bool:
    """Try to take a lock without waiting. Return whether it was taken.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        raise UserError(
            f"{path.parent} is on a file system without locks ({error.strerror}), so two runs could damage each other's work; "
            "set PIPELIB_STATE_DIR to a folder of one that has flock: a local disk, NFS 4, or Lustre mounted with -o flock."
        ) from None
    return True


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
