"""Files that are complete or absent: atomic writes, hashes, links, JSON.

Never write into an existing file: write a new file beside it, sync it, and rename it over the old one. The pipeline's
outs are hard links into DVC's cache and into the state folder, so a write in place would change all three.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipelib.errors import UserError, how_to_repair
from pipelib.processes import available_cores

_BLOCK = 1 << 20


@contextmanager
def write_atomic(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path`, complete and synced, when the block ends without an error.

    A process killed at any moment leaves the old file or the new one, and at most a `.NAME.RANDOM.tmp` beside it.
    Several processes may write the same file at once, even on different machines: the last one wins.

    Args:
        durable: False skips the sync. After a power cut `path` may then hold anything, so use it only for files whose
            readers verify them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)  # only now, when the bytes are on the disk
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Sync a folder, so that the names in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with write_atomic(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: indented, keys in the given order, one newline at the end. See `format_json`."""
    write_text(path, format_json(value))


def format_json(value: object) -> str:
    """Format a value as JSON, in the layout of all our files."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        remedy: what to do about a damaged file, for the message; by default, how to repair an out of the pipeline.

    Raises:
        UserError: the file is missing, cannot be read, is not JSON, or holds something other than an object.
    """
    remedy = remedy or how_to_repair()
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that makes it (dvc repro).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it a readable file.") from None
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read (it is nested too deeply); {remedy}.") from None
    except ValueError as error:  # also raised for numbers with more digits than Python accepts
        raise UserError(f"{path} is not JSON ({error}), so it cannot be trusted; {remedy}.") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds {str(value)[:20]!r} and not a JSON object with keys, so it cannot be trusted; {remedy}."
        )
    return value


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of several files, in their order. One thread per core hashes them."""
    with ThreadPoolExecutor(available_cores(), thread_name_prefix="hash") as threads:  # hashing releases the GIL
        return list(threads.map(sha256_file, paths))


def sha256_json(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`, which must not exist. Copy it if the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        # Another file system, no support for links, or too many links to one file: copy. Any other error is real.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        with source.open("rb") as reader, write_atomic(target) as writer:
            shutil.copyfileobj(reader, writer, _BLOCK)


def files_under(folder: Path) -> list[Path]:
    """Return every file under a folder, sorted by path; links to files included, temporary files (`.tmp`) left out."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))


def replace_folder(source: Path, target: Path) -> None:
    """Make the folder `target` hold exactly the files of `source`, as hard links where possible.

    The new folder is completed under a hidden name first. So a kill leaves the old folder, no folder, or the new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    remove(fresh)
    fresh.mkdir()
    for path in files_under(source):
        link_or_copy(path, fresh / path.relative_to(source))
    remove(target)  # a folder cannot be renamed over another one that has files
    fresh.rename(target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, if they do not exist.

    Raises:
        UserError: it cannot be created, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # `user_message` explains a full disk
            raise
        raise UserError(
            f"{folder} cannot be created ({error.strerror}), so nothing can be written there; name another folder "
            "(for the state of the stages, set PIPELIB_STATE_DIR)."
        ) from None


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start work whose result would not fit on the disk.

    Args:
        needed: bytes that will be written.
        what: the work, for the message.

    Raises:
        UserError: fewer than `needed` bytes are free on the disk of `folder`.
    """
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} needs {format_bytes(needed)} and {folder} has {format_bytes(free)} free, so it would fail half-way; "
            "free some space (`pipelib clean` lists old state, `dvc gc -w` removes old cache) or name a folder on "
            "a larger disk (for the state of the stages, set PIPELIB_STATE_DIR)."
        )


def nearest_folder(path: Path) -> Path:
    """Return the folder, or its nearest parent that exists: both are on the same disk."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8.

    Lone surrogates cannot. Python uses them for the bytes of a file name that is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def plural(count: float, noun: str) -> str:
    """Format a count with its noun: `1 row`, `1,024 rows`."""
    return f"{round(count, 2):,g} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """Format a number of bytes: `28.5 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
