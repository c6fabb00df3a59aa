"""The server: OpenAI's endpoints over the engines, and the page."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from importlib import resources
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipelib.serving.answer import Answer
from pipelib.serving.engine import BusyError, ClosedError, Engine, Served
from pipelib.serving.requests import ApiError, Asked, read_chat, read_completion

MAX_BODY = 1 << 20
"""Bytes of a request's body."""
BODY_SECONDS = 10
"""How long a client may take to send it."""
OPEN = ("/", "/health")
"""Paths that need no key."""
LOCAL = ("127.0.0.1", "localhost", "::1")
PAGE_RULES = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: nothing with another host."""

Endpoint = Callable[[Request], Awaitable[Response]]


class Server:
    """The endpoints for some models.

    Args:
        engines: by the name that clients use; the first is for requests that name none.
        api_key: what clients have to send; empty for nothing.
        is_local: only clients on this machine can connect. Then a page of another site must not either, even if its name leads
            to this machine, so the name of the host is checked.
    """

    def __init__(self, engines: Mapping[str, Engine], *, api_key: str = "", is_local: bool = True) -> None:
        self.engines, self._api_key, self._is_local = engines, api_key, is_local
        self._page = (resources.files("pipelib.serving") / "page.html").read_text(encoding="utf-8")

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/", self._guarded(self.page)),
                Route("/health", self._guarded(self.health)),
                Route("/v1/models", self._guarded(self.models)),
                Route("/v1/models/{name:path}", self._guarded(self.model)),
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            ],
            exception_handlers={
                ApiError: lambda _, error: _json_error(error),
                HTTPException: lambda _, error: _json_error(ApiError(error.status_code, f"{error.detail}.")),
                Exception: lambda _, error: _json_error(ApiError(500, str(error) or type(error).__name__)),
            },
        )

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint for those who may use it."""

        async def guarded(request: Request) -> Response:
            name = _host_name(request.headers.get("host", ""))
            if self._is_local and name not in LOCAL:
                raise ApiError(
                    403, f"the host {name!r} is not this machine; use 127.0.0.1, or start the server with --host."
                )
            if self._api_key and request.scope["path"] not in OPEN:
                sent = request.headers.get("authorization", "").removeprefix("Bearer ")
                if not secrets.compare_digest(sent.encode("latin-1"), self._api_key.encode()):
                    raise ApiError(
                        401,
                        "the API key is missing or wrong; send the server's as a bearer token.",
                        code="invalid_api_key",
                    )
            return await endpoint(request)

        return guarded

    # ---- Endpoints ---------------------------------------------------------------------------------------------------

    async def page(self, _: Request) -> Response:
        """The page for the browser."""
        return HTMLResponse(
            self._page, headers={"content-security-policy": PAGE_RULES, "x-content-type-options": "nosniff"}
        )

    async def health(self, _: Request) -> Response:
        """Whether the server is up, and how busy its engines are."""
        engines = {
            name: dict(zip(("writing", "waiting"), engine.busy, strict=True)) for name, engine in self.engines.items()
        }
        ended = [name for name, engine in self.engines.items() if engine.is_closed]
        body = {"status": f"{', '.join(ended)} ended" if ended else "ok", "models": engines}
        return JSONResponse(body, status_code=503 if ended else 200)

    async def models(self, _: Request) -> Response:
        """List the models."""
        return JSONResponse({"object": "list", "data": [_model(engine.served) for engine in self.engines.values()]})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        return JSONResponse(_model(self._engine(request.path_params["name"]).served))

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._respond(request, read_completion)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._respond(request, read_chat)

    async def _respond(self, request: Request, read: Callable[[object, Served], Asked]) -> Response:
        body = await _read_json(request)
        engine = self._engine(body.get("model") if isinstance(body, Mapping) else None)
        asked = await asyncio.to_thread(read, body, engine.served)  # a long prompt takes a while to encode
        if (count := len(asked.prompts) * asked.n) > engine.slots + engine.queue:
            raise ApiError(
                400, f"{count} texts in one request, and the server holds {engine.slots + engine.queue}; ask for fewer."
            )
        try:
            answer = Answer(engine, asked)
        except BusyError:
            raise ApiError(
                429, f"{engine.queue} texts wait already; try again in a moment.", code="queue_full"
            ) from None
        except ClosedError:
            raise ApiError(503, "the server ends.") from None
        if asked.stream:
            return EventStream(answer)
        try:
            return JSONResponse(await _while_connected(request, answer))
        finally:
            answer.close()

    def _engine(self, name: object) -> Engine:
        if name is None:
            return next(iter(self.engines.values()))
        if not isinstance(name, str) or name not in self.engines:
            raise ApiError(
                404,
                f"there is no model {name!r}; there is {', '.join(self.engines)}.",
                param="model",
                code="model_not_found",
            )
        return self.engines[name]


class EventStream(StreamingResponse):
    """An answer in server-sent events. It ends when the client leaves."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(_events(answer), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            with suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _events(answer: Answer) -> AsyncIterator[str]:
    try:
        async for chunk in answer.chunks():
            yield f"data: {json.dumps(chunk, allow_nan=False)}\n\n"
    except ClosedError:
        yield f"data: {json.dumps(ApiError(503, 'the server ends.').body)}\n\n"
    except Exception as error:  # the status has been sent
        yield f"data: {json.dumps(ApiError(500, str(error)).body)}\n\n"
    yield "data: [DONE]\n\n"


async def _while_connected(request: Request, answer: Answer) -> object:
    """The whole answer; nothing of use if the client has left."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole, leaving = asyncio.create_task(answer.whole()), asyncio.create_task(gone())
    try:
        await asyncio.wait({whole, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise ApiError(499, "the client has left.")
        return whole.result()
    except ClosedError:
        raise ApiError(503, "the server ends.") from None
    except ApiError:
        raise
    except Exception as error:  # an error that is not an ApiError would be printed as a crash of the server
        raise ApiError(500, str(error) or type(error).__name__) from None
    finally:
        for task in (whole, leaving):
            task.cancel()


async def _read_json(request: Request) -> object:
    """The body of a request.

    Raises:
        ApiError: it is no JSON, too large, or too slow.
    """
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise ApiError(415, "the body has to be JSON; send the header content-type: application/json.")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MAX_BODY:
                    raise ApiError(413, f"the body has more than {MAX_BODY:,} bytes; send less.")
    except ClientDisconnect:
        raise ApiError(499, "the client has left.") from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s; send it at once.") from None
    try:
        body: object = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()  # half of a character that takes two (\\ud800) is not text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error}).") from None
    return body


def _host_name(host: str) -> str:
    """The name in the header `host`, without its port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _model(served: Served) -> dict[str, object]:
    return {
        "id": served.name, "object": "model", "created": 0, "owned_by": "pipelib", "title": served.model.params.title,
        "context_length": served.context_length, "has_chat_template": served.template is not None,
    }  # fmt: skip


def _json_error(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, status_code=error.status, headers=headers)
