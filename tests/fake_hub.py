"""A hub on 127.0.0.1 that speaks what we need of the hub's HTTP, gives files and takes models, and misbehaves on demand."""

import base64
import hashlib
import json
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

ServeFault = Callable[["Handler", bytes], None]
"""Sends a body, or what comes instead of it, after the headers."""


@dataclass(frozen=True)
class Answer:
    """An answer of any kind."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(repr=False)
class FakeHub:
    """One repository with one commit to download, and any number to upload to.

    Use it in a `with` block; `url` is its HF_ENDPOINT.
    """

    repo: str = ""
    revision: str = "a" * 40
    files: dict[str, bytes] = field(default_factory=dict)
    """Content by path, as the list says it."""
    kind: str = "dataset"
    served: dict[str, bytes] = field(default_factory=dict)
    """What GETs give of some files instead."""
    vanished: set[str] = field(default_factory=set)
    """Files that the list names and a GET does not find."""
    lists_broken: list[int] = field(default_factory=list)
    """Statuses that the next requests for a list get; 0 for no answer at all."""
    failures: list[int] = field(default_factory=list)
    """Statuses that the next GETs of files get instead of an answer, in this order."""
    retry_after: str = ""
    """The header of the same name that goes with `failures`."""
    faults: list[ServeFault] = field(default_factory=list)
    """How the bodies of the next GETs of files go wrong."""
    knows_ranges: bool = True
    page: int = 1000
    """Entries of a list that one answer has."""
    next_at: str | None = None
    """Where the header `Link` says that the next page is, instead of at this hub; with an empty one there is no header."""
    listed: Answer | None = None
    """What a request for a list gets instead of the list."""
    named: Answer | None = None
    """What a request for the names of all files gets instead of them."""
    token: str = ""
    """If set, the token without which nothing is given."""
    redirect: str = ""
    """If set, where the files are."""
    certificate: Path | None = None
    """Of the server, and its key, in PEM; with it, the hub speaks TLS."""
    requests: list[str] = field(default_factory=list)
    """Every request so far: method and path, and `in part` for the end of a file."""
    starts: list[int] = field(default_factory=list)
    """The first byte that each GET of a file asked for."""
    authorized: list[bool] = field(default_factory=list)
    """Whether each request carried a token."""
    sent: int = 0
    """Bytes of files so far, without `peeked`."""
    peeked: list[int] = field(default_factory=list)
    """Bytes that each request for the end of a file asked for."""
    uploaded: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """What was committed: content by path, by repository."""
    private: dict[str, bool] = field(default_factory=dict)
    """Whether each repository that was made is private."""
    commit_status: int = 0
    """The status that a commit gets instead of an answer, if any."""
    page_for_uploads: bytes | None = None
    """A page of HTML that every request of an upload gets instead of an answer, with status 200."""
    large: dict[str, bytes] = field(default_factory=dict)
    """What came by LFS, by its SHA-256."""

    def __repr__(self) -> str:
        return f"<a hub with {sorted(self.files)}>"

    def __enter__(self) -> Self:
        hub = self

        class ThisHandler(Handler):
            def __init__(self, *arguments: object) -> None:
                self.hub = hub
                super().__init__(*arguments)  # type: ignore[arg-type]

        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHandler)
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self._server.server_address[1]}"

    def gets(self, path: str = "") -> list[str]:
        """The GET requests for whole files, or the rest of them, so far, whose path ends with `path`."""
        files = [line for line in self.requests if line.startswith("GET") and "/resolve/" in line]
        return [line for line in files if line.endswith(path) and not line.endswith(" in part")]


def cut(after: int) -> ServeFault:
    """The connection ends after so many bytes."""

    def serve(handler: "Handler", body: bytes) -> None:
        handler.send_file(body[:after])

    return serve


def stall(after: int) -> ServeFault:
    """Nothing more comes after so many bytes."""

    def serve(handler: "Handler", body: bytes) -> None:
        handler.send_file(body[:after])
        handler.wfile.flush()
        handler.hub.closing.wait()

    return serve


def flip(handler: "Handler", body: bytes) -> None:
    """One bit is wrong."""
    handler.send_file(body[:50] + bytes([body[50] ^ 1]) + body[51:])


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: FakeHub

    def do_HEAD(self) -> None:
        """What the client's own download asks first."""
        self._route(body=False)

    def do_GET(self) -> None:
        """Lists, refs and files."""
        self._route(body=True)

    def do_PUT(self) -> None:
        """A large file; its address is its permission."""
        self.hub.large[self.path.rsplit("/", 1)[1]] = self._body()
        self._send_json({}, {})

    def do_POST(self) -> None:
        """Make a repository, ask how files come, commit them."""
        body, path = self._body(), self.path.partition("?")[0]
        if self.hub.page_for_uploads is not None:
            self._send_answer(Answer(self.hub.page_for_uploads, "text/html"))
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send_error("Invalid username or password.", 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []}, {})
        elif "/preupload/" in path:
            modes = {False: "regular", True: "lfs"}
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [
                {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in names
            ]
            self._send_json({"files": files}, {})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self._send_json({"transfer": "basic", "objects": objects}, {})
        elif self.hub.commit_status:
            self._send_error(f"no write access, {self.hub.token}", self.hub.commit_status)
        else:
            self._commit("/".join(path.split("/")[3:5]), body)

    def _create(self, asked: dict[str, str]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        self.hub.private.setdefault(name, asked.get("visibility") == "private")
        self.hub.uploaded.setdefault(name, {})
        self._send_json({"url": f"{self.hub.url}/{name}"}, {})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.uploaded[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.uploaded[repo][value["path"]] = self.hub.large[value["oid"]]
        self._send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40}, {})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def send_file(self, body: bytes) -> None:
        """Send bytes of a file."""
        self.hub.sent += len(body)
        self.wfile.write(body)

    def _route(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}{' in part' if self._asked_end() else ''}")
        self.hub.authorized.append("Authorization" in self.headers)
        api = f"/api/{self.hub.kind}s/{self.hub.repo}"
        resolve = f"{'/datasets' if self.hub.kind == 'dataset' else ''}/{self.hub.repo}/resolve/"
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "")
        elif path.startswith(f"{api}/tree/"):
            self._tree(*_split(path.removeprefix(f"{api}/tree/")))
        elif path == f"{api}/revision/{self.hub.revision}":
            siblings = [{"rfilename": name} for name in self.hub.files]
            names = json.dumps({"id": self.hub.repo, "sha": self.hub.revision, "siblings": siblings})
            self._send_answer(self.hub.named or Answer(names.encode()))
        elif path == f"{api}/refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.hub.revision}
            self._send_json({"branches": [branch], "tags": [], "converts": []}, {})
        elif path.startswith(resolve):
            self._file(*_split(path.removeprefix(resolve)), body)
        else:
            self._refuse(404, "RepoNotFound")

    def _tree(self, revision: str, folder: str) -> None:
        if self.hub.lists_broken:
            status = self.hub.lists_broken.pop(0)
            if status:
                self._refuse(status, "")
            else:
                self.hub.closing.wait()
            return
        if self.hub.listed:
            self._send_answer(self.hub.listed)
            return
        if revision != self.hub.revision:
            self._refuse(404, "RevisionNotFound")
            return
        query = parse_qs(urlsplit(self.path).query)
        inside = [name for name in self.hub.files if name.startswith(f"{folder}/" if folder else "")]
        if not inside:
            self._refuse(404, "EntryNotFound")
            return
        names = inside if "recursive" in query else [name for name in inside if name.rpartition("/")[0] == folder]
        first = int(query.get("cursor", ["0"])[0])
        last = first + self.hub.page
        host = self.hub.url if self.hub.next_at is None else self.hub.next_at
        recursive = "recursive=true&" if "recursive" in query else ""
        following = f'<{host}{urlsplit(self.path).path}?{recursive}cursor={last}>; rel="next"'
        entries = [entry_of(name, self.hub.files[name]) for name in names[first:last]]
        if len(names) < len(inside) or "recursive" in query:
            entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f"{folder}/below".strip("/")}]
        self._send_json(entries, {"Link": following} if host and last < len(names) else {})

    def _file(self, revision: str, name: str, body: bool) -> None:
        if revision != self.hub.revision or name not in self.hub.files or name in self.hub.vanished:
            self._refuse(404, "EntryNotFound" if revision == self.hub.revision else "RevisionNotFound")
            return
        if self.hub.redirect:
            self.send_response(302)
            self.send_header("Location", self.hub.redirect + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.hub.served.get(name, self.hub.files[name])
        end = self._asked_end()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if end:
            self.hub.peeked.append(end + 1 - start)
            self._send_part(content, start, end)
            return
        if body:
            self.hub.starts.append(start)
        if body and self.hub.failures:
            self._refuse(self.hub.failures.pop(0), "")
        elif self.hub.knows_ranges and start >= len(content):
            self._refuse(416, "")
        else:
            self._send_content(content, start if self.hub.knows_ranges else 0, body, name)

    def _asked_end(self) -> int:
        """The last byte that the request asks for; 0 if all to the end is wanted."""
        return int(self.headers.get("Range", "").partition("-")[2] or 0)

    def _send_part(self, content: bytes, start: int, end: int) -> None:
        part = content[start : end + 1] if self.hub.knows_ranges else content
        self.send_response(206 if self.hub.knows_ranges else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        with suppress(ConnectionError):  # who wanted a part does not wait for the whole
            self.wfile.write(part)

    def _send_content(self, content: bytes, start: int, body: bool, name: str) -> None:
        sha256 = hashlib.sha256(self.hub.files[name]).hexdigest()
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", self.hub.revision)
        self.send_header("ETag", f'"{sha256}"')
        self.send_header("X-Linked-ETag", f'"{sha256}"')
        self.send_header("X-Linked-Size", str(len(content)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body and self.hub.faults:
            self.hub.faults.pop(0)(self, rest)
        elif body:
            self.send_file(rest)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        if self.hub.retry_after:
            self.send_header("Retry-After", self.hub.retry_after)
        self.end_headers()

    def _send_error(self, message: str, status: int) -> None:
        self._send_answer(Answer(json.dumps({"error": message}).encode(), status=status))

    def _send_json(self, value: object, headers: dict[str, str]) -> None:
        self._send_answer(Answer(json.dumps(value).encode(), headers=headers))

    def _send_answer(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, text in {"Content-Type": answer.content_type, **answer.headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)


def _split(path: str) -> tuple[str, str]:
    revision, _, rest = path.partition("/")
    return revision, rest


def entry_of(name: str, content: bytes) -> dict[str, object]:
    """What a list says of a file."""
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "oid": oid, "size": len(content), "path": name, "lfs": lfs}
