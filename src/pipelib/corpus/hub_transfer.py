"""Download one file or list from the Hugging Face hub, with retries.

Every attempt is one request of the client library's own session, so its token, endpoint and offline mode apply, and only
the loop here decides what is retried. The library's own downloads are not suitable: they retry internally (up to six
requests for one call), accept only whole seconds in Retry-After, wait forever for a list, and restart a file after a kill,
because their partial files have random names.

Messages name a file, its repository and the status. They contain no header, and no URL but the endpoint, because those can
contain secrets.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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

# The hub's client reads these when it is imported, and other packages (`datasets`) import it too, so set them here.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it costs a request
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings contain URLs, and the messages here say what matters


NOT_NEEDED = (
    "change section download so that it is not needed (source: docs or local; no benchmark, model or conversations from "
    "the hub)"
)
"""The remedy for files of the hub that cannot be downloaded."""


@dataclass(frozen=True)
class HubRepo:
    """A repository of the hub, at a commit."""

    name: str
    """OWNER/NAME."""
    revision: str
    """The commit, 40 hexadecimal digits."""
    kind: Literal["dataset", "model"] = "dataset"
    section: str = field(default="download", compare=False)
    """The section of params.yaml that names it, for messages."""

    def file_url(self, path: str) -> str:
        """Return the URL of a file."""
        url: str = client().hf_hub_url(
            self.name, path, repo_type=self.kind, revision=self.revision, endpoint=endpoint()
        )
        return url

    def api_url(self, path: str) -> str:
        """Return the URL of an API call about this repository."""
        return f"{endpoint()}/api/{self.kind}s/{quote(self.name)}/{path}"


@dataclass(frozen=True)
class Retry:
    """How often to try, and how long to wait in between."""

    attempts: int = 8
    """Failed attempts in a row before giving up. An attempt that received new bytes resets the count."""
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled for each further attempt, and varied randomly by up to a half."""
    max_wait: float = 60.0
    """Limit of these seconds, before they are varied, and of the server's Retry-After."""

    def seconds(self, attempt: int, retry_after: float | None) -> float:
        """Return how long to wait after failed attempt number `attempt`, counted from 1.

        Args:
            retry_after: the seconds that the server asks for; None if it does not.
        """
        if retry_after is not None:
            return min(retry_after, self.max_wait)
        return float(min(self.first_wait * 2 ** (attempt - 1), self.max_wait) * random.uniform(0.5, 1.5))


DEFAULT_RETRY = Retry()
"""Waits about two minutes in total before it gives up on a hub that does not answer."""


class WrongBytesError(Exception):
    """The received bytes or their number differ from the hub's list."""


class TruncatedAnswerError(Exception):
    """The answer ended early."""


class UnexpectedAnswerError(Exception):
    """An answer that the hub would not send: an HTML page, JSON of another form, an incomplete list."""


class StoppedError(Exception):
    """The download was stopped: another file failed permanently, or the user stopped the run."""


class Meter:
    """Adds one file's bytes to the progress of all files, and stops the download on request.

    For the client's own downloads it acts as the class of a progress bar.
    """

    def __init__(self, progress: Progress, stop: threading.Event, position: int = 0) -> None:
        """Args:
        position: bytes of the file that an earlier run downloaded; `progress` already counts them.
        """
        self._progress, self._stop = progress, stop
        self._position = self.highest = position

    def update(self, count: int) -> None:
        """Count received bytes.

        Raises:
            StoppedError: the download is to stop.
        """
        if self._stop.is_set():
            raise StoppedError
        self._position += count
        self.highest = max(self.highest, self._position)
        self._progress.add(count)

    def restart(self) -> None:
        """Reset the count, because the file starts again."""
        self._progress.add(-self._position)
        self._position = 0

    def __call__(self, **_: Any) -> Self:
        """Return itself: the client calls this as the class of a progress bar."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _get(url: str, more: Mapping[str, str]) -> Iterator[Any]:
    """Stream the hub's answer to one request. Raise an error unless the request succeeded.

    Args:
        more: headers in addition to the client's own.
    """
    with session().stream("GET", url, headers={**headers(), **more}, timeout=timeout()) as response:
        _raise_for_status(response)
        if response.status_code not in (
            HTTPStatus.OK,
            HTTPStatus.PARTIAL_CONTENT,
        ):  # for example a redirect without a target
            raise UnexpectedAnswerError(f"HTTP {response.status_code}")
        yield response


def _raise_for_status(response: Any) -> None:
    """Raise an error for an error status: the client's own, unless the client fails on a body that is not the hub's."""
    import httpx2

    try:
        client().hf_raise_for_status(response)
    except httpx2.HTTPError:
        raise
    except Exception:
        response.raise_for_status()


def get_list(url: str) -> list[Any]:
    """Return all entries that the hub's API lists, from all pages.

    Every page is requested from the same address. A mirror may pass on links to the hub itself, but the token must not go
    to another host.
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
        if following and (not page or following in asked):  # a broken mirror could keep us here forever
            raise UnexpectedAnswerError("its pages do not end")
        entries += page
    return entries


def get_json(url: str) -> Any:
    """Return the JSON that the hub's API sends."""
    with _get(url, {}) as response:
        return _read_json(response)


def _read_json(response: Any) -> Any:
    response.read()
    try:
        return response.json()
    except (ValueError, RecursionError):
        # It began as JSON, so the connection broke: retry. Anything else is not the hub's answer: do not retry.
        if response.content.lstrip()[:1] in (b"[", b"{"):
            raise TruncatedAnswerError("its JSON is damaged or ended early") from None
        raise UnexpectedAnswerError(f"{_content_type(response)} instead of JSON") from None


def _content_type(response: Any) -> str:
    """Describe the type of a body, as its header gives it."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if kind == "text/html":
        return "an HTML page"
    return kind if kind.isprintable() and 0 < len(kind) < 40 else "something"


def _next_page(url: str, response: Any) -> str | None:
    """Return the address of the next page, on the address of the first one; None if there is none."""
    link = response.links.get("next", {}).get("url")
    if link is None:
        return None
    try:
        return f"{url}?{urlsplit(link).query}"
    except ValueError:
        raise UnexpectedAnswerError("the address of its next page is damaged") from None


def read_tail(url: str, size: int, count: int) -> bytes | None:
    """Get the last `count` bytes of a file of `size` bytes with one request; None if the server sends something else."""
    try:
        # identity, because ranges do not work with a compressed answer
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
    """Complete a partial file with one request, starting at the byte where it ends.

    Args:
        part: the partial file, which need not exist. Received bytes stay in it even if the request fails.
        size: bytes of the whole file.

    Raises:
        WrongBytesError: the hub's file has another size.
        TruncatedAnswerError: the answer ended early.
    """
    start = part.stat().st_size if part.exists() else 0
    if start == size:
        return
    # identity, because ranges do not work with a compressed answer
    more = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    with _get(url, more) as response:
        if _content_type(response) == "an HTML page":  # the login page of a network, for example, with status 200
            raise UnexpectedAnswerError("an HTML page instead of the file")
        if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:  # a server without ranges sends the whole file
            meter.restart()
            start = 0
        announced = response.headers.get("Content-Length", str(size - start))
        if announced != str(size - start):
            actual = start + int(announced) if announced.isdecimal() else "unknown"
            raise WrongBytesError(f"its size is {actual} bytes, and the hub's list says {size}")
        with part.open("ab" if start else "wb") as file:
            for block in response.iter_bytes():
                file.write(block)
                meter.update(len(block))
                if file.tell() > size:
                    raise WrongBytesError(f"it is longer than the {size} bytes in the hub's list")
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
    """Return the result of `call`, and retry it after temporary failures.

    Args:
        what: the thing that is downloaded, for messages.
        stop: ends the waiting between attempts.
        reached: returns the bytes received so far. New bytes reset the count of failed attempts.

    Raises:
        UserError: a permanent failure, or too many temporary ones.
        StoppedError: `stop` was set.
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
            _raise_if_permanent(cause, what, repo, reason)
            # A slow connection that breaks often may still finish, as long as each attempt makes progress.
            failures = 1 if reached() > before else failures + 1
            before = max(before, reached())
            if failures >= retry.attempts:
                raise UserError(
                    f"{what} could not be downloaded in {failures} attempts ({reason}), so the stage stopped; check "
                    "the connection and HF_ENDPOINT, and run dvc repro again, which resumes the download; or "
                    f"{NOT_NEEDED}."
                ) from None
            seconds = retry.seconds(failures, _retry_after(cause))
            line = f"{what}: {reason}; attempt {failures + 1} of {retry.attempts} in {seconds:.0f} s\n"
            print(line, end="", flush=True)  # one write for the whole line, because other threads print too
            if stop.wait(seconds):
                raise StoppedError from None


def _cause(error: Exception) -> BaseException:
    """Return the failure itself if the client wrapped it in another error."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of a failure; None if it has none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_refusal(error: BaseException) -> bool:
    """Return whether a server refused the request and would refuse it again."""
    status = status_of(error)
    return status is not None and (status == 501 or status < 500) and status not in (408, 429)


def _reason(error: BaseException) -> str:
    """Describe a failure in a few words."""
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
    """Return the seconds that the server asks to wait before the next attempt; it may give a date instead."""
    value = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")).strip()
    if value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError, TypeError, LookupError):  # the parser raises these for an invalid date
        return None


def _raise_if_permanent(error: BaseException, what: str, repo: HubRepo, reason: str) -> None:
    """Raise an error if a retry cannot help."""
    if flaw := permanent_failure(error) or _refusal(error, repo, reason):
        raise UserError(f"{what} cannot be downloaded ({flaw[0]}): {flaw[1]}.") from None
    if not _is_temporary(error):
        raise error


def _refusal(error: BaseException, repo: HubRepo, reason: str) -> tuple[str, str] | None:
    """Return why a server refused, and the remedy; None if the failure is not a refusal."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError

    status = status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set, and neither the store nor the hub's cache has it"
        return reason, f"unset HF_HUB_OFFLINE, or {NOT_NEEDED}"
    if isinstance(error, UnexpectedAnswerError):
        return reason, (
            f"{shown(endpoint())} does not answer as the hub does, or something on the way answers instead (a proxy, a network "
            "that requires a login first); check HF_ENDPOINT and the network"
        )
    # The order matters: the client's error classes are more specific than their statuses.
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return reason, PROXY_REMEDY
    if isinstance(error, GatedRepoError) or status in (401, 403):
        html = _content_type(error.response) == "an HTML page"  # type: ignore[attr-defined]
        return reason, (
            "set HF_TOKEN to a token that may read it and accept the terms on the repository's page; the hub gives the "
            f"same answer for a repository that does not exist, so check {repo.section}.repo too"
            + (". The answer is an HTML page, as proxies send: perhaps a proxy refuses, not the hub" if html else "")
        )
    if isinstance(error, RevisionNotFoundError):
        return reason, f"{repo.section}.revision does not exist in this repository; {_known_revisions(repo)}"
    mirror = "and HF_ENDPOINT if you use a mirror"
    if isinstance(error, EntryNotFoundError):
        return reason, f"this revision has no such folder or file; check {repo.section}.folder, {mirror}"
    if status == HTTPStatus.NOT_FOUND:
        return reason, f"the hub does not know this repository; check {repo.section}.repo, {mirror}"
    return (reason, "a retry would not help") if is_refusal(error) else None


def _known_revisions(repo: HubRepo) -> str:
    """Name the commits of a repository's branches and tags, if the hub lists them."""
    try:
        with _get(repo.api_url("refs"), {}) as response:
            response.read()
            refs = [ref for kind in ("branches", "tags") for ref in response.json().get(kind, [])]
        known = ", ".join(f"{ref['targetCommit']} ({ref['name']})" for ref in refs[:5])
    except Exception:  # the list is only a hint, so do not hide the first error behind a second one
        known = ""
    return f"there are {known}" if known else "the repository's page lists the commits under 'History'"


def _is_temporary(error: BaseException) -> bool:
    """Return whether a failure is temporary: a problem of the connection, or wrong bytes."""
    import httpx2

    if isinstance(error, OSError) and error.errno is not None:
        return isinstance(error, ConnectionError | TimeoutError)  # not a full disk, not a missing permission
    return isinstance(error, httpx2.HTTPError | OSError | WrongBytesError | TruncatedAnswerError)
