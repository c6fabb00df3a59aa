"""FineWeb-Edu, or another dataset of parquet files, from the Hugging Face hub.

The list of files, with sizes and SHA-256, comes from the repository's tree at a pinned commit. Each file is downloaded
by `huggingface_hub`, verified, and only then counted. The client itself retries some failures, trusts the bytes it gets,
and leaves partial files behind when it is killed; the loop here retries whatever is worth retrying, and ends at once with
a remedy where it is not.

Files are kept in `STATE/hub/OWNER--NAME/REVISION/PATH`, whatever the stage's other parameters and code, and outs are hard
links to them. So a verified file is fetched once: each use checks its SHA-256 and asks the hub for nothing but the list.
`pipelib clean` lists the store and deletes it.

A process killed in the middle of a file starts that file again: the client names its partial files at random, so they
cannot be continued. At most one file per worker is lost.

`PIPELIB_DOWNLOADS` sets how many files come at once (default 4). `HF_ENDPOINT`, `HF_TOKEN` and a filled cache of the
hub work as the client's documentation says. Xet, the hub's newer transfer, is off unless `HF_HUB_DISABLE_XET=0`.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar

from pipelib.corpus.raw import Written, describe_file
from pipelib.errors import UserError
from pipelib.files import format_bytes, link_or_copy, require_free_space, sha256_file
from pipelib.progress import Progress
from pipelib.state import lock_folder, state_root

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset repository, pinned by its content."""

    repo: str
    revision: str
    path: str
    """Inside the repository."""
    bytes: int
    sha256: str


HELLASWAG = HubFile(
    repo="Rowan/hellaswag",
    revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
    path="data/validation-00000-of-00001.parquet",
    bytes=6_315_951,
    sha256="899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd",
)
"""HellaSwag's validation set, 10,042 items."""


@dataclass(frozen=True)
class Retry:
    """How often to try, and how long to wait in between."""

    attempts: int = 8
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled for each further one, and varied by up to a half."""
    longest_wait: float = 60.0
    """Seconds; also the most that a server's Retry-After is heeded."""

    def seconds(self, attempt: int, wish: float | None) -> float:
        """How long to wait after a failed attempt, the first being 1; `wish` is the server's, if it has one."""
        if wish is not None:
            return min(wish, self.longest_wait)
        return float(min(self.first_wait * 2 ** (attempt - 1), self.longest_wait) * random.uniform(0.5, 1.5))


@dataclass(frozen=True)
class HubSource:
    """The parquet files of one folder of a dataset repository, at a pinned commit, in the order of their names."""

    repo: str
    revision: str
    folder: str
    retry: Retry = Retry()

    def identity(self) -> dict[str, Any]:
        """The repository, the commit and the folder: what the commit holds never changes."""
        return {"kind": "hub", "repo": self.repo, "revision": self.revision, "folder": self.folder}

    def write(self, folder: Path, work: Path) -> Written:  # noqa: ARG002  (the store outlives it)
        """Link every file, downloaded or stored and in either case verified, into `folder`, unchanged.

        Raises:
            UserError: the hub refuses, has no such revision or folder, stays unreachable, or the disk is too small.
        """
        files = list_hub_files(self.repo, self.revision, self.folder, self.retry)
        described = []
        with hub_files(files, self.retry) as paths:
            for file, path in zip(files, paths, strict=True):
                link_or_copy(path, folder / path.name)
                described.append(describe_file(folder / path.name, file.sha256))
        return Written(tuple(described), {})


def list_hub_files(repo: str, revision: str, folder: str, retry: Retry = Retry()) -> list[HubFile]:
    """The parquet files that lie in a folder of a dataset repository, by name.

    Raises:
        UserError: no such repository, revision or folder; no parquet file; or one that the hub has no SHA-256 of.
    """
    api = _client().HfApi()
    where = f"{folder or 'the top folder'} of {repo} at {revision}"
    entries = _persistently(
        lambda: list(api.list_repo_tree(repo, folder or None, revision=revision, repo_type="dataset")),
        f"the list of files in {where}",
        retry,
    )
    found = sorted((entry for entry in entries if entry.path.endswith(".parquet")), key=lambda entry: entry.path)
    if not found:
        raise UserError(f"download.folder: {where} holds no parquet file, so there is no text; name another folder.")
    for entry in found:
        if entry.lfs is None:
            raise UserError(
                f"{entry.path} in {where} has no SHA-256 on the hub, so it cannot be verified; use another repository."
            )
    return [HubFile(repo, revision, entry.path, entry.lfs.size, entry.lfs.sha256) for entry in found]


@contextmanager
def hub_files(files: Sequence[HubFile], retry: Retry = Retry()) -> Iterator[list[Path]]:
    """Verified files of one revision of a repository, in the store; those that are there and right are not fetched.

    The revision's store is locked while the `with` block lasts, so that no other run writes to it and nobody deletes it;
    another run that needs it waits.

    Raises:
        UserError: a file cannot be had, for a reason that the message gives; verified files stay for the next run.
    """
    (store,) = {_store(file) for file in files}
    lock = lock_folder(store, wait=True)
    try:
        for partial in store.rglob("*.incomplete"):
            partial.unlink()
        missing = [file for file in files if not _is_verified(file)]
        require_free_space(store, sum(file.bytes for file in missing), "the download")
        if missing:
            _fetch_all(missing, retry)
        yield [_place(file) for file in files]
    finally:
        os.close(lock)


def _store(file: HubFile) -> Path:
    """The folder of a repository's files at a revision."""
    return state_root() / "hub" / file.repo.replace("/", "--") / file.revision


def _place(file: HubFile) -> Path:
    """Where the client puts a file."""
    return _store(file) / file.path


def _is_verified(file: HubFile) -> bool:
    path = _place(file)
    return path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256


def _fetch_all(files: Sequence[HubFile], retry: Retry) -> None:
    """Download files in parallel; the first that fails for good stops the others."""
    total = sum(file.bytes for file in files)
    progress = Progress(f"hub: downloading {len(files)} files, {format_bytes(total)}", total, "bytes")
    stop = threading.Event()
    with ThreadPoolExecutor(download_count(), thread_name_prefix="download") as pool:
        try:
            tasks = [pool.submit(_fetch, file, retry, progress, stop) for file in files]
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    for task in done:
        task.result()
    progress.close()


def download_count() -> int:
    """Files downloaded at once: `$PIPELIB_DOWNLOADS`, else 4.

    Raises:
        UserError: the variable is not a positive whole number.
    """
    wish = os.environ.get("PIPELIB_DOWNLOADS", "4")
    if not (wish.isdecimal() and int(wish)):
        raise UserError(f"PIPELIB_DOWNLOADS={wish} is not a number of downloads; give 1 or more, or unset it for 4.")
    return int(wish)


def _fetch(file: HubFile, retry: Retry, progress: Progress, stop: threading.Event) -> None:
    """Download one file and verify it."""

    def attempt() -> None:
        meter = _Meter(progress, stop)
        # a file that is there was not the right one, and the client would take it for done
        _place(file).unlink(missing_ok=True)
        try:
            _client().hf_hub_download(
                file.repo,
                file.path,
                repo_type="dataset",
                revision=file.revision,
                local_dir=_store(file),
                tqdm_class=meter,
            )
            if not _is_verified(file):
                _place(file).unlink()
                raise _WrongBytesError("its bytes are not those that the hub announced (SHA-256)")
        except BaseException:
            meter.take_back()
            raise

    _persistently(attempt, f"{file.path} of {file.repo}", retry, stop)


class _WrongBytesError(Exception):
    """What came is not what was announced."""


class _StoppedError(Exception):
    """Another file has failed for good, or the user stopped the run."""


class _Meter:
    """What the client takes for a progress bar: counts the bytes of one attempt into our progress, and can stop it."""

    def __init__(self, progress: Progress, stop: threading.Event) -> None:
        self._progress, self._stop, self._counted = progress, stop, 0

    def __call__(self, **_: Any) -> Self:
        """Stand in for the class of a bar, which the client calls."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Count bytes that came; the client calls it for every block."""
        if self._stop.is_set():
            raise _StoppedError
        self._counted += count
        self._progress.add(count)

    def take_back(self) -> None:
        """Forget what a failed attempt counted."""
        self._progress.add(-self._counted)


def _persistently(call: Callable[[], T], what: str, retry: Retry, stop: threading.Event | None = None) -> T:
    """The result of `call`, tried again after failures that may pass.

    Raises:
        UserError: a failure that will not pass, or too many of those that might.
    """
    stop = stop or threading.Event()
    for attempt in range(1, retry.attempts + 1):
        try:
            return call()
        except _StoppedError:
            raise
        except Exception as error:
            cause = _cause(error)
            reason = _reason(cause)
            _end_if_final(cause, what, reason)
            if attempt == retry.attempts:
                raise UserError(
                    f"{what} could not be downloaded in {attempt} attempts ({reason}), so the corpus is incomplete; "
                    "look at the connection and run dvc repro again: verified files are kept."
                ) from None
            seconds = retry.seconds(attempt, _retry_after(cause))
            print(f"{what}: {reason}; attempt {attempt + 1} of {retry.attempts} in {seconds:.0f} s", flush=True)
            if stop.wait(seconds):
                raise _StoppedError from None
    raise AssertionError("retry.attempts is at least 1")


def _cause(error: Exception) -> BaseException:
    """The failure itself, where the client wraps it in advice."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    """A failure in few words: no URL and no header, since those can carry secrets."""
    status = _status(error)
    if status is not None:
        known = status in set(HTTPStatus)
        return f"HTTP {status} {HTTPStatus(status).phrase}" if known else f"HTTP {status}"
    if isinstance(error, _WrongBytesError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def _retry_after(error: BaseException) -> float | None:
    """The seconds after which the server wants to be asked again."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = str(headers.get("Retry-After", ""))
    return float(seconds) if seconds.isdecimal() else None


def _end_if_final(error: BaseException, what: str, reason: str) -> None:
    """Raise what another attempt would not change."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError

    status = _status(error)
    remedy = None
    if isinstance(error, OfflineModeIsEnabled):
        remedy = "HF_HUB_OFFLINE is set; unset it, or set download.source to docs or local"
    elif isinstance(error, GatedRepoError) or status in (401, 403):
        remedy = "set HF_TOKEN to a token that may read it (and accept the dataset's terms on its page)"
    elif isinstance(error, RevisionNotFoundError):
        remedy = (
            "download.revision does not exist in this repository; the dataset's page lists the commits under 'History'"
        )
    elif isinstance(error, EntryNotFoundError):
        remedy = "it does not exist at this revision; look at download.folder"
    elif status == 404:
        remedy = "the hub does not know this repository or revision; look at download.repo and download.revision"
    elif status is not None and status < 500 and status not in (408, 429):
        remedy = "asking again would not help"
    elif not _may_pass(error):
        raise error
    if remedy:
        raise UserError(f"{what} cannot be downloaded ({reason}): {remedy}.") from None


def _may_pass(error: BaseException) -> bool:
    """Whether a failure that is no answer of the hub may pass: the connection, or bytes that came wrong."""
    import httpx2

    if isinstance(error, OSError) and error.errno is not None:
        return isinstance(error, ConnectionError | TimeoutError)  # not a full disk, not a missing permission
    return isinstance(error, httpx2.HTTPError | OSError | _WrongBytesError)


def _client() -> Any:
    """`huggingface_hub`, imported late, since it reads its settings from the environment then."""
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub

    return huggingface_hub
