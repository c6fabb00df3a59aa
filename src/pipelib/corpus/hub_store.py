"""A store of verified files of the Hugging Face hub, shared by all runs.

A repository's files at a commit are stored in `STATE/hub/OWNER--NAME/REVISION/PATH` (a model's in `models--OWNER--NAME`).
The path does not depend on the stage's parameters and code, and outs are hard links to these files. The lists of files are
there too (`hub_lists.py`). So each list and file is requested once. Later uses verify the SHA-256 of the files that they
need, and make no request.

A file is downloaded as `PATH.part`. A killed run leaves it, and the next run resumes it. It is renamed to `PATH` when its
SHA-256 is right. A file in the hub's own cache (`HF_HOME`, `HF_HUB_CACHE`) is verified and linked instead of downloaded.

`PIPELIB_DOWNLOADS` sets how many files are downloaded at once (default 4). With `HF_HUB_DISABLE_XET=0` the client's own
download is used instead of the loop here, with Xet if the repository has it. A kill then loses unfinished files.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from pipelib.corpus.hub_client import client
from pipelib.corpus.hub_lists import HubFile, HubPin, listed_paths, origin_hint, pinned_file, store_folder
from pipelib.corpus.hub_transfer import (
    DEFAULT_RETRY,
    HubRepo,
    Meter,
    Retry,
    WrongBytesError,
    read_tail,
    resume_file,
    status_of,
    with_retries,
)
from pipelib.errors import UserError
from pipelib.files import (
    format_bytes,
    link_or_copy,
    require_free_space,
    sync_folder,
)
from pipelib.processes import available_cores, positive_int_from_env
from pipelib.progress import Progress
from pipelib.workspace.locks import LOCK, locked

_PART = ".part"
_TAIL_BYTES = 64 << 10
"""Bytes requested from the end of a parquet file. The metadata is usually shorter, so one request is enough."""


@contextmanager
def open_store(repo: HubRepo, retry: Retry) -> Iterator["HubStore"]:
    """Open the store of a repository at a commit, and lock it until the block ends.

    Another run that needs the store waits, and `pipelib clean` does not delete it.
    """
    folder = store_folder(repo)
    with locked(folder / LOCK, wait=True):
        _remove_stale_partials(folder)
        yield HubStore(repo, retry)


@contextmanager
def fetch_pinned(pin: HubPin, retry: Retry = DEFAULT_RETRY) -> Iterator[Path]:
    """Give the path of a pinned file, downloaded and verified, and lock its store until the block ends."""
    file = pinned_file(pin, retry)
    with open_store(pin.repo, retry) as store:
        (path,) = store.fetch([file])
        yield path


def _remove_stale_partials(folder: Path) -> None:
    """Remove partial files that no download will resume.

    These are the client's own, and those of files that are complete or in no list.
    """
    for partial in folder.rglob("*.incomplete"):
        partial.unlink()
    listed = listed_paths(folder)
    for partial in folder.rglob(f"*{_PART}"):
        whole = partial.with_name(partial.name.removesuffix(_PART))
        resumable = whole.relative_to(folder).as_posix() in listed and not whole.exists()
        # A file of the repository may itself be called NAME.part.
        if not resumable and partial.relative_to(folder).as_posix() not in listed:
            partial.unlink()


class HubStore:
    """The verified files of one repository at a commit. Use `open_store` to get one."""

    def __init__(self, repo: HubRepo, retry: Retry) -> None:
        self._repo, self._retry, self.folder = repo, retry, store_folder(repo)

    def fetch(self, files: Sequence[HubFile]) -> list[Path]:
        """Return the paths of the files, verified. Only missing or wrong files are downloaded.

        Raises:
            UserError: a file cannot be downloaded; the message says why. Finished parts stay for the next run.
        """
        wrong = self._missing_or_wrong(files)
        for file in wrong:  # if the file exists, its content is wrong
            self._path(file).unlink(missing_ok=True)
        missing = [file for file in wrong if not self._link_cached(file)]
        if missing:
            self._download_all(missing)
        return [self._path(file) for file in files]

    def footer(self, file: HubFile) -> bytes | None:
        """Return the end of a parquet file, from the start of its metadata; None if that needs the whole file.

        A file that is not in the store takes one request, or two if the metadata has more than 64 KiB.
        """
        path = self._path(file)
        here = path.is_file() or self._link_cached(file)
        if not here and client().is_offline_mode():
            return None
        tail = self._read_tail if here else self._download_tail
        found = tail(file, min(file.bytes, _TAIL_BYTES))
        if found is None or found[-4:] != b"PAR1":
            return None
        size = int.from_bytes(found[-8:-4], "little") + 8  # the metadata, its length in 4 bytes, PAR1
        if size > file.bytes:
            return None
        return found[-size:] if size <= len(found) else tail(file, size)

    def _read_tail(self, file: HubFile, count: int) -> bytes | None:
        with self._path(file).open("rb") as opened:
            opened.seek(-min(count, os.fstat(opened.fileno()).st_size), os.SEEK_END)
            return opened.read()

    def _download_tail(self, file: HubFile, count: int) -> bytes | None:
        if not count:
            return None
        url = self._repo.file_url(file.path)
        what = f"the end of {file.path} of {self._repo.name}"
        return with_retries(lambda: read_tail(url, file.bytes, count), what, self._repo, self._retry)

    def _path(self, file: HubFile) -> Path:
        return self.folder / file.path

    def _part(self, file: HubFile) -> Path:
        return self.folder / (file.path + _PART)

    def _missing_or_wrong(self, files: Sequence[HubFile]) -> list[HubFile]:
        """Return the files that are missing, or differ from the hub's list. They are hashed in parallel."""
        here = [file for file in files if self._path(file).is_file()]
        if not here:
            return list(files)
        progress = Progress("hub: verifying stored files", sum(file.bytes for file in here), "bytes")

        def is_right(file: HubFile) -> bool:
            right = file.is_at(self._path(file))
            progress.add(file.bytes)
            return right

        with ThreadPoolExecutor(available_cores(), thread_name_prefix="verify") as pool:
            right = {file for file, is_so in zip(here, pool.map(is_right, here), strict=True) if is_so}
        progress.close()
        return [file for file in files if file not in right]

    def _link_cached(self, file: HubFile) -> bool:
        """Link a file from the hub's own cache, if it is there and right. Return whether it was."""
        cached = client().try_to_load_from_cache(
            self._repo.name, file.path, revision=self._repo.revision, repo_type=self._repo.kind
        )
        if not isinstance(cached, str) or not file.is_at(Path(cached)):
            return False
        link_or_copy(Path(cached).resolve(), self._path(file))
        return True

    def _download_all(self, files: Sequence[HubFile]) -> None:
        """Download files in parallel. The first permanent failure stops the others."""
        total, before = sum(file.bytes for file in files), sum(map(self._part_bytes, files))
        workers = positive_int_from_env("PIPELIB_DOWNLOADS") or 4
        require_free_space(self.folder, total - before, "the download")
        progress = Progress(f"hub: {self._repo.name}", total, "bytes", before)
        progress.note = f"0 of {len(files)} files"
        stop = threading.Event()
        with ThreadPoolExecutor(workers, thread_name_prefix="download") as pool:
            try:
                tasks = [pool.submit(self._download, file, progress, stop) for file in files]
                for done, task in enumerate(as_completed(tasks), start=1):
                    task.result()
                    progress.note = f"{done} of {len(files)} files"
            finally:
                # After an error, the running downloads must stop too: `with` waits for them.
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        progress.close(f"{format_bytes(total)}, {progress.note}")

    def _part_bytes(self, file: HubFile) -> int:
        """Return how many bytes of a file an earlier run left. Delete a partial file that is too long."""
        part = self._part(file)
        if not part.is_file():
            return 0
        if part.stat().st_size > file.bytes:  # its bytes cannot be this file's
            part.unlink()
            return 0
        return part.stat().st_size

    def _download(self, file: HubFile, progress: Progress, stop: threading.Event) -> None:
        """Download one file and verify it."""
        self._path(file).parent.mkdir(parents=True, exist_ok=True)
        meter = Meter(progress, stop, self._part_bytes(file))
        attempt = self._attempt if client().constants.HF_HUB_DISABLE_XET else self._attempt_by_client
        what = f"{file.path} of {self._repo.name}"
        try:
            with_retries(lambda: attempt(file, meter), what, self._repo, self._retry, stop, lambda: meter.highest)
        except UserError as error:
            raise UserError(f"{error}{origin_hint(self._repo, file)}") from None

    def _attempt(self, file: HubFile, meter: Meter) -> None:
        """Resume the partial file, and rename it when it is right. If its bytes are wrong, delete it and fail."""
        part = self._part(file)
        try:
            try:
                resume_file(self._repo.file_url(file.path), part, file.bytes, meter)
            except Exception as error:
                # The server's file is shorter than the hub's list says.
                if status_of(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise WrongBytesError("its size differs from the hub's list") from None
                raise
            if not file.is_at(part):
                raise WrongBytesError("its hash differs from the hub's list")
        except WrongBytesError:
            part.unlink(missing_ok=True)
            meter.restart()
            raise
        part.replace(self._path(file))  # only now, when its bytes are verified
        sync_folder(part.parent)

    def _attempt_by_client(self, file: HubFile, meter: Meter) -> None:
        """Download with the client itself, which uses Xet if it can."""
        self._part(file).unlink(missing_ok=True)  # the client cannot resume our partial file
        meter.restart()
        try:
            client().hf_hub_download(
                self._repo.name,
                file.path,
                repo_type=self._repo.kind,
                revision=self._repo.revision,
                local_dir=self.folder,
                tqdm_class=meter,
            )
        except RuntimeError as error:  # what hf_xet raises when a transfer fails
            raise ConnectionError(str(error)) from None
        if not file.is_at(self._path(file)):
            self._path(file).unlink()
            raise WrongBytesError("its hash differs from the hub's list")
