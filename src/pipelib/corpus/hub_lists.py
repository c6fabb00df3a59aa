"""Lists of the files in a repository of the Hugging Face hub: requested once, checked, stored.

The list of a folder's files, with their sizes and SHA-256, is stored in `.lists` in the store, because the content of a
commit never changes. It is checked before it is stored, because a mirror may return less than the hub has. The checks: the
list has entries, each entry has the hub's form, no file that the repository names is missing, and the reader of the list
gets what it needs. The endpoint that sent the list is stored with it, for messages. `pipelib clean --stage lists` deletes
only the lists.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelib.corpus.hub_client import client, endpoint, shown
from pipelib.corpus.hub_transfer import (
    NOT_NEEDED,
    HubRepo,
    Retry,
    UnexpectedAnswerError,
    get_json,
    get_list,
    is_refusal,
    with_retries,
)
from pipelib.corpus.params import KINDS_IN_WORDS
from pipelib.errors import UserError, tell
from pipelib.files import read_json, sha256_file, sha256_files, sha256_json, write_json
from pipelib.workspace.places import StatePlaces

_LISTS = ".lists"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at a commit, pinned by its content."""

    path: str
    """The path inside the repository."""
    bytes: int
    sha256: str
    """Empty in a list if the hub publishes none. It publishes one only for files in git LFS or Xet."""
    git_sha1: str = ""
    """The SHA-1 that git knows a smaller file by, of its length and content; empty if there is a SHA-256."""

    def identity(self) -> dict[str, object]:
        """Return what pins the file."""
        return {name: value for name, value in asdict(self).items() if value or name != "git_sha1"}

    def is_at(self, path: Path) -> bool:
        """Return whether a path holds this file."""
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        if self.sha256:
            return sha256_file(path) == self.sha256
        content = path.read_bytes()  # files outside of git LFS are small
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        return digest == self.git_sha1


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository, with or without its subfolders."""

    path: str
    """Without a slash at its ends; empty for the top folder."""
    is_deep: bool = False
    """Whether its subfolders count, too."""

    def __str__(self) -> str:
        return f"{self.path or 'the top folder'}{' and its subfolders' if self.is_deep else ''}"

    def has(self, path: str) -> bool:
        """Return whether a file is in it. A path that could lead out of the store is in no folder."""
        *parents, name = path.split("/")
        if {"", ".", ".."}.intersection((*parents, name)):
            return False
        own = self.path.split("/") if self.path else []
        return parents == own or (self.is_deep and parents[: len(own)] == own)

    def of(self, repo: HubRepo) -> str:
        """Return how messages call it."""
        return f"{self} of {repo.name} at {repo.revision}"


@dataclass(frozen=True)
class HubPin:
    """A file of the hub that is pinned in this code."""

    repo: HubRepo
    path: str
    sha256: str | None
    """None if only the hub gives it. Then the list at the commit decides, and the commit pins the list."""


def store_folder(repo: HubRepo) -> Path:
    """Return the folder that stores a repository's files at a commit."""
    prefix = "models--" if repo.kind == "model" else ""
    return StatePlaces.chosen().hub / (prefix + repo.name.replace("/", "--")) / repo.revision


@dataclass(frozen=True)
class _Listing:
    """A folder's files, sorted by path, and the endpoint that listed them."""

    where: str
    """The folder, for messages."""
    endpoint: str
    """Empty if unknown: the list was stored by an older version, or comes from the hub's own cache."""
    files: Sequence[HubFile]

    @property
    def name(self) -> str:
        """The name of the list in messages."""
        source = f"from {self.endpoint}" if self.endpoint else "on this machine (HF_HUB_OFFLINE is set)"
        return f"the list of files in {self.where} {source}"


class _NoFileError(UserError):
    """A folder has no file that can be read. Its subfolders may have some."""


ListCheck = Callable[[_Listing], None]
"""Raises a UserError if a list lacks what its reader needs."""


def list_files(repo: HubRepo, folder: str, kinds: Sequence[tuple[str, ...]], retry: Retry) -> list[HubFile]:
    """Return the files of one kind in a folder of a repository, sorted by path. There is at least one.

    If the folder itself has none, those in its subfolders count.

    Args:
        kinds: the endings of the files of each kind; the first kind that is there counts.

    Raises:
        UserError: there is no such repository, revision, folder or file, or the hub has no SHA-256 for a file.
    """

    def check(listing: _Listing) -> None:
        wanted = _of_one_kind(listing.files, kinds)
        if not wanted:
            raise _NoFileError(
                f"{listing.name} has no file that can be read ({KINDS_IN_WORDS}), so there is no text; name another folder "
                f"({repo.section}.folder)."
            )
        unknown = next((file.path for file in wanted if not (file.sha256 or file.git_sha1)), None)
        if unknown is not None:
            raise UserError(
                f"{listing.name} has no hash of {unknown}, so it could not be verified; use another repository, or "
                "another mirror if HF_ENDPOINT names one."
            )

    here = HubFolder(folder.strip("/"))
    below = replace(here, is_deep=True)
    listing = _stored_listing(repo, here, check) or _stored_listing(repo, below, check)
    if not listing:
        try:
            listing = _get_listing(repo, here, check, retry)
        except _NoFileError:
            listing = _get_listing(repo, below, check, retry)
    return _of_one_kind(listing.files, kinds)


def _of_one_kind(files: Sequence[HubFile], kinds: Sequence[tuple[str, ...]]) -> list[HubFile]:
    found = ([file for file in files if file.path.endswith(endings)] for endings in kinds)
    return next(filter(None, found), [])


def pinned_file(pin: HubPin, retry: Retry) -> HubFile:
    """Return the size and SHA-256 of a pinned file.

    Raises:
        UserError: the hub does not list it, or lists another file under its name.
    """

    def check(listing: _Listing) -> None:
        found = next((file for file in listing.files if file.path == pin.path), None)
        if not found:
            raise UserError(
                f"{listing.name} does not have {pin.path}, so it cannot be downloaded; check HF_ENDPOINT if you use a "
                "mirror, else report this."
            )
        if len({sha256 for sha256 in (pin.sha256, found.sha256) if sha256}) != 1:
            raise UserError(
                f"{listing.name} says that {pin.path} has the SHA-256 {found.sha256 or 'unknown'}, and it should have "
                f"{pin.sha256 or 'one'}, so it may be another file; check HF_ENDPOINT if you use a mirror, else report this."
            )

    files = _get_listing(pin.repo, HubFolder(pin.path.rpartition("/")[0]), check, retry).files
    found = next(file for file in files if file.path == pin.path)
    return replace(found, sha256=pin.sha256 or found.sha256, git_sha1="")


def _get_listing(repo: HubRepo, folder: HubFolder, check: ListCheck, retry: Retry) -> _Listing:
    """Return a list that passes `check`: the stored one, else the hub's; offline, that of the hub's own cache."""
    if stored := _stored_listing(repo, folder, check):
        return stored
    if client().is_offline_mode():
        listing = _read_list(repo, folder) or _cached_listing(repo, folder)
        check(listing)
        return listing
    listing = _ask_hub(repo, folder, retry)
    check(listing)
    _store_list(listing, _list_path(repo, folder))
    return listing


def _stored_listing(repo: HubRepo, folder: HubFolder, check: ListCheck) -> _Listing | None:
    """Return the list that an earlier run stored, if it passes `check`. One of an unknown endpoint does not."""
    stored = _read_list(repo, folder)
    if stored and stored.endpoint:
        with suppress(UserError):
            check(stored)
            return stored
    return None


def listed_paths(store: Path) -> set[str]:
    """Return the paths that the stored lists name, for a repository's folder in the store."""
    return {file.path for path in (store / _LISTS).glob("*.json") for file in _read(path)[1]}


def origin_hint(repo: HubRepo, file: HubFile) -> str:
    """Return a hint for an error about a file, if its list came from another endpoint than the current one; else nothing."""
    stored = _read_list(repo, HubFolder(file.path.rpartition("/")[0]))
    now = shown(endpoint())
    if not stored or stored.endpoint in ("", now):
        return ""
    return (
        f" The size and the SHA-256 of this file came from {stored.endpoint}; if they are wrong, `pipelib clean --stage "
        f"lists` deletes them, and the next run asks {now}."
    )


def _list_path(repo: HubRepo, folder: HubFolder) -> Path:
    name = quote(f"{folder.path}/*" if folder.is_deep else folder.path, safe="")
    name = {"": "top", "top": "top%2F"}.get(name, name)  # a folder may itself be called "top"
    return store_folder(repo) / _LISTS / f"{name}.json"


def _store_list(listing: _Listing, path: Path) -> None:
    # The list carries its own hash, so that a damaged one is noticed and requested again.
    content = {"endpoint": listing.endpoint, "files": [asdict(file) for file in listing.files]}
    write_json(path, {**content, "sha256": sha256_json(content)})


def _read_list(repo: HubRepo, folder: HubFolder) -> _Listing | None:
    """Read the list that an earlier run stored; None if there is none or it is damaged, and then the hub is asked."""
    origin, files = _read(_list_path(repo, folder))
    return _Listing(folder.of(repo), origin, files) if files else None


def _read(path: Path) -> tuple[str, list[HubFile]]:
    """Read a stored list: the endpoint, and the files. Both are empty if the list is missing or damaged."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # a UserError is a ValueError
        stored = read_json(path)
        sha256 = stored.pop("sha256")
        if sha256 == sha256_json(stored if "endpoint" in stored else stored["files"]):  # older lists have no endpoint
            return stored.get("endpoint", ""), [HubFile(**entry) for entry in stored["files"]]
    return "", []


def _ask_hub(repo: HubRepo, folder: HubFolder, retry: Retry) -> _Listing:
    """Get the complete list of a folder's files from the hub."""
    try:
        client().utils.validate_repo_id(repo.name)
    except ValueError as error:
        raise UserError(
            f"{repo.section}.repo: this is not a valid name on the hub ({error}); write OWNER/NAME as its page does."
        ) from None
    what = f"the list of files in {folder.of(repo)} from {shown(endpoint())}"
    tree = f"tree/{repo.revision}/{quote(folder.path)}".rstrip("/")
    url = repo.api_url(f"{tree}?recursive=true" if folder.is_deep else tree)
    files = with_retries(lambda: parse_list(get_list(url), folder), what, repo, retry)
    with_retries(lambda: _require_complete(files, repo, folder), what, repo, retry)
    return _Listing(folder.of(repo), shown(endpoint()), files)


def parse_list(entries: Sequence[Any], folder: HubFolder) -> list[HubFile]:
    """Return the files of a folder, sorted by path, from the entries that the hub's API returns.

    Paths outside the folder are left out, because they could lead out of the store.

    Raises:
        UnexpectedAnswerError: the hub would not send such a list.
    """
    if not entries:
        raise UnexpectedAnswerError("an empty list, which the hub never sends for a folder")
    files = [file for file in map(_parse_entry, entries) if file and folder.has(file.path)]
    files.sort(key=lambda file: file.path)
    twice = next((first.path for first, second in pairwise(files) if first.path == second.path), None)
    if twice is not None:
        raise UnexpectedAnswerError(f"it names {twice} twice")
    return files


def _parse_entry(entry: Any) -> HubFile | None:
    """Parse an entry: return a file, or None for a folder."""
    match entry:
        case {"type": "file", "path": str(path), "size": int(size)} if (
            size >= 0 and size is not True and size is not False  # a bool is an int for `match`
        ):
            if _is_path(path):
                sha256 = _sha256_in(entry.get("lfs"))
                return HubFile(path, size, sha256, "" if sha256 else _git_sha1_in(entry.get("oid")))
        case {"type": str(kind)} if kind != "file":
            return None
    raise UnexpectedAnswerError("it has an entry that is not like the hub's")


def _is_path(path: str) -> bool:
    """Return whether a path is valid in a file system and can be printed."""
    try:
        return not re.search(r"[\x00-\x1f\x7f]", path) and len(path.encode("utf-8")) < 1000
    except UnicodeEncodeError:
        return False


def _git_sha1_in(oid: Any) -> str:
    """Return the SHA-1 of a file in plain git; empty if there is none."""
    return oid if isinstance(oid, str) and re.fullmatch("[0-9a-f]{40}", oid) else ""


def _sha256_in(lfs: Any) -> str:
    """Return the SHA-256 in a file's git LFS entry; empty if the file is in plain git."""
    match lfs:
        case None:
            return ""
        case {"oid": str(oid)} if re.fullmatch("[0-9a-f]{64}", oid):
            return oid
    raise UnexpectedAnswerError("it has an invalid SHA-256")


def _require_complete(files: Sequence[HubFile], repo: HubRepo, folder: HubFolder) -> None:
    """Compare the list with the names of all files, which the hub sends in one answer.

    The list itself comes in pages. A mirror may have only the first page, and nothing in that page shows it.

    Raises:
        UnexpectedAnswerError: the list leaves files out, or belongs to another commit.
    """
    known = _ask_names(repo)
    if known is None:
        tell(
            f"hub: {shown(endpoint())} does not name the files of {repo.name}, so it could not be checked whether its list of "
            f"{folder} ({len(files)} files) is complete; compare it with the repository's page"
        )
        return
    named = {name for name in known if folder.has(name)}
    left_out = sorted(named - {file.path for file in files})
    if left_out:
        raise UnexpectedAnswerError(f"it leaves out {len(left_out)} of {len(named)} files, {left_out[0]} first")


def _ask_names(repo: HubRepo) -> list[str] | None:
    """Return the paths of a repository's files; None if the server does not list them."""
    try:
        answer = get_json(repo.api_url(f"revision/{repo.revision}"))
    except UnexpectedAnswerError:
        return None
    except Exception as error:
        if is_refusal(error):
            return None
        raise
    match answer:
        case {"sha": str(commit)} if commit != repo.revision:
            raise UnexpectedAnswerError(f"the answer is about commit {commit[:40]!r}")
        case {"siblings": [*siblings]}:
            names = [entry.get("rfilename") if isinstance(entry, dict) else None for entry in siblings]
            return names if all(isinstance(name, str) for name in names) else None  # type: ignore[return-value]
    return None


def _cached_listing(repo: HubRepo, folder: HubFolder) -> _Listing:
    """List the files of a folder in the hub's own cache, for offline use. This list is not stored."""
    snapshot = _snapshot(repo)
    found = (snapshot / folder.path).glob("**/*" if folder.is_deep else "*") if snapshot else ()
    paths = [path for path in sorted(found) if path.is_file()]
    if not paths or not snapshot:
        raise _NoFileError(
            f"{folder.of(repo)} cannot be downloaded (HF_HUB_OFFLINE is set, and neither the store nor the hub's "
            f"cache has it): unset HF_HUB_OFFLINE, or {NOT_NEEDED}."
        )
    tell(
        f"hub: HF_HUB_OFFLINE is set, so {folder.of(repo)} is read from the hub's cache ({len(paths)} files); "
        "this could not be compared with the hub's list, so files may be missing"
    )
    hashes = sha256_files(paths)
    return _Listing(
        folder.of(repo),
        "",
        [
            HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, sha256)
            for path, sha256 in zip(paths, hashes, strict=True)
        ],
    )


def _snapshot(repo: HubRepo) -> Path | None:
    """Return the folder of a commit in the hub's cache; None if it is not there."""
    hub = client()
    with suppress(hub.errors.CacheNotFound, ValueError):  # ValueError: the cache folder is a file
        for cached in hub.scan_cache_dir().repos:
            if (cached.repo_id, cached.repo_type) == (repo.name, repo.kind):
                for revision in cached.revisions:
                    if revision.commit_hash == repo.revision:
                        return Path(revision.snapshot_path)
    return None
