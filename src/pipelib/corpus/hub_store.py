"""Verified files of the Hugging Face hub, kept for every run that needs them.

A repository's files at a commit are kept in `STATE/hub/OWNER--NAME/REVISION/PATH` (a model's in `models--OWNER--NAME`),
whatever the stage's parameters and code, and outs are hard links to them. The lists of files are there too (`hub_lists.py`).
So a list and a file are asked for once, and each later use checks the SHA-256 of what it needs and makes no request.

A file comes as `PATH.part`, which a run that was killed leaves and the next one continues; it gets its name when its
SHA-256 is right. A file in the hub's own cache (`HF_HOME`, `HF_HUB_CACHE`) is verified and linked instead of fetched.

`PIPELIB_DOWNLOADS` sets how many files come at once (default 4). With `HF_HUB_DISABLE_XET=0` the client's own download,
Xet if the repository has it, takes the place of the loop here: a kill then loses the files on their way.
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
    sha256_file,
    sync_folder,
)
from pipelib.processes import available_cores, positive_int_from_env
from pipelib.progress import Progress
from pipelib.workspace.locks import LOCK, locked

_PART = ".part"
_TAIL_BYTES = 64 << 10
"""What is asked for of the end of a parquet file, in the hope that its metadata is no longer."""


@contextmanager
def open_store(repo: HubRepo, retry: Retry) -> Iterator["HubStore"]:
    """The files of a repository at a commit.

    The store is locked while the `with` block lasts, so that no other run writes to it and nobody deletes it; another run
    that needs it waits.
    """
    folder = store_folder(repo)
    with locked(folder / LOCK, wait=True):
        _remove_stale_partials(folder)
        yield HubStore(repo, retry)


@contextmanager
def fetch_pinned(pin: HubPin, retry: Retry = DEFAULT_RETRY) -> Iterator[Path]:
    """A file that this code names, verified, while it is read."""
    file = pinned_file(pin, retry)
    with open_store(pin.repo, retry) as store:
        (path,) = store.fetch([file])
        yield path


def _remove_stale_partials(folder: Path) -> None:
    """Remove what nothing will continue: the client's partial files, and those of files that are here or in no list."""
    for partial in folder.rglob("*.incomplete"):
        partial.unlink()
    listed = listed_paths(folder)
    for partial in folder.rglob(f"*{_PART}"):
        whole = partial.with_name(partial.name.removesuffix(_PART))
        continues = whole.relative_to(folder).as_posix() in listed and not whole.exists()
        if not continues and partial.relative_to(folder).as_posix() not in listed:
            partial.unlink()


class HubStore:
    """The verified files of one repository at a commit; `open_store` makes it."""

    def __init__(self, repo: HubRepo, retry: Retry) -> None:
        self._repo, self._retry, self._folder = repo, retry, store_folder(repo)

    def fetch(self, files: Sequence[HubFile]) -> list[Path]:
        """Where verified files are; those that are there and right are not fetched.

        Raises:
            UserError: a file cannot be had, for a reason that the message gives; what came stays for the next run.
        """
        wrong = self._wrong(files)
        for file in wrong:  # a file that is there was not the right one
            self._place(file).unlink(missing_ok=True)
        missing = [file for file in wrong if not self._link_cached(file)]
        if missing:
            self._download_all(missing)
        return [self._place(file) for file in files]

    def footer(self, file: HubFile) -> bytes | None:
        """The end of a parquet file, from its metadata on; None where only the whole file would show it.

        Of a file that is not here, it takes one request, or two where the metadata has more than 64 KiB.
        """
        place = self._place(file)
        here = place.is_file() or self._link_cached(file)
        if not here and client().is_offline_mode():
            return None
        tail = self._read_tail if here else self._ask_tail
        found = tail(file, min(file.bytes, _TAIL_BYTES))
        if found is None or found[-4:] != b"PAR1":
            return None
        size = int.from_bytes(found[-8:-4], "little") + 8  # the metadata, its length in 4 bytes, PAR1
        if size > file.bytes:
            return None
        return found[-size:] if size <= len(found) else tail(file, size)

    def _read_tail(self, file: HubFile, count: int) -> bytes | None:
        with self._place(file).open("rb") as opened:
            opened.seek(-min(count, os.fstat(opened.fileno()).st_size), os.SEEK_END)
            return opened.read()

    def _ask_tail(self, file: HubFile, count: int) -> bytes | None:
        if not count:
            return None
        url = self._repo.file_url(file.path)
        what = f"the end of {file.path} of {self._repo.name}"
        return with_retries(lambda: read_tail(url, file.bytes, count), what, self._repo, self._retry)

    def _place(self, file: HubFile) -> Path:
        return self._folder / file.path

    def _part(self, file: HubFile) -> Path:
        return self._folder / (file.path + _PART)

    def _wrong(self, files: Sequence[HubFile]) -> list[HubFile]:
        """The files that are not here, or are not what the hub announced; hashed in parallel."""
        here = [file for file in files if self._place(file).is_file()]
        if not here:
            return list(files)
        progress = Progress("hub: verifying stored files", sum(file.bytes for file in here), "bytes")

        def is_right(file: HubFile) -> bool:
            right = _is_file(self._place(file), file)
            progress.add(file.bytes)
            return right

        with ThreadPoolExecutor(available_cores(), thread_name_prefix="verify") as pool:
            right = {file for file, is_so in zip(here, pool.map(is_right, here), strict=True) if is_so}
        progress.close()
        return [file for file in files if file not in right]

    def _link_cached(self, file: HubFile) -> bool:
        """Take a file from the hub's own cache, if it is there and right."""
        cached = client().try_to_load_from_cache(
            self._repo.name, file.path, revision=self._repo.revision, repo_type=self._repo.kind
        )
        if not isinstance(cached, str) or not _is_file(Path(cached), file):
            return False
        link_or_copy(Path(cached).resolve(), self._place(file))
        return True

    def _download_all(self, files: Sequence[HubFile]) -> None:
        """Download files in parallel; the first that fails for good stops the others."""
        total, before = sum(file.bytes for file in files), sum(map(self._part_bytes, files))
        workers = positive_int_from_env("PIPELIB_DOWNLOADS") or 4
        require_free_space(self._folder, total - before, "the download")
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
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        progress.close(f"{format_bytes(total)}, {progress.note}")

    def _part_bytes(self, file: HubFile) -> int:
        """What an earlier run left of a file; more than the file has is not of it."""
        part = self._part(file)
        if not part.is_file():
            return 0
        if part.stat().st_size > file.bytes:
            part.unlink()
            return 0
        return part.stat().st_size

    def _download(self, file: HubFile, progress: Progress, stop: threading.Event) -> None:
        """Download one file and verify it."""
        self._place(file).parent.mkdir(parents=True, exist_ok=True)
        meter = Meter(progress, stop, self._part_bytes(file))
        attempt = self._attempt if client().constants.HF_HUB_DISABLE_XET else self._attempt_by_client
        what = f"{file.path} of {self._repo.name}"
        try:
            with_retries(lambda: attempt(file, meter), what, self._repo, self._retry, stop, lambda: meter.highest)
        except UserError as error:
            raise UserError(f"{error}{origin_hint(self._repo, file)}") from None

    def _attempt(self, file: HubFile, meter: Meter) -> None:
        """Continue the partial file, and name it when it is right; what is wrong with it starts it again."""
        part = self._part(file)
        try:
            try:
                resume_file(self._repo.file_url(file.path), part, file.bytes, meter)
            except Exception as error:
                if status_of(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise WrongBytesError("its size is not the one that the hub announced") from None
                raise
            if not _is_file(part, file):
                raise WrongBytesError("its bytes are not those that the hub announced (SHA-256)")
        except WrongBytesError:
            part.unlink(missing_ok=True)
            meter.restart()
            raise
        part.replace(self._place(file))
        sync_folder(part.parent)

    def _attempt_by_client(self, file: HubFile, meter: Meter) -> None:
        """The client's own download, which chooses Xet where it can."""
        self._part(file).unlink(missing_ok=True)
        meter.restart()
        try:
            client().hf_hub_download(
                self._repo.name,
                file.path,
                repo_type=self._repo.kind,
                revision=self._repo.revision,
                local_dir=self._folder,
                tqdm_class=meter,
            )
        except RuntimeError as error:  # what hf_xet raises when a transfer fails
            raise ConnectionError(str(error)) from None
        if not _is_file(self._place(file), file):
            self._place(file).unlink()
            raise WrongBytesError("its bytes are not those that the hub announced (SHA-256)")


def _is_file(path: Path, file: HubFile) -> bool:
    """Whether a path holds the file that the hub announced."""
    return path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256
