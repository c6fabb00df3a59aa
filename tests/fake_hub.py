"""A hub on 127.0.0.1 that speaks what the real client needs of the hub's HTTP, and misbehaves on demand."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """One dataset repository with one commit. Use it in a `with` block; `url` is its HF_ENDPOINT."""

    repo: str
    revision: str
    files: dict[str, bytes]
    """Content by path."""
    failures: list[int] = field(default_factory=list)
    """Statuses that the next GETs of files get instead of an answer, in this order."""
    flips: int = 0
    """How many further GETs of files get one wrong bit."""
    token: str = ""
    """If set, the token without which nothing is given."""
    requests: list[str] = field(default_factory=list)
    """Every request so far: method and path."""

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments: object) -> None:
                self.hub = hub
                super().__init__(*arguments)  # type: ignore[arg-type]

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def gets(self, path: str = "") -> list[str]:
        """The GET requests for files so far whose path ends with `path`."""
        return [
            line for line in self.requests if line.startswith("GET") and "/resolve/" in line and line.endswith(path)
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._route(body=False)

    def do_GET(self) -> None:
        self._route(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _route(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        tree, resolve = f"/api/datasets/{self.hub.repo}/tree/", f"/datasets/{self.hub.repo}/resolve/"
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "")
        elif path.startswith(tree):
            self._tree(*_split(path.removeprefix(tree)))
        elif path.startswith(resolve):
            self._file(*_split(path.removeprefix(resolve)), body)
        else:
            self._refuse(404, "RepoNotFound")

    def _tree(self, revision: str, folder: str) -> None:
        if revision != self.hub.revision:
            self._refuse(404, "RevisionNotFound")
            return
        names = [name for name in self.hub.files if name.rpartition("/")[0] == folder]
        if not names:
            self._refuse(404, "EntryNotFound")
            return
        self._send(json.dumps([_entry(name, self.hub.files[name]) for name in names]).encode(), True, {})

    def _file(self, revision: str, name: str, body: bool) -> None:
        if revision != self.hub.revision or name not in self.hub.files:
            self._refuse(404, "EntryNotFound" if revision == self.hub.revision else "RevisionNotFound")
            return
        content = self.hub.files[name]
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": revision, "ETag": f'"{sha256}"', "X-Linked-ETag": f'"{sha256}"'}
        if body and self.hub.failures:
            self._refuse(self.hub.failures.pop(0), "")
            return
        if body and self.hub.flips:
            self.hub.flips -= 1
            content = content[:50] + bytes([content[50] ^ 1]) + content[51:]
        self._send(content, body, {**headers, "X-Linked-Size": str(len(content))})

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _split(path: str) -> tuple[str, str]:
    revision, _, rest = path.partition("/")
    return revision, rest


def _entry(name: str, content: bytes) -> dict[str, object]:
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name, "lfs": lfs}
