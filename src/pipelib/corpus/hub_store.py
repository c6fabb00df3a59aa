"""Verified files of the Hugging Face hub, kept for every run that needs them.

A repository's files at a commit are kept in `STATE/hub/OWNER--NAME/REVISION/PATH` (a model's in `models--OWNER--NAME`),
whatever the stage's parameters and code, and outs are hard links to them. The list of a folder's files, with their sizes
and SHA-256, is kept in `.lists` there: what a commit holds never changes. So a list and a file are asked for once, and each
later use checks the SHA-256 of what it needs and makes no request.

A list is judged before it is kept, since a mirror may answer with less than the hub has: it has entries, each of the hub's
shape, it leaves out no file that the repository's page names, and it says what its reader needs. It is kept with the
endpoint that gave it. `pipelib clean --stage lists` deletes lists alone.

A file comes as `PATH.part`, which a run that was killed leaves and the next one continues; it gets its name when its
SHA-256 is right. A file in the hub's own cache (`HF_HOME`, `HF_HUB_CACHE`) is verified and linked instead of fetched.

`PIPELIB_DOWNLOADS` sets how many files come at once (default 4). With `HF_HUB_DISABLE_XET=0` the client's own download,
Xet if the repository has it, takes the place of the loop here: a kill then loses the files on their way.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelib.corpus.hub_client import client, endpoint, shown
from pipelib.corpus.hub_transfer import (
    PATIENT,
    ForeignAnswerError,
    HubRepo,
    Meter,
    Retry,
    WrongBytesError,
    continue_file,
    get_json,
    get_list,
    is_refusal,
    persistently,
    read_tail,
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

_LISTS = ".lists"
_PART = ".part"
_TAIL_BYTES = 64 << 10
"""What is asked for of the end of a parquet file, in the hope that its metadata is no longer."""


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


@dataclass(frozen=True)
class _Listing:
    """A folder's files, by path, and who listed them."""

    endpoint: str
    """Empty where it is not known: a list from before it was noted, or the hub's own cache."""
    files: Sequence[HubFile]


Judge = Callable[[Sequence[HubFile]], str]
"""Says what a list lacks for its reader; nothing if it serves."""


def list_files(repo: HubRepo, folder: str, ending: str, retry: Retry) -> list[HubFile]:
    """The files that lie in a folder of a repository and whose paths end with `ending`, by path; at least one.

    Raises:
        UserError: no such repository, revision, folder or file, or a file that the hub has no SHA-256 of.
    """

    def judge(files: Sequence[HubFile]) -> str:
        wanted = [file for file in files if file.path.endswith(ending)]
        if not wanted:
            return (
                f"holds no {ending.removeprefix('.')} file, so there is no text; name another folder (download.folder)"
            )
        unknown = next((file.path for file in wanted if not file.sha256), None)
        return (
            f"has no SHA-256 of {unknown}, so it could not be verified; use another repository, or another mirror if "
            "HF_ENDPOINT names one"
            if unknown
            else ""
        )

    files = _listed(repo, folder, judge, retry).files
    return [file for file in files if file.path.endswith(ending)]


def pinned_file(pin: HubPin, retry: Retry) -> HubFile:
    """The size and SHA-256 of a file that this code names.

    Raises:
        UserError: the hub does not list it, or lists another file under its name.
    """

    def judge(files: Sequence[HubFile]) -> str:
        found = next((file for file in files if file.path == pin.path), None)
        if not found:
            return f"does not have {pin.path}, so it cannot be downloaded; {remedy}"
        if len({sha256 for sha256 in (pin.sha256, found.sha256) if sha256}) == 1:
            return ""
        return (
            f"says that {pin.path} has the SHA-256 {found.sha256 or 'unknown'}, and it should have "
            f"{pin.sha256 or 'one'}, so it may be another file; {remedy}"
        )

    remedy = "look at HF_ENDPOINT if it is a mirror's, else report this"
    folder = pin.path.rpartition("/")[0]
    files = _listed(pin.repo, folder, judge, retry).files
    found = next(file for file in files if file.path == pin.path)
    return replace(found, sha256=pin.sha256 or found.sha256)


def _listed(repo: HubRepo, folder: str, judge: Judge, retry: Retry) -> _Listing:
    """The list that is kept, else the hub's, else, offline, what the hub's own cache has; in any case one that serves."""
    folder = folder.strip("/")
    path = _list_path(repo, folder)
    kept = _read_list(path)
    if kept and kept.endpoint and not judge(kept.files):
        return kept
    offline = client().is_offline_mode()
    listing = (kept or _cached_listing(repo, folder)) if offline else _ask_hub(repo, folder, retry)
    if flaw := judge(listing.files):
        source = f"from {listing.endpoint}" if listing.endpoint else "on this machine (HF_HUB_OFFLINE is set)"
        raise UserError(f"the list of files in {_where(repo, folder)} {source} {flaw}.")
    if not offline:
        _keep_list(path, listing)
    return listing


def _where(repo: HubRepo, folder: str) -> str:
    return f"{folder or 'the top folder'} of {repo.name} at {repo.revision}"


def _list_path(repo: HubRepo, folder: str) -> Path:
    name = quote(folder, safe="")
    name = {"": "top", "top": "top%2F"}.get(name, name)
    return store_folder(repo) / _LISTS / f"{name}.json"


def _keep_list(path: Path, listing: _Listing) -> None:
    content = {"endpoint": listing.endpoint, "files": [asdict(file) for file in listing.files]}
    write_json(path, {**content, "sha256": sha256_json(content)})


def _read_list(path: Path) -> _Listing | None:
    """What an earlier run kept of the hub's list; None if there is none or it is damaged, so that the hub is asked."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # a UserError is a ValueError
        kept = read_json(path)
        sha256 = kept.pop("sha256")
        if sha256 == sha256_json(kept if "endpoint" in kept else kept["files"]):
            return _Listing(kept.get("endpoint", ""), [HubFile(**entry) for entry in kept["files"]])
    return None


def _ask_hub(repo: HubRepo, folder: str, retry: Retry) -> _Listing:
    """A folder's files as the hub lists them, without a gap."""
    what = f"the list of files in {_where(repo, folder)} from {shown(endpoint())}"
    url = repo.api_url(f"tree/{repo.revision}/{quote(folder)}".rstrip("/"))
    files = persistently(lambda: parse_list(get_list(url), folder), what, repo, retry)
    persistently(lambda: _require_complete(files, repo, folder), what, repo, retry)
    return _Listing(shown(endpoint()), files)


def parse_list(entries: Sequence[Any], folder: str) -> list[HubFile]:
    """The files of a folder, by path, among the entries that the hub's API gives.

    A path that lies elsewhere is left out: it could lead out of the store.

    Raises:
        ForeignAnswerError: the hub would not answer so.
    """
    if not entries:
        raise ForeignAnswerError("an empty list, which the hub does not give of a folder")
    files = [file for file in map(_parse_entry, entries) if file and file.path.rpartition("/")[0] == folder]
    files.sort(key=lambda file: file.path)
    twice = next((first.path for first, second in pairwise(files) if first.path == second.path), None)
    if twice is not None:
        raise ForeignAnswerError(f"it names {twice} twice")
    return files


def _parse_entry(entry: Any) -> HubFile | None:
    """A file, or None for a folder."""
    match entry:
        case {"type": "file", "path": str(path), "size": int(size)} if (
            size >= 0 and size is not True and size is not False
        ):
            if _is_path(path):
                return HubFile(path, size, _sha256_in(entry.get("lfs")))
        case {"type": str(kind)} if kind != "file":
            return None
    raise ForeignAnswerError("it has an entry that is not like the hub's")


def _is_path(path: str) -> bool:
    """Whether a file system can have it."""
    try:
        return "\0" not in path and len(path.encode("utf-8")) < 1000
    except UnicodeEncodeError:
        return False


def _sha256_in(lfs: Any) -> str:
    """What the hub says of a file's content in git LFS; nothing where git alone has it."""
    match lfs:
        case None:
            return ""
        case {"oid": str(oid)} if re.fullmatch("[0-9a-f]{64}", oid):
            return oid
    raise ForeignAnswerError("it has a SHA-256 that is not one")


def _require_complete(files: Sequence[HubFile], repo: HubRepo, folder: str) -> None:
    """Compare the list with the names of all files, which the hub gives in one answer: of a list that comes in pages, a
    mirror may have the first alone, and nothing in it tells.

    Raises:
        ForeignAnswerError: the list leaves files out, or is another commit's.
    """
    known = _ask_names(repo)
    if known is None:
        print(
            f"hub: {shown(endpoint())} does not name the files of {repo.name}, so it could not be checked whether its list of "
            f"{folder or 'the top folder'} is complete ({len(files)} files)",
            flush=True,
        )
        return
    named = {name for name in known if name.rpartition("/")[0] == folder}
    left_out = sorted(named - {file.path for file in files})
    if left_out:
        raise ForeignAnswerError(f"it leaves out {len(left_out)} of {len(named)} files, {left_out[0]} first")


def _ask_names(repo: HubRepo) -> list[str] | None:
    """The paths of a repository's files; None from a server that does not give them."""
    try:
        answer = get_json(repo.api_url(f"revision/{repo.revision}"))
    except ForeignAnswerError:
        return None
    except Exception as error:
        if is_refusal(error):
            return None
        raise
    match answer:
        case {"sha": str(commit)} if commit != repo.revision:
            raise ForeignAnswerError(f"it answers for commit {commit[:40]}")
        case {"siblings": [*siblings]}:
            names = [entry.get("rfilename") if isinstance(entry, dict) else None for entry in siblings]
            return names if all(isinstance(name, str) for name in names) else None  # type: ignore[return-value]
    return None


def _cached_listing(repo: HubRepo, folder: str) -> _Listing:
    """What the hub's own cache has of a folder, where the hub cannot be asked; this list is not kept."""
    snapshot = _snapshot(repo)
    paths = [path for path in sorted((snapshot / folder).glob("*")) if path.is_file()] if snapshot else []
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
    hashes = sha256_files(paths)
    return _Listing(
        "",
        [
            HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, sha256)
            for path, sha256 in zip(paths, hashes, strict=True)
        ],
    )


def _snapshot(repo: HubRepo) -> Path | None:
    """The folder of a commit in the hub's cache, if it is there."""
    hub = client()
    with suppress(hub.errors.CacheNotFound, ValueError):  # a ValueError: it is a file
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
    lists = filter(None, map(_read_list, (folder / _LISTS).glob("*.json")))
    listed = {file.path for listing in lists for file in listing.files}
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
        return persistently(lambda: read_tail(url, file.bytes, count), what, self._repo, self._retry)

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
        what = f"{file.path} of {self._repo.name}"
        try:
            persistently(lambda: attempt(file, meter), what, self._repo, self._retry, stop, lambda: meter.highest)
        except UserError as error:
            raise UserError(f"{error}{self._hint(file)}") from None

    def _hint(self, file: HubFile) -> str:
        """What to add to an error where the list that names the file came from another endpoint than is asked now."""
        kept = _read_list(_list_path(self._repo, file.path.rpartition("/")[0]))
        now = shown(endpoint())
        if not kept or kept.endpoint in ("", now):
            return ""
        return (
            f" The size and the SHA-256 of this file came from {kept.endpoint}; if they are wrong, `pipelib clean --stage "
            f"lists` deletes them, and the next run asks {now}."
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
