"""Lists of the files that a repository of the Hugging Face hub has: asked for once, judged, kept.

The list of a folder's files, with their sizes and SHA-256, is kept in `.lists` in the store: what a commit holds never
changes. It is judged before it is kept, since a mirror may answer with less than the hub has: it has entries, each of the
hub's shape, it leaves out no file that the repository's names have, and it says what its reader needs. It is kept with the
endpoint that gave it, for messages. `pipelib clean --stage lists` deletes lists alone.
"""

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
    HubRepo,
    Retry,
    UnexpectedAnswerError,
    get_json,
    get_list,
    is_refusal,
    with_retries,
)
from pipelib.errors import UserError, tell
from pipelib.files import read_json, sha256_files, sha256_json, write_json
from pipelib.workspace.places import StatePlaces

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
    return StatePlaces.chosen().hub / (prefix + repo.name.replace("/", "--")) / repo.revision


@dataclass(frozen=True)
class _Listing:
    """A folder's files, by path, and who listed them."""

    where: str
    """The folder, for messages."""
    endpoint: str
    """Empty where it is not known: a list from before it was noted, or the hub's own cache."""
    files: Sequence[HubFile]

    @property
    def name(self) -> str:
        """For messages."""
        source = f"from {self.endpoint}" if self.endpoint else "on this machine (HF_HUB_OFFLINE is set)"
        return f"the list of files in {self.where} {source}"


ListCheck = Callable[[_Listing], None]
"""Raises a UserError where a list lacks what its reader needs."""


def list_files(repo: HubRepo, folder: str, ending: str, retry: Retry) -> list[HubFile]:
    """The files that lie in a folder of a repository and whose paths end with `ending`, by path; at least one.

    Raises:
        UserError: no such repository, revision, folder or file, or a file that the hub has no SHA-256 of.
    """

    def judge(listing: _Listing) -> None:
        wanted = [file for file in listing.files if file.path.endswith(ending)]
        if not wanted:
            raise UserError(
                f"{listing.name} has no {ending.removeprefix('.')} file, so there is no text; name another folder "
                "(download.folder)."
            )
        unknown = next((file.path for file in wanted if not file.sha256), None)
        if unknown is not None:
            raise UserError(
                f"{listing.name} has no SHA-256 of {unknown}, so it could not be verified; use another repository, or "
                "another mirror if HF_ENDPOINT names one."
            )

    files = _listed(repo, folder, judge, retry).files
    return [file for file in files if file.path.endswith(ending)]


def pinned_file(pin: HubPin, retry: Retry) -> HubFile:
    """The size and SHA-256 of a file that this code names.

    Raises:
        UserError: the hub does not list it, or lists another file under its name.
    """

    def judge(listing: _Listing) -> None:
        found = next((file for file in listing.files if file.path == pin.path), None)
        if not found:
            raise UserError(
                f"{listing.name} does not have {pin.path}, so it cannot be downloaded; look at HF_ENDPOINT if it is a "
                "mirror's, else report this."
            )
        if len({sha256 for sha256 in (pin.sha256, found.sha256) if sha256}) != 1:
            raise UserError(
                f"{listing.name} says that {pin.path} has the SHA-256 {found.sha256 or 'unknown'}, and it should have "
                f"{pin.sha256 or 'one'}, so it may be another file; look at HF_ENDPOINT if it is a mirror's, else report this."
            )

    files = _listed(pin.repo, pin.path.rpartition("/")[0], judge, retry).files
    found = next(file for file in files if file.path == pin.path)
    return replace(found, sha256=pin.sha256 or found.sha256)


def _listed(repo: HubRepo, folder: str, judge: ListCheck, retry: Retry) -> _Listing:
    """The list that is kept, else the hub's, else, offline, what the hub's own cache has; in any case one that serves."""
    folder = folder.strip("/")
    kept = _read_list(repo, folder)
    if kept and kept.endpoint:
        with suppress(UserError):
            judge(kept)
            return kept
    if client().is_offline_mode():
        listing = kept or _cached_listing(repo, folder)
        judge(listing)
        return listing
    listing = _ask_hub(repo, folder, retry)
    judge(listing)
    _keep(listing, _list_path(repo, folder))
    return listing


def listed_paths(store: Path) -> set[str]:
    """The files that the kept lists name, of a repository's folder in the store."""
    return {file.path for path in (store / _LISTS).glob("*.json") for file in _read(path)[1]}


def origin_hint(repo: HubRepo, file: HubFile) -> str:
    """What to add to an error about a file, where the list that names it came from another endpoint than is asked now."""
    kept = _read_list(repo, file.path.rpartition("/")[0])
    now = shown(endpoint())
    if not kept or kept.endpoint in ("", now):
        return ""
    return (
        f" The size and the SHA-256 of this file came from {kept.endpoint}; if they are wrong, `pipelib clean --stage "
        f"lists` deletes them, and the next run asks {now}."
    )


def _where(repo: HubRepo, folder: str) -> str:
    return f"{folder or 'the top folder'} of {repo.name} at {repo.revision}"


def _list_path(repo: HubRepo, folder: str) -> Path:
    name = quote(folder, safe="")
    name = {"": "top", "top": "top%2F"}.get(name, name)
    return store_folder(repo) / _LISTS / f"{name}.json"


def _keep(listing: _Listing, path: Path) -> None:
    content = {"endpoint": listing.endpoint, "files": [asdict(file) for file in listing.files]}
    write_json(path, {**content, "sha256": sha256_json(content)})


def _read_list(repo: HubRepo, folder: str) -> _Listing | None:
    """What an earlier run kept of the hub's list; None if there is none or it is damaged, so that the hub is asked."""
    origin, files = _read(_list_path(repo, folder))
    return _Listing(_where(repo, folder), origin, files) if files else None


def _read(path: Path) -> tuple[str, list[HubFile]]:
    """A kept list: the endpoint, and the files; none of a list that is not there or damaged."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # a UserError is a ValueError
        kept = read_json(path)
        sha256 = kept.pop("sha256")
        if sha256 == sha256_json(kept if "endpoint" in kept else kept["files"]):
            return kept.get("endpoint", ""), [HubFile(**entry) for entry in kept["files"]]
    return "", []


def _ask_hub(repo: HubRepo, folder: str, retry: Retry) -> _Listing:
    """A folder's files as the hub lists them, without a gap."""
    try:
        client().utils.validate_repo_id(repo.name)
    except ValueError as error:
        raise UserError(
            f"download.repo: the hub has no such name ({error}); write OWNER/NAME as its page does."
        ) from None
    what = f"the list of files in {_where(repo, folder)} from {shown(endpoint())}"
    url = repo.api_url(f"tree/{repo.revision}/{quote(folder)}".rstrip("/"))
    files = with_retries(lambda: parse_list(get_list(url), folder), what, repo, retry)
    with_retries(lambda: _require_complete(files, repo, folder), what, repo, retry)
    return _Listing(_where(repo, folder), shown(endpoint()), files)


def parse_list(entries: Sequence[Any], folder: str) -> list[HubFile]:
    """The files of a folder, by path, among the entries that the hub's API gives.

    A path that lies elsewhere is left out: it could lead out of the store.

    Raises:
        UnexpectedAnswerError: the hub would not answer so.
    """
    if not entries:
        raise UnexpectedAnswerError("an empty list, which the hub does not give of a folder")
    files = [file for file in map(_parse_entry, entries) if file and file.path.rpartition("/")[0] == folder]
    files.sort(key=lambda file: file.path)
    twice = next((first.path for first, second in pairwise(files) if first.path == second.path), None)
    if twice is not None:
        raise UnexpectedAnswerError(f"it names {twice} twice")
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
    raise UnexpectedAnswerError("it has an entry that is not like the hub's")


def _is_path(path: str) -> bool:
    """Whether a file system can have it, and a message show it."""
    try:
        return not re.search(r"[\x00-\x1f\x7f]", path) and len(path.encode("utf-8")) < 1000
    except UnicodeEncodeError:
        return False


def _sha256_in(lfs: Any) -> str:
    """What the hub says of a file's content in git LFS; nothing where git alone has it."""
    match lfs:
        case None:
            return ""
        case {"oid": str(oid)} if re.fullmatch("[0-9a-f]{64}", oid):
            return oid
    raise UnexpectedAnswerError("it has a SHA-256 that is not one")


def _require_complete(files: Sequence[HubFile], repo: HubRepo, folder: str) -> None:
    """Compare the list with the names of all files, which the hub gives in one answer: of a list that comes in pages, a
    mirror may have the first alone, and nothing in it tells.

    Raises:
        UnexpectedAnswerError: the list leaves files out, or is another commit's.
    """
    known = _ask_names(repo)
    if known is None:
        tell(
            f"hub: {shown(endpoint())} does not name the files of {repo.name}, so it could not be checked whether its list of "
            f"{folder or 'the top folder'} is complete ({len(files)} files)"
        )
        return
    named = {name for name in known if name.rpartition("/")[0] == folder}
    left_out = sorted(named - {file.path for file in files})
    if left_out:
        raise UnexpectedAnswerError(f"it leaves out {len(left_out)} of {len(named)} files, {left_out[0]} first")


def _ask_names(repo: HubRepo) -> list[str] | None:
    """The paths of a repository's files; None from a server that does not give them."""
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
            raise UnexpectedAnswerError(f"it answers for commit {commit[:40]!r}")
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
    tell(
        f"hub: offline, so {_where(repo, folder)} is taken to be what the hub's cache has ({len(paths)} of its files); this "
        "could not be compared with the hub's list"
    )
    hashes = sha256_files(paths)
    return _Listing(
        _where(repo, folder),
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
