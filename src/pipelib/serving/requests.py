"""What a client may ask, in the form of OpenAI's endpoints, and the texts that answer it.

Everything is checked before a token is written. A key that is not known, or that asks for what is not done here, is refused: a
value that is ignored would give another answer than the one that was asked for.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pipelib.model.generate import Sampling
from pipelib.schema import MAX_INT, Bounds, NaturalInt, PositiveInt, did_you_mean, parse
from pipelib.serving.engine import Served
from pipelib.vocabulary.chat import ROLES, Message

DEFAULT_TOKENS = 256
"""The most new tokens of a request that names no number."""
MAX_CHOICES, MAX_STOPS, MAX_STOP_LENGTH, MAX_LIKELIEST, MAX_MESSAGES = 16, 4, 200, 20, 1000
IGNORED = (
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier",
)  # fmt: skip
"""Keys that change no answer."""
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "best_of": (1,), "suffix": ("",), "echo": (False,), "modalities": (["text"],), "audio": (), "prediction": (),
}  # fmt: skip
"""Keys of OpenAI's that are not done here, with the values that ask for nothing."""


class ApiError(Exception):
    """An answer with a status of HTTP, in the form of OpenAI's errors."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, object]:
        """What the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request that has been checked."""

    prompts: tuple[list[int], ...]
    n: int
    """Answers to each prompt."""
    tokens: int
    """The most tokens of each."""
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    likeliest: int | None
    """See `Writing`."""
    is_chat: bool


@dataclass(frozen=True)
class _Body:
    """The keys that both endpoints share, and what is left of the others."""

    max_tokens: PositiveInt | None
    max_completion_tokens: PositiveInt | None
    temperature: float | None
    top_p: float | None
    top_k: NaturalInt | None
    min_p: float | None
    repetition_penalty: float | None
    n: Annotated[int, Bounds(minimum=1, maximum=MAX_CHOICES)] | None
    seed: Annotated[int, Bounds(minimum=0, maximum=MAX_INT - MAX_CHOICES)] | None
    stop: tuple[str, ...] | None
    stream: bool | None


_SHARED = tuple(_Body.__dataclass_fields__)


def read_completion(body: object, served: Served) -> Asked:
    """Check the body of a request to `/v1/completions`. The prompt is text, or token ids.

    Raises:
        ApiError: it asks for something that is not possible.
    """
    values, rest = _split(body, ("prompt", "logprobs"))
    prompt = rest.get("prompt", "")
    many = isinstance(prompt, list) and not all(isinstance(part, int) for part in prompt)
    prompts = [_completion_prompt(part, served) for part in (prompt if many else [prompt])]
    logprobs = rest.get("logprobs")
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= MAX_LIKELIEST):
        raise ApiError(
            400, f"logprobs: {logprobs!r} is not a whole number from 0 to {MAX_LIKELIEST}.", param="logprobs"
        )
    return _asked(values, prompts, served, likeliest=logprobs, is_chat=False)


def read_chat(body: object, served: Served) -> Asked:
    """Check the body of a request to `/v1/chat/completions`.

    Raises:
        ApiError: it asks for something that is not possible.
    """
    values, rest = _split(body, ("messages", "logprobs", "top_logprobs"))
    if served.template is None:
        raise ApiError(
            400,
            f"{served.name} has no chat template that can be used here (none, or one of its own), so it answers no "
            "conversations; use /v1/completions.",
            code="no_chat_template",
        )
    prompt = served.template.prompt(_messages(rest.get("messages")))
    wanted, count = rest.get("logprobs", False), rest.get("top_logprobs", 0)
    if type(wanted) is not bool:
        raise ApiError(400, f"logprobs: {wanted!r} is not true or false.", param="logprobs")
    if type(count) is not int or not 0 <= count <= MAX_LIKELIEST or (count and not wanted):
        raise ApiError(
            400,
            f"top_logprobs: {count!r} is not a whole number from 0 to {MAX_LIKELIEST}, with logprobs: true.",
            param="top_logprobs",
        )
    return _asked(values, [prompt], served, likeliest=count if wanted else None, is_chat=True)


def _split(body: object, own: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the keys of a body apart: those that both endpoints share, and its own. null is as good as nothing."""
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body is not a JSON object; send one with a model and a prompt or messages.")
    given = {key: value for key, value in body.items() if value is not None and key not in (*IGNORED, "model")}
    for key in given.keys() & UNSUPPORTED.keys():
        if given.pop(key) not in UNSUPPORTED[key]:
            raise ApiError(400, f"{key} is not supported here, and would be ignored; leave it out.", param=key)
    options = given.pop("stream_options", {})
    if not isinstance(options, Mapping) or type(options.get("include_usage", False)) is not bool:
        raise ApiError(400, 'stream_options is not an object such as {"include_usage": true}.', param="stream_options")
    known = (*_SHARED, *own)
    for key in given:
        if key not in known:
            raise ApiError(
                400, f"{key} is not a parameter, so its value would be ignored{did_you_mean(key, known)}", param=key
            )
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    values = {key: given.get(key) for key in _SHARED} | {"include_usage": options.get("include_usage", False)}
    return values, {key: value for key, value in given.items() if key in own}


def _asked(
    values: dict[str, Any], prompts: Sequence[list[int]], served: Served, *, likeliest: int | None, is_chat: bool
) -> Asked:
    include_usage, problems = values.pop("include_usage"), list[str]()
    body = parse(_Body, values, "", problems)
    if body is None:
        raise ApiError(400, " ".join(problems), param=problems[0].split(":")[0])
    stops = body.stop or ()
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ApiError(
            400, f"stop: give at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters.", param="stop"
        )
    if not 0 < len(prompts) <= MAX_CHOICES:
        raise ApiError(400, f"prompt: {len(prompts)} prompts in one request; send 1 to {MAX_CHOICES}.", param="prompt")
    room = served.context_length - max(map(len, prompts))
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {max(map(len, prompts)):,} tokens, and the context of {served.name} has {served.context_length:,}, "
            "so nothing can be added; shorten it, or leave out the first messages.",
            code="context_length_exceeded",
        )
    sampling = Sampling(
        1.0 if body.temperature is None else body.temperature, body.top_k or None, body.top_p, body.min_p,
        1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )  # fmt: skip
    if problem := sampling.problem():
        raise ApiError(400, problem, param=problem.split()[0])
    return Asked(
        tuple(prompts),
        body.n or 1,
        min(body.max_completion_tokens or body.max_tokens or DEFAULT_TOKENS, room),
        sampling,
        secrets.randbelow(2**32) if body.seed is None else body.seed,
        stops,
        bool(body.stream),
        include_usage,
        likeliest,
        is_chat,
    )


def _completion_prompt(prompt: object, served: Served) -> list[int]:
    """The tokens of a prompt. A text begins with the end token, as in training; token ids are taken as they are."""
    if isinstance(prompt, str):
        return [served.tokenizer.end_token_id, *served.tokenizer.encode(prompt)]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if all(0 <= token < served.tokenizer.size for token in prompt):
            return prompt
        raise ApiError(400, f"prompt: token ids of {served.name} are 0 to {served.tokenizer.size - 1}.", param="prompt")
    raise ApiError(400, "prompt: it is neither text nor a list of token ids.", param="prompt")


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise ApiError(400, f"messages: send a list of 1 to {MAX_MESSAGES} messages.", param="messages")
    messages = []
    for number, entry in enumerate(value):
        role, content = (entry.get(key) for key in ("role", "content")) if isinstance(entry, Mapping) else (None, None)
        if isinstance(content, list):  # parts
            texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
            are_texts = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
            content = "".join(map(str, texts)) if are_texts else None
        if role not in ROLES or not isinstance(content, str):
            raise ApiError(
                400,
                f"messages[{number}]: it needs a role ({', '.join(ROLES)}) and a content that is text, or a list of parts of "
                "type text.",
                param="messages",
            )
        messages.append(Message(role, content))
    return messages
