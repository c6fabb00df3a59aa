"""One file or list from the Hugging Face hub, with retries: what is asked, how often, and when to give up.

Every attempt is one request of the client library's own session, so its token, its endpoint and its offline mode hold, and
nothing but the loop here decides what is tried again. The library's downloads do not do for this: they retry inside (up to
six requests for one call), know only whole seconds of Retry-After, wait for ever for a list, and start a file again after
a kill, since their partial files have random names.

Messages name a file, its repository and the status: no header and no URL but the endpoint, since those can carry secrets.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit

from pipelib.corpus.hub_client import (
    PROXY_REMEDY,
    client,
    connection_failure,
    endpoint,
    headers,
    permanent_failure,
    session,
    shown,
    timeout,
)
from pipelib.errors import UserError
from pipelib.progress import Progress

T = TypeVar("T")

# Read by the hub's client when it is imported, which others do too (`datasets`), so set before that.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it costs a request
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # warnings name URLs, and what matters is said here


@dataclass(frozen=True)
class HubRepo:
    """A repository of the hub at a commit."""

    name: str
    """OWNER/NAME."""
    revision: str
    """The commit, 40 hexadecimal digits."""
    kind: Literal["dataset", "model"] = "dataset"

    def file_url(self, path: str) -> str:
        """Where the hub serves a file."""
        url: str = client().hf_hub_url(
            self.name, path, repo_type=self.kind, revision=self.revision, endpoint=endpoint()
        )
        return url

    def api_url(self, path: str) -> str:
        """Where the hub's API answers about this repository."""
        return f"{endpoint()}/api/{self.kind}s/{quote(self.name)}/{path}"


@dataclass(frozen=True)
class Retry:
    """How often to try, and how long to wait in between."""

    attempts: int = 8
    """In a row; an attempt that brought bytes which no attempt before brought starts the count again."""
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled for each further one, and varied by up to a half."""
    max_wait: float = 60.0
    """Seconds; also the most that a server's Retry-After is heeded."""

    def seconds(self, attempt: int, wish: float | None) -> float:
        """How long to wait after a failed attempt, the first being 1; `wish` is the server's, if it has one."""
        if wish is not None:
            return min(wish, self.max_wait)
        return float(min(self.first_wait * 2 ** (attempt - 1), self.max_wait) * random.uniform(0.5, 1.5))


DEFAULT_RETRY = Retry()
"""Two minutes of waiting, more or less, before a hub that does not answer is given up."""


class WrongBytesError(Exception):
    """What came is not what was announced."""


class TruncatedAnswerError(Exception):
    """The answer ended before the file did."""


class UnexpectedAnswerError(Exception):
    """What came is not an answer that the hub gives: a page for people, JSON of another shape, a list with gaps."""


class StoppedError(Exception):
    """Another file has failed for good, or the user stopped the run."""


class Meter:
    """Counts one file's bytes into the progress of all, and can stop it.

    The client's own downloads take it for the class of a progress bar.
    """

    def __init__(self, progress: Progress, stop: threading.Event, position: int = 0) -> None:
        """Args:
        position: bytes of the file that are here already; `progress` counts them.
        """
        self._progress, self._stop = progress, stop
        self._position = self.highest = position

    def update(self, count: int) -> None:
        """Count bytes that came.

        Raises:
            StoppedError: nobody needs them any more.
        """
        if self._stop.is_set():
            raise StoppedError
        self._position += count
        self.highest = max(self.highest, self._position)
        self._progress.add(count)

    def restart(self) -> None:
        """Forget what was counted: the file starts again."""
        self._progress.add(-self._position)
        self._position = 0

    def __call__(self, **_: Any) -> Self:
        """Stand in for the class of a bar, which the client calls."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _get(url: str, more: Mapping[str, str]) -> Iterator[Any]:
    """The hub's answer to one request, its body still to be read; raises on anything but success.

    Args:
        more: headers beside the client's own.
    """
    with session().stream("GET", url, headers={**headers(), **more}, timeout=timeout()) as response:
        _raise_for_status(response)
        if response.status_code not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):  # a redirection to nowhere
            raise UnexpectedAnswerError(f"HTTP {response.status_code}")
        yield response


def _raise_for_status(response: Any) -> None:
    """Raise on an error status, in the client's words if it has some: it stumbles over bodies that are not the hub's."""
    import httpx2

    try:
        client().hf_raise_for_status(response)
    except httpx2.HTTPError:
        raise
    except Exception:
        response.raise_for_status()


def get_list(url: str) -> list[Any]:
    """The entries that the hub's API lists, all pages of them.

    The next page is asked of the same address: a mirror may hand on the hub's own, and the token goes to no other host.
    """
    entries: list[Any] = []
    asked: set[str] = set()
    following: str | None = url
    while following:
        asked.add(following)
        with _get(following, {}) as response:
            page = _read_json(response)
            following = _next_page(url, response)
        if not isinstance(page, list):
            raise UnexpectedAnswerError(f"JSON that is not a list but {type(page).__name__}")
        if following and (not page or following in asked):
            raise UnexpectedAnswerError("its pages do not end")
        entries += page
    return entries


def get_json(url: str) -> Any:
    """The JSON that the hub's API answers."""
    with _get(url, {}) as response:
        return _read_json(response)


def _read_json(response: Any) -> Any:
    response.read()
    try:
        return response.json()
    except (ValueError, RecursionError):
        if response.content.lstrip()[:1] in (b"[", b"{"):
            raise TruncatedAnswerError("its JSON is damaged or ended early") from None
        raise UnexpectedAnswerError(f"{_kind(response)} instead of JSON") from None


def _kind(response: Any) -> str:
    """What a body is, as its header says."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if kind == "text/html":
        return "an HTML page"
    return kind if kind.isprintable() and 0 < len(kind) < 40 else "something"


def _next_page(url: str, response: Any) -> str | None:
    """Where the list goes on, at the address that was asked for its start."""
    link = response.links.get("next", {}).get("url")
    if link is None:
        return None
    try:
        return f"{url}?{urlsplit(link).query}"
    except ValueError:
        raise UnexpectedAnswerError("the address of its next page is damaged") from None


def read_tail(url: str, size: int, count: int) -> bytes | None:
    """The last `count` bytes of a file of `size` bytes by one request; None from a server that gives something else."""
    try:
        # identity: a compressed answer has no ranges
        with _get(url, {"Accept-Encoding": "identity", "Range": f"bytes={size - count}-{size - 1}"}) as response:
            if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                return None
            tail = b""
            for block in response.iter_bytes():
                tail += block
                if len(tail) > count:
                    return None
    except Exception as error:
        if status_of(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise
    return tail if len(tail) == count else None


def resume_file(url: str, part: Path, size: int, meter: Meter) -> None:
    """Bring a partial file to its full size with one request, from the byte where it ends.

    Args:
        part: where the bytes are, if there are any; what came stays in it, whatever happens.
        size: bytes of the whole file.

    Raises:
        WrongBytesError: the hub's file has another size.
        TruncatedAnswerError: the answer ended early.
    """
    start = part.stat().st_size if part.exists() else 0
    if start == size:
        return
    # identity: a compressed answer has no ranges
    more = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    with _get(url, more) as response:
        if _kind(response) == "an HTML page":
            raise UnexpectedAnswerError("an HTML page instead of the file")
        if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:  # a server that knows no ranges sends it all
            meter.restart()
            start = 0
        announced = response.headers.get("Content-Length", str(size - start))
        if announced != str(size - start):
            actual = start + int(announced) if announced.isdecimal() else "unknown"
            raise WrongBytesError(f"its size is {actual} bytes, and {size} were announced")
        with part.open("ab" if start else "wb") as file:
            for block in response.iter_bytes():
                file.write(block)
                meter.update(len(block))
                if file.tell() > size:
                    raise WrongBytesError(f"it goes on after its {size} bytes")
            file.flush()
            os.fsync(file.fileno())
    if part.stat().st_size < size:
        raise TruncatedAnswerError("the connection ended early")


def with_retries(
    call: Callable[[], T],
    what: str,
    repo: HubRepo,
    retry: Retry,
    stop: threading.Event | None = None,
    reached: Callable[[], int] = lambda: 0,
) -> T:
    """The result of `call`, tried again after failures that may pass.

    Args:
        what: what is fetched, for messages.
        stop: ends the waiting.
        reached: bytes that came so far; more of them start the count of attempts again.

    Raises:
        UserError: a failure that will not pass, or too many of those that might.
        StoppedError: it was stopped.
    """
    stop = stop or threading.Event()
    failures, before = 0, reached()
    while True:
        try:
            return call()
        except (StoppedError, UserError):
            raise
        except Exception as error:
            cause = _cause(error)
            reason = _reason(cause)
            _end_if_final(cause, what, repo, reason)
            failures = 1 if reached() > before else failures + 1
            before = max(before, reached())
            if failures >= retry.attempts:
                raise UserError(
                    f"{what} could not be downloaded in {failures} attempts ({reason}), so the corpus is incomplete; "
                    "look at the connection and at HF_ENDPOINT and run dvc repro again, which keeps what came so far; or set "
                    "download.source to docs or local, which need no network."
                ) from None
            seconds = retry.seconds(failures, _retry_after(cause))
            line = f"{what}: {reason}; attempt {failures + 1} of {retry.attempts} in {seconds:.0f} s\n"
            print(line, end="", flush=True)  # in one piece, since other threads print too
            if stop.wait(seconds):
                raise StoppedError from None


def _cause(error: Exception) -> BaseException:
    """The failure itself, where the client wraps it in advice."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a failure stands for, if it does."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_refusal(error: BaseException) -> bool:
    """Whether a server said no, and would say it again."""
    status = status_of(error)
    return status is not None and (status == 501 or status < 500) and status not in (408, 429)


def _reason(error: BaseException) -> str:
    """A failure in few words."""
    status = status_of(error)
    if status is not None:
        known = status in set(HTTPStatus)
        return f"HTTP {status} {HTTPStatus(status).phrase}" if known else f"HTTP {status}"
    if isinstance(error, WrongBytesError | TruncatedAnswerError | UnexpectedAnswerError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
        return connection_failure(error)
    return f"the proxy answers {error}" if type(error).__name__ == "ProxyError" else type(error).__name__


def _retry_after(error: BaseException) -> float | None:
    """The seconds after which the server wants to be asked again; it may name a date instead."""
    value = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")).strip()
    if value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError, LookupError):  # what the parser makes of something else
        return None


def _end_if_final(error: BaseException, what: str, repo: HubRepo, reason: str) -> None:
    """Raise what another attempt would not change."""
    if flaw := permanent_failure(error) or _refusal(error, repo, reason):
        raise UserError(f"{what} cannot be downloaded ({flaw[0]}): {flaw[1]}.") from None
    if not _may_pass(error):
        raise error


def _refusal(error: BaseException, repo: HubRepo, reason: str) -> tuple[str, str] | None:
    """Why a server will not give it, and what to do; None for a failure that is not a refusal."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError

    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set, and neither the store nor the hub's cache has it"
        return reason, "unset it, or set download.source to docs or local"
    if isinstance(error, UnexpectedAnswerError):
        return reason, (
            f"{shown(endpoint())} does not answer as the hub does, or something on the way answers for it (a proxy, a network "
            "that wants a login first); look at HF_ENDPOINT and at the network"
        )
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return reason, PROXY_REMEDY
    if isinstance(error, GatedRepoError) or status in (401, 403):
        html = _kind(error.response) == "an HTML page"  # type: ignore[attr-defined]
        return reason, (
            "set HF_TOKEN to a token that may read it and accept the terms on the repository's page; the hub says the "
            "same of a repository that does not exist, so look at download.repo too"
            + (". The answer is an HTML page, as a proxy gives: it may be the proxy that refuses" if html else "")
        )
    if isinstance(error, RevisionNotFoundError):
        return reason, f"download.revision does not exist in this repository; {_known_revisions(repo)}"
    mirror = "and at HF_ENDPOINT if it is a mirror's"
    if isinstance(error, EntryNotFoundError):
        return reason, f"this revision has no such folder or file; look at download.folder, {mirror}"
    if status == HTTPStatus.NOT_FOUND:
        return reason, f"the hub does not know this repository; look at download.repo, {mirror}"
    return (reason, "asking again would not help") if is_refusal(error) else None


def _known_revisions(repo: HubRepo) -> str:
    """The commits that a repository's branches and tags stand at, if the hub tells."""
    try:
        with _get(repo.api_url("refs"), {}) as response:
            response.read()
            refs = [ref for kind in ("branches", "tags") for ref in response.json().get(kind, [])]
        known = ", ".join(f"{ref['targetCommit']} ({ref['name']})" for ref in refs[:5])
    except Exception:  # an error about an error helps nobody
        known = ""
    return f"there are {known}" if known else "the repository's page lists the commits under 'History'"


def _may_pass(error: BaseException) -> bool:
    """Whether a failure that is no answer of the hub may pass: the connection, or bytes that came wrong."""
    import httpx2

    if isinstance(error, OSError) and error.errno is not None:
        return isinstance(error, ConnectionError | TimeoutError)  # not a full disk, not a missing permission
    return isinstance(error, httpx2.HTTPError | OSError | WrongBytesError | TruncatedAnswerError)
