"""The answer to one request: its texts while they are written, and their form in JSON, whole or in pieces."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from pipelib.model.generate import at_strings
from pipelib.serving.engine import Drawn, Engine, Writing
from pipelib.serving.requests import Asked
from pipelib.serving.transcript import Transcript

Json = dict[str, object]


@dataclass(frozen=True)
class Piece:
    """What one token adds to one of the texts."""

    index: int
    """Of the choice."""
    text: str
    drawn: Drawn | None
    """None for what was left when the text ended."""
    finished: str
    """Why the text has ended; empty before."""


@dataclass
class Choice:
    """One text, as far as it is written."""

    transcript: Transcript
    text: str = ""
    drawn: list[Drawn] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where in the text each token begins."""
    finished: str = ""


class Answer:
    """The texts of one request. `close` has to be called, whatever happens: nobody waits for them then."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        """Begin.

        Raises:
            BusyError: too many texts wait.
            ClosedError: the server ends.
        """
        self.engine, self.asked = engine, asked
        self.id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        served = engine.served
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        self.choices = [Choice(Transcript(served.tokenizer, asked.stop)) for _ in prompts]
        self._events: asyncio.Queue[tuple[int, Drawn | str | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        stops = served.template.stop_token_ids if served.template else [served.tokenizer.end_token_id]
        ends = at_strings(served.tokenizer, asked.stop) if asked.stop else None
        self._writings = [
            Writing(
                list(prompt), asked.tokens, asked.sampling, torch.Generator().manual_seed(asked.seed + number), stops, ends,
                tell=self._teller(number), likeliest=asked.likeliest,
            )
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip
        engine.submit(self._writings)

    def _teller(self, number: int) -> Callable[[Drawn | str | Exception], None]:
        """What the engine's thread calls."""

        def tell(event: Drawn | str | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return tell

    def close(self) -> None:
        """Write no more."""
        for writing in self._writings:
            writing.cancelled = True

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is written, token by token, until all texts have ended.

        Raises:
            Exception: what kept the engine from writing.
        """
        unfinished = len(self.choices)
        while unfinished:
            index, event = await self._events.get()
            choice = self.choices[index]
            if isinstance(event, Exception):
                raise event
            drawn = event if isinstance(event, Drawn) else None
            if isinstance(event, Drawn):
                text, finished = choice.transcript.add(event.token_id), ""
                choice.offsets.append(len(choice.text))
                choice.drawn.append(event)
            else:
                text, finished = choice.transcript.end(), event
                choice.finished, unfinished = finished, unfinished - 1
            choice.text += text
            yield Piece(index, text, drawn, finished)

    # ---- JSON --------------------------------------------------------------------------------------------------------

    async def whole(self) -> Json:
        """The answer at once, when all of it is written."""
        async for _ in self.pieces():
            pass
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        choices = [self._choice(number, choice) for number, choice in enumerate(self.choices)]
        return {**self._head(kind), "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[Json]:
        """The answer in pieces, in the form of OpenAI's server-sent events."""
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        head = self._head(kind) | ({"usage": None} if self.asked.include_usage else {})
        if self.asked.is_chat:
            for number in range(len(self.choices)):
                yield {**head, "choices": [_chunk(number, {"delta": {"role": "assistant", "content": ""}}, None, "")]}
        async for piece in self.pieces():
            body: Json = (
                {"delta": {"content": piece.text} if piece.text else {}} if self.asked.is_chat else {"text": piece.text}
            )
            logprobs = None
            if piece.drawn and self.asked.likeliest is not None:
                logprobs = self._logprobs([piece.drawn], self.choices[piece.index].offsets[-1:])
            if piece.text or piece.finished or logprobs:
                yield {**head, "choices": [_chunk(piece.index, body, logprobs, piece.finished)]}
        if self.asked.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.engine.served.name}

    def _choice(self, number: int, choice: Choice) -> Json:
        body: Json = {"text": choice.text}
        if self.asked.is_chat:
            body = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        logprobs = None if self.asked.likeliest is None else self._logprobs(choice.drawn, choice.offsets)
        return _chunk(number, body, logprobs, choice.finished)

    def _usage(self) -> Json:
        prompt = sum(map(len, self.asked.prompts))
        written = sum(len(choice.drawn) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _logprobs(self, tokens: list[Drawn], offsets: list[int]) -> Json:
        """The logarithms of probabilities, in the form of the endpoint."""
        if self.asked.is_chat:
            return {
                "content": [
                    {
                        **self._token(drawn.token_id, drawn.logprob),
                        "top_logprobs": [self._token(*likely) for likely in drawn.likeliest],
                    }
                    for drawn in tokens
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._text(drawn.token_id) for drawn in tokens],
            "token_logprobs": [drawn.logprob for drawn in tokens],
            "top_logprobs": [{self._text(token): value for token, value in drawn.likeliest} for drawn in tokens],
            "text_offset": offsets,
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(self._bytes(token_id))}

    def _text(self, token_id: int) -> str:
        """The text of a token; `bytes:\\xe2` for a part of a character, as OpenAI writes it."""
        content = self._bytes(token_id)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _bytes(self, token_id: int) -> bytes:
        return self.engine.served.tokenizer.decode_bytes([token_id])


def _chunk(index: int, body: Json, logprobs: Json | None, finished: str) -> Json:
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": finished or None}
