"""Files that are whole or not there: atomic writes, hashes, links, JSON.

Nothing here, and nothing that uses it, writes into a file that already exists: a new file is written beside it, synced
and renamed over it. Outs of the pipeline are hard links into DVC's cache and into the state folder, so a write in
place would change all three.
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
    """A binary file that appears under `path`, synced and whole, when the block ends without an error.

    A process killed at any instant leaves either the old file or the new one, and at most a `.NAME.RANDOM.tmp` beside it.
    Processes that write the same file at once, on machines that share it too, do not meet; the last one's stays.

    Args:
        durable: False leaves it to the system when the bytes reach the disk: for files whose readers check them, since
            a power cut may leave anything under `path` then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
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
    """JSON as all our files have it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: what to do about a damaged file, for the message; that of the pipeline's own outs by default.

    Raises:
        UserError: the file is missing, cannot be read, is not JSON, or holds something other than an object.
    """
    remedy = remedy or how_to_repair()
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the stage that makes it (dvc repro).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it a file that you may read.") from None
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read (it is nested too deeply); {remedy}.") from None
    except ValueError as error:  # also numbers of more digits than Python reads
        raise UserError(f"{path} is not JSON ({error}), so it cannot be trusted; {remedy}.") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds {str(value)[:20]!r} and not a JSON object with keys, so it cannot be trusted; {remedy}."
        )
    return value


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Sequence[Path]) -> list[str]:
    """The SHA-256 of several files, in their order, as many at once as there are cores."""
    with ThreadPoolExecutor(available_cores(), thread_name_prefix="hash") as threads:  # hashing leaves the interpreter
        return list(threads.map(sha256_file, paths))


def sha256_json(value: object) -> str:
    """The SHA-256 of a value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source` a second name `target`, which must not exist; copy where the file system cannot link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        with source.open("rb") as reader, write_atomic(target) as writer:
            shutil.copyfileobj(reader, writer, _BLOCK)


def files_under(folder: Path) -> list[Path]:
    """Every file under a folder, sorted by its path; links to files count, hidden temporary files do not."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))


def replace_folder(source: Path, target: Path) -> None:
    """Make the folder `target` hold exactly the files of `source`, as hard links where possible.

    The new folder is completed under a hidden name first, so a kill leaves the old one, none, or the new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    remove(fresh)
    fresh.mkdir()
    for path in files_under(source):
        link_or_copy(path, fresh / path.relative_to(source))
    remove(target)
    fresh.rename(target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless they are there.

    Raises:
        UserError: it cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder} cannot be made ({error.strerror}), so nothing can be written there; name a folder that can be "
            "(PIPELIB_STATE_DIR, for the state of the stages)."
        ) from None


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """Refuse before the work starts when the disk cannot hold its result.

    Args:
        needed: bytes that will be written.
        what: what needs them, for the message.

    Raises:
        UserError: less than `needed` bytes are free where `folder` lies.
    """
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} needs {format_bytes(needed)} and {folder} has {format_bytes(free)} free, so it would fail half-way; "
            "free some space (`pipelib clean` lists old state, `dvc gc -w` old cache) or set PIPELIB_STATE_DIR."
        )


def nearest_folder(path: Path) -> Path:
    """The folder, or the nearest one above it that is there: both lie on the same disk."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; half a surrogate pair cannot, and stands for a byte of a name that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def plural(count: float, noun: str) -> str:
    """A number of things for people: `1 row`, `1,024 rows`."""
    return f"{round(count, 2):,g} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """A number of bytes for people: 28.5 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
