"""Verified files of the Hugging Face hub, kept for every run that needs them.

A repository's files at a commit are kept in `STATE/hub/OWNER--NAME/REVISION/PATH` (a model's in `models--OWNER--NAME`),
whatever the stage's parameters and code, and outs are hard links to them. The list of a folder's files, with their sizes
and SHA-256, is kept in `.lists` there: what a commit holds never changes. So a list and a file are asked for once, and each
later use checks the SHA-256 of what it needs and makes no request.

A file comes as `PATH.part`, which a run that was killed leaves and the next one continues; it gets its name when its
SHA-256 is right. A file in the hub's own cache (`HF_HOME`, `HF_HUB_CACHE`) is verified and linked instead of fetched.

`PIPELIB_DOWNLOADS` sets how many files come at once (default 4). With `HF_HUB_DISABLE_XET=0` the client's own download,
Xet if the repository has it, takes the place of the loop here: a kill then loses the files on their way.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

from pipelib.corpus.hub_transfer import (
    PATIENT,
    HubRepo,
    Meter,
    Retry,
    WrongBytesError,
    client,
    continue_file,
    get_list,
    persistently,
    status_of,
)
from pipelib.errors import UserError
from pipelib.files import (
    format_bytes,
    link_or_copy,
    read_json,
    require_free_space,
    sha256_file,
    sha256_files,
    sha256_json,
    sync_folder,
    write_json,
)
from pipelib.processes import available_cores, positive_setting
from pipelib.progress import Progress
from pipelib.state import lock_folder, state_root

_PART = ".part"
_LISTS = ".lists"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at a commit, pinned by its content."""

    path: str
    """Inside the repository."""
    bytes: int
    sha256: str
    """Empty in a list, where the hub says none: it has one of files that git LFS or Xet keeps."""


@dataclass(frozen=True)
class HubPin:
    """A file that this code names itself."""

    repo: HubRepo
    path: str
    sha256: str | None
    """None where nothing but the hub says it: the list at the commit, which the commit pins, decides."""


def store_folder(repo: HubRepo) -> Path:
    """Where a repository's files at a commit are kept."""
    prefix = "models--" if repo.kind == "model" else ""
    return state_root() / "hub" / (prefix + repo.name.replace("/", "--")) / repo.revision


def list_files(repo: HubRepo, folder: str, ending: str, retry: Retry) -> list[HubFile]:
    """The files that lie in a folder of a repository and whose paths end with `ending`, by path.

    Raises:
        UserError: no such repository, revision or folder, or a file that the hub has no SHA-256 of.
    """
    files = _listed(repo, folder, ending, retry)
    for file in files:
        if not file.sha256:
            raise UserError(
                f"{file.path} in {_where(repo, folder)} has no SHA-256 on the hub, so it cannot be verified; use "
                "another repository."
            )
    return files


def pinned_file(pin: HubPin, retry: Retry) -> HubFile:
    """The size and SHA-256 of a file that this code names.

    Raises:
        UserError: the hub does not list it, or lists another file under its name.
    """
    folder, _, name = pin.path.rpartition("/")
    found = [file for file in _listed(pin.repo, folder, name, retry) if file.path == pin.path]
    where = f"{pin.path} of {pin.repo.name} at {pin.repo.revision}"
    if not found:
        raise UserError(f"{where} is not on the hub, so it cannot be fetched; look at HF_ENDPOINT if it is a mirror's.")
    known = {sha256 for sha256 in (pin.sha256, found[0].sha256) if sha256}
    if len(known) != 1:
        _list_path(pin.repo, folder).unlink(missing_ok=True)  # so that another mirror is asked
        raise UserError(
            f"{where} has the SHA-256 {found[0].sha256 or 'unknown'} and should have {pin.sha256 or 'one'}, so it may be "
            "another file; look at HF_ENDPOINT if it is a mirror's, else report this."
        )
    return replace(found[0], sha256=known.pop())


def _listed(repo: HubRepo, folder: str, ending: str, retry: Retry) -> list[HubFile]:
    """The list that is kept, else the hub's, else, offline, what the hub's own cache has."""
    folder = folder.strip("/")
    kept = _list_path(repo, folder)
    files = _read_list(kept)
    if files is None and client().is_offline_mode():
        return _cached_files(repo, folder, ending)
    if files is None:
        url = repo.api_url(f"tree/{repo.revision}/{quote(folder)}".rstrip("/"))
        files = persistently(
            lambda: _files_at(url, folder), f"the list of files in {_where(repo, folder)}", repo, retry
        )
        entries = [asdict(file) for file in files]
        write_json(kept, {"files": entries, "sha256": sha256_json(entries)})
    return [file for file in files if file.path.endswith(ending)]


def _where(repo: HubRepo, folder: str) -> str:
    return f"{folder or 'the top folder'} of {repo.name} at {repo.revision}"


def _list_path(repo: HubRepo, folder: str) -> Path:
    return store_folder(repo) / _LISTS / f"{quote(folder, safe='') or 'top'}.json"


def _read_list(path: Path) -> list[HubFile] | None:
    """What an earlier run kept of the hub's list; None if there is none or it is damaged, so that the hub is asked."""
    with suppress(UserError, TypeError, KeyError):
        kept = read_json(path)
        if kept["sha256"] == sha256_json(kept["files"]):
            return [HubFile(**entry) for entry in kept["files"]]
    return None


def _files_at(url: str, folder: str) -> list[HubFile]:
    """A folder's files, by path, as the hub lists them; a path that lies elsewhere could leave the store."""
    found = [
        HubFile(entry["path"], entry["size"], (entry.get("lfs") or {}).get("oid", ""))
        for entry in get_list(url)
        if entry["type"] == "file" and entry["path"].rpartition("/")[0] == folder
    ]
    return sorted(found, key=lambda file: file.path)


def _cached_files(repo: HubRepo, folder: str, ending: str) -> list[HubFile]:
    """What the hub's own cache has of a folder, where the hub cannot be asked; this list is not kept."""
    snapshot = _snapshot(repo)
    paths = [path for path in sorted((snapshot / folder).glob("*")) if path.is_file()] if snapshot else []
    paths = [path for path in paths if path.name.endswith(ending)]
    if not paths or not snapshot:
        raise UserError(
            f"{_where(repo, folder)} cannot be downloaded (HF_HUB_OFFLINE is set, and neither the store nor the hub's "
            "cache has it): unset it, or set download.source to docs or local."
        )
    print(
        f"hub: offline, so {_where(repo, folder)} is taken to be what the hub's cache has ({len(paths)} of its files); this "
        "could not be compared with the hub's list",
        flush=True,
    )
    return [
        HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, sha256)
        for path, sha256 in zip(paths, sha256_files(paths), strict=True)
    ]


def _snapshot(repo: HubRepo) -> Path | None:
    """The folder of a commit in the hub's cache, if it is there."""
    hub = client()
    with suppress(hub.errors.CacheNotFound):
        for cached in hub.scan_cache_dir().repos:
            if (cached.repo_id, cached.repo_type) == (repo.name, repo.kind):
                for revision in cached.revisions:
                    if revision.commit_hash == repo.revision:
                        return Path(revision.snapshot_path)
    return None


@contextmanager
def open_store(repo: HubRepo, retry: Retry) -> Iterator["HubStore"]:
    """The files of a repository at a commit.

    The store is locked while the `with` block lasts, so that no other run writes to it and nobody deletes it; another run
    that needs it waits.
    """
    folder = store_folder(repo)
    lock = lock_folder(folder, wait=True)
    try:
        _remove_stale_partials(folder)
        yield HubStore(repo, retry)
    finally:
        os.close(lock)


@contextmanager
def fetch_pinned(pin: HubPin, retry: Retry = PATIENT) -> Iterator[Path]:
    """A file that this code names, verified, while it is read."""
    file = pinned_file(pin, retry)
    with open_store(pin.repo, retry) as store:
        (path,) = store.fetch([file])
        yield path


def _remove_stale_partials(folder: Path) -> None:
    """Remove what nothing will continue: the client's partial files, and those of files that are here or in no list."""
    for partial in folder.rglob("*.incomplete"):
        partial.unlink()
    listed = {file.path for path in (folder / _LISTS).glob("*.json") for file in _read_list(path) or ()}
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
        workers = positive_setting("PIPELIB_DOWNLOADS") or 4
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
        persistently(
            lambda: attempt(file, meter),
            f"{file.path} of {self._repo.name}",
            self._repo,
            self._retry,
            stop,
            lambda: meter.highest,
        )

    def _attempt(self, file: HubFile, meter: Meter) -> None:
        """Continue the partial file, and name it when it is right; what is wrong with it starts it again."""
        part = self._part(file)
        try:
            try:
                continue_file(self._repo.file_url(file.path), part, file.bytes, meter)
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
