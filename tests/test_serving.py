"""`pipelib serve`: OpenAI's own client, answers that depend on nobody else's, and clients that behave badly."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chat import FAMILIES, base_model

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.model.decoder import Decoder
from pipelib.model.generate import GREEDY, Sampling, generate
from pipelib.model.huggingface import export_model
from pipelib.serving import http as serving
from pipelib.serving.engine import ClosedError, Drawn, Engine, Served, Writing
from pipelib.serving.http import Server
from pipelib.serving.transcript import Transcript
from pipelib.vocabulary.chat import USER, ChatTemplate, Message
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer

KEY = "a secret"


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return base_model("qwen3", tokenizer.size).eval()


def make_engine(
    model: Decoder, tokenizer: Tokenizer, *, name: str = "small", chat: bool = True, **options: Any
) -> Engine:
    served = Served(name, model, tokenizer, ChatTemplate.of(tokenizer) if chat else None)
    engine = Engine(served, **{"slots": 4, "queue": 8, **options})
    engine.start()
    return engine


@contextmanager
def running(server: Server) -> Iterator[int]:
    """The port of a server in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        server.app, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        runner.should_exit = True
        thread.join(5)
        listener.close()


@pytest.fixture(scope="module")
def port(model: Decoder, tokenizer: Tokenizer) -> Iterator[int]:
    engines = {
        "small": make_engine(model, tokenizer),
        "base": make_engine(model, tokenizer, name="base", chat=False),
    }
    with running(Server(engines, api_key=KEY)) as port:
        yield port
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


def ask(port: int, body: object, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    """The status and the JSON of one request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", "authorization": f"Bearer {KEY}", **headers}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", path, content, sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


# ---- OpenAI's client -------------------------------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [entry.id for entry in client.models.list()] == ["small", "base"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; there is small, base"):
        client.models.retrieve("other")


def test_a_completion_is_what_is_generated(client: openai.OpenAI, model: Decoder, tokenizer: Tokenizer) -> None:
    prompt = "blue north"
    (expected,) = generate(
        model, [[tokenizer.end_token_id, *tokenizer.encode(prompt)]], 20, Sampling(0.7, None), seed=5,
        stop_token_id=ChatTemplate.of(tokenizer).stop_token_ids,
    )  # fmt: skip
    asked: dict[str, Any] = {"model": "small", "prompt": prompt, "max_tokens": 20, "temperature": 0.7, "seed": 5}
    found = client.completions.create(**asked)
    assert found.choices[0].text == tokenizer.decode(expected)
    assert found.choices[0].finish_reason == ("length" if len(expected) == 20 else "stop")
    assert found.usage is not None
    assert found.usage.completion_tokens == len(expected)
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == found.choices[0].text
    assert pieces[-1].usage == found.usage
    assert len(pieces) > 5, "it is sent while it is written"


def test_an_answer_is_what_the_template_and_the_model_give(
    client: openai.OpenAI, model: Decoder, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate.of(tokenizer)
    (expected,) = generate(
        model, [template.prompt([Message(USER, "blue")])], 16, GREEDY, stop_token_id=template.stop_token_ids
    )
    asked: dict[str, Any] = {"model": "small", "max_completion_tokens": 16, "temperature": 0}
    for content in ("blue", [{"type": "text", "text": "bl"}, {"type": "text", "text": "ue"}]):
        found = client.chat.completions.create(messages=[{"role": "user", "content": content}], **asked)
        assert found.choices[0].message.content == tokenizer.decode(expected)
    stream = list(client.chat.completions.create(messages=[{"role": "user", "content": "blue"}], stream=True, **asked))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == tokenizer.decode(expected)
    assert stream[-1].choices[0].finish_reason in ("stop", "length")


def test_probabilities_are_those_of_the_model(client: openai.OpenAI, model: Decoder, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": "small", "prompt": "blue", "max_tokens": 3, "temperature": 0, "logprobs": 5}
    found = client.completions.create(**asked).choices[0].logprobs
    assert found is not None
    tokens = [tokenizer.end_token_id, *tokenizer.encode("blue")]
    with torch.no_grad():
        logits = model.exact_logits(model.hidden(torch.tensor([tokens]))[0, -1])[: model.vocab_size]
    values = logits.log_softmax(-1).topk(5).values
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] == pytest.approx(float(values[0]), abs=1e-5)
    assert found.top_logprobs is not None
    assert list(found.top_logprobs[0].values()) == pytest.approx(values.tolist(), abs=1e-5)
    assert found.tokens == [
        entry
        for piece in client.completions.create(**asked, stream=True)
        if (part := piece.choices[0].logprobs)
        for entry in part.tokens or ()
    ]
    chat = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "blue"}],
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
        seed=1,
    ).choices[0]
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    assert all(len(entry.top_logprobs) == 2 for entry in chat.logprobs.content)
    written = b"".join(bytes(entry.bytes or []) for entry in chat.logprobs.content)
    assert written.decode("utf-8", "replace") == chat.message.content


def test_several_choices_and_prompts_have_their_own_seeds(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": ["blue", "north"], "max_tokens": 12, "seed": 9, "n": 2}
    found = client.completions.create(**asked)
    texts = {choice.index: choice.text for choice in found.choices}
    assert len(set(texts.values())) == 4
    alone = client.completions.create(**{**asked, "prompt": "blue", "n": 1})
    assert alone.choices[0].text == texts[0]
    streamed = dict.fromkeys(range(4), "")
    for piece in client.completions.create(**asked, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == texts


def test_a_stop_string_ends_a_text_before_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": "blue", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[7:10]
    found = client.completions.create(**asked, stop=["never here", stop])
    assert found.choices[0].text == whole.partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == whole.partition(stop)[0]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"prompt": "a", "model": "x"}, 404, "there is no model 'x'"),
        ("completions", {"prompt": "a", "max_token": 3}, 400, "max_token is not a parameter, .* did you mean max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens: 0 must be greater than 0"),
        ("completions", {"prompt": "a", "max_tokens": "3"}, 400, "max_tokens: '3' is text; it must be a whole number"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature -1 is negative"),
        ("completions", {"prompt": "a", "temperature": float("nan")}, 400, "temperature nan is not a finite number"),
        ("completions", {"prompt": "a", "top_p": 7}, 400, "top_p 7 is not a probability"),
        ("completions", {"prompt": "a", "n": 10**30}, 400, "n: .* must be at most 16"),
        ("completions", {"prompt": "a", "seed": 2**64}, 400, "seed: .* must be at most"),
        ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs: 21 is not a whole number from 0 to 20"),
        ("completions", {"prompt": "a", "stop": ["a"] * 5}, 400, "stop: give at most 4 strings"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop: give at most 4 strings"),
        ("completions", {"prompt": "a", "echo": True}, 400, "echo is not supported here"),
        ("completions", {"prompt": "a", "stream_options": 3}, 400, "stream_options is not an object"),
        ("completions", {"prompt": {"a": 1}}, 400, "prompt: it is neither text nor a list"),
        ("completions", {"prompt": [10**9]}, 400, "prompt: token ids of small are 0 to"),
        ("completions", {"prompt": []}, 400, "prompt: it is neither text nor a list"),
        ("completions", {"prompt": ["a"] * 17}, 400, "17 prompts in one request"),
        ("completions", {"prompt": "a b c " * 500}, 400, "the context of small has 96, so nothing can be added"),
        ("completions", [1], 400, "the body is not a JSON object"),
        ("completions", b"{", 400, "the body is not JSON"),
        ("completions", b'{"stop": "\\ud800"}', 400, "the body is not JSON"),
        ("completions", {"prompt": "a", "repetition_penalty": 1e-50}, 400, "repetition_penalty 1e-50 is not a number from 0.01"),
        ("completions", b"[" * 100_000, 400, "the body is not JSON"),
        ("completions", b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, "the body has more than 1,048,576 bytes"),
        ("chat/completions", {"model": "base", "messages": []}, 400, "base has no chat template that can be used here"),
        ("chat/completions", {"messages": []}, 400, "messages: send a list of 1 to 1000"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, r"messages\[0\]: it needs a role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, r"messages\[0\]: "),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [1]}, 400, "tools is not supported here"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}, 400, "with logprobs: true"),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_one_message(port: int, path: str, body: object, status: int, words: str) -> None:
    import re

    found, answer = ask(port, body, f"/v1/{path}")
    assert found == status
    assert re.search(words, answer["error"]["message"]), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_whoever_has_no_key_or_is_on_no_path_gets_json_too(port: int) -> None:
    for key in ("", "Bearer wrong", "Bearer "):
        status, answer = ask(port, {"prompt": "a"}, authorization=key)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert ask(port, {"prompt": "a"}, "/v1/nothing")[0] == 404
    assert ask(port, {"prompt": "a"}, "/health")[0] == 405
    assert ask(port, {"prompt": "a"}, **{"content-type": "text/plain"})[0] == 415
    for host in ("evil.example:80", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "[", ""):
        assert ask(port, {"prompt": "a"}, host=host)[0] == 403, host
    for host in ("localhost", "127.0.0.1:1", "[::1]", "LOCALHOST:80"):
        assert ask(port, {"prompt": "a", "max_tokens": 1}, host=host)[0] == 200, host


# ---- Nobody else changes an answer -----------------------------------------------------------------------------------


def write_all(
    engine: Engine, prompts: list[list[int]], sampling: Sampling, chance: random.Random | None
) -> list[list[int]]:
    """What an engine writes for each prompt: one after the other, or all as they come."""
    texts: list[list[int]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]

    def teller(number: int) -> Any:
        def tell(event: Drawn | str | Exception) -> None:
            texts[number].append(event.token_id) if isinstance(event, Drawn) else ended[number].set()

        return tell

    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(number)
        engine.submit([Writing(list(prompt), 5 + number % 17, sampling, generator, tell=teller(number))])
        if chance is None:
            assert ended[number].wait(30)
        elif chance.random() < 0.3:
            time.sleep(chance.uniform(0, 0.01))
    assert all(event.wait(60) for event in ended)
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_are_those_of_generation(family: str, tokenizer: Tokenizer) -> None:
    size = GPT2_TOKENIZER.size if family == "gpt2" else tokenizer.size
    model = base_model(family, size).eval()
    engine = make_engine(model, GPT2_TOKENIZER if family == "gpt2" else tokenizer, queue=100)
    chance = random.Random(1)
    prompts = [[chance.randrange(400) for _ in range(chance.randint(1, 30))] for _ in range(30)]
    found = write_all(engine, prompts, GREEDY, chance)
    assert found == [generate(model, [prompt], 5 + number % 17, GREEDY)[0] for number, prompt in enumerate(prompts)]
    engine.close()


def test_with_fixed_shapes_two_hundred_requests_get_the_bits_that_they_get_alone(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = make_engine(model, tokenizer, queue=300, slots=8, fixed_shapes=True)
        chance = random.Random(2)
        prompts = [[chance.randrange(400) for _ in range(chance.randint(1, 60))] for _ in range(200)]
        alone = write_all(engine, prompts, Sampling(1.0, None), None)
        assert write_all(engine, prompts, Sampling(1.0, None), chance) == alone
        engine.close()
    finally:
        torch.set_num_threads(threads)


# ---- Clients that behave badly ---------------------------------------------------------------------------------------


def idle(port: int) -> bool:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/health")
        models = json.loads(connection.getresponse().read())["models"]
    return all(busy == {"writing": 0, "waiting": 0} for busy in models.values())


def request_bytes(body: object) -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def test_a_client_that_leaves_frees_its_slot(
    port: int, client: openai.OpenAI, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, passes = model.hidden, []

    def hidden(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        time.sleep(0.02)
        return slow(*arguments, **options)

    monkeypatch.setattr(model, "hidden", hidden)
    for stream in (True, False):
        for _ in range(6):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(request_bytes({"prompt": "blue", "max_tokens": 90, "n": 2, "stream": stream}))
                if stream:
                    connection.recv(10)
    deadline = time.monotonic() + 20
    while not idle(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(passes) < 80, "24 texts of 90 tokens in four slots would need 540"
    assert client.completions.create(model="small", prompt="a", max_tokens=2).choices


def test_garbage_and_slow_bodies_do_not_stop_it(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.3)
    for garbage in (
        b"\x00\xff" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, suppress(OSError):
            connection.sendall(garbage)
            connection.recv(1000)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
            "content-type: application/json\r\ncontent-length: 100\r\n\r\n{".encode()
        )
        said = connection.recv(1000)
        assert b"408" in said.split(b"\r\n")[0]
    assert ask(port, {"prompt": "a", "max_tokens": 2})[0] == 200


def test_more_than_the_queue_holds_is_refused_at_once(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, slots=1, queue=2)
    with running(Server({"small": engine}, api_key=KEY)) as port:
        status, answer = ask(port, {"prompt": "a", "n": 4})
        assert (status, answer["error"]["message"]) == (
            400,
            "4 texts in one request, and the server holds 3; ask for fewer.",
        )
        told = list[Any]()
        first = [Writing([1], 10**6, GREEDY, torch.Generator(), tell=told.append) for _ in range(2)]
        engine.submit(first)
        status, answer = ask(port, {"prompt": "a", "n": 3})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        for writing in first:  # nobody waits for them any more, so their places are free
            writing.cancelled = True
        deadline = time.monotonic() + 10
        while ask(port, {"prompt": "a", "n": 3, "max_tokens": 2})[0] != 200:
            assert time.monotonic() < deadline
    engine.close()


def test_a_text_that_cannot_be_drawn_fails_alone(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, tokenizer)
    whole, told = Sampling.draw, list[Any]()

    def draw(sampling: Sampling, *arguments: Any) -> int:
        if sampling.top_k == 7:
            raise RuntimeError("unlucky")
        return whole(sampling, *arguments)

    monkeypatch.setattr(Sampling, "draw", draw)
    with running(Server({"small": engine}, api_key=KEY)) as port:
        engine.submit([Writing([1], 30, GREEDY, torch.Generator(), tell=told.append)])
        status, answer = ask(port, {"prompt": "a", "top_k": 7})
        assert (status, answer["error"]["message"]) == (500, "unlucky")
        for absurd in ({"temperature": 1e-50}, {"top_p": 1e-50}, {"temperature": 1e300}, {"min_p": 1.0}):
            assert ask(port, {"prompt": "a", "max_tokens": 3, **absurd})[0] == 200, absurd
    engine.close()
    assert sum(isinstance(event, Drawn) for event in told) >= 5
    assert not any(isinstance(event, RuntimeError) for event in told)


def test_a_model_with_infinite_logits_gives_an_error_and_the_server_stays(tokenizer: Tokenizer) -> None:
    broken = base_model("qwen3", tokenizer.size).eval()
    engine = make_engine(broken, tokenizer)
    with torch.no_grad():
        broken.head.fill_(float("inf"))
    with running(Server({"small": engine}, api_key=KEY)) as port:
        for _ in range(2):
            status, answer = ask(port, {"prompt": "a"})
            assert status == 500
            assert "logits are infinite" in answer["error"]["message"]
    engine.close()


def test_when_the_engine_ends_clients_are_told(model: Decoder, tokenizer: Tokenizer) -> None:
    engine, told = make_engine(model, tokenizer), list[Any]()
    engine.submit([Writing([1], 10**6, GREEDY, torch.Generator(), tell=told.append) for _ in range(6)])
    engine.close()
    deadline = time.monotonic() + 10
    while sum(isinstance(event, ClosedError) for event in told) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ClosedError):
        engine.submit([])


@pytest.mark.long
def test_sixty_four_clients_get_answers_or_are_told_that_it_is_busy(model: Decoder, tokenizer: Tokenizer) -> None:
    """For two minutes with `make test-long`. One client in eight leaves early, and one sends what is not possible."""
    engine = make_engine(model, tokenizer, slots=16, queue=32)
    seconds = min(120, int(os.environ.get("PIPELIB_TEST_RUNS", "5")))
    end, statuses, memory = time.monotonic() + seconds, Counter[int](), list[int]()

    def talk(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            body: dict[str, Any] = {"prompt": "blue " * chance.randint(0, 8), "max_tokens": chance.randint(1, 60)}
            if number % 8 == 0:
                body |= {"stream": True, "n": 2}
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(request_bytes(body))
                    connection.recv(chance.randint(1, 2000))
            else:
                status, _ = ask(port, body | ({"n": 0} if number % 8 == 1 else {"stop": ["b"]}))
                statuses[status] += 1

    with running(Server({"small": engine}, api_key=KEY)) as port:
        threads = [threading.Thread(target=talk, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            time.sleep(seconds / 10)
            memory.append(psutil.Process().memory_info().rss)
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 20
        while not idle(port):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    engine.close()
    assert set(statuses) <= {200, 400, 429}, statuses
    assert statuses[200] > 100
    assert memory[-1] - memory[2] < 100e6, memory
    print(
        f"\n{seconds} s: {dict(statuses)}, {memory[-1] / 1e6:,.0f} MB, {(memory[-1] - memory[2]) / 1e6:+,.1f} MB in the last part"
    )


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory: you tried 9 bytes"), MemoryError()])
def test_a_model_that_does_not_fit_is_refused_before_it_is_served(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(model, "hidden", full)
    with pytest.raises(
        UserError, match=r"small with 4 slots of 96 tokens does not fit into the memory of cpu .*; lower --slots"
    ):
        make_engine(model, tokenizer)


# ---- The command -----------------------------------------------------------------------------------------------------


def test_sigterm_ends_it_within_two_seconds(tokenizer: Tokenizer, model: Decoder, tmp_path: Path) -> None:
    export_model(model, tokenizer, tmp_path / "chat", {}, ChatTemplate.of(tokenizer))
    with subprocess.Popen(
        [sys.executable, "-m", "pipelib.cli.main", "serve", "--model", str(tmp_path / "chat"), "--port", "0"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PIPELIB_API_KEY": KEY, "PYTHONPATH": "src"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        while "Ctrl-C ends" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        port = int(said.rsplit("/v1", 1)[0].rsplit(":", 1)[1])
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            body = {"prompt": "blue", "stream": True, "max_tokens": 90, "n": 16}
            headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            response.readline()
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = response.read().decode()
        assert process.wait(10) == 0
        assert time.monotonic() - started < 2
    assert "the server ends" in rest
    assert rest.endswith("data: [DONE]\n\n")


def test_a_port_in_use_and_two_models_of_one_name_are_refused(
    tokenizer: Tokenizer, model: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_model(model, tokenizer, tmp_path / "chat", {}, ChatTemplate.of(tokenizer))
    folder = str(tmp_path / "chat")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "--model", folder, "--port", port]) == 1
    assert f"the server cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert main(["serve", "--model", folder, folder, "--port", "0"]) == 1
    assert "is named twice" in capsys.readouterr().err


# ---- Text in pieces --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.text(alphabet="ab<|é€👩 ", max_size=40), st.lists(st.text(alphabet="ab<é", min_size=1, max_size=4), max_size=3)
)
def test_pieces_are_the_text_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    transcript, tokens = Transcript(GPT2_TOKENIZER, stops), GPT2_TOKENIZER.encode(text)
    found = "".join(transcript.add(token) for token in tokens) + transcript.end()
    expected = text
    for count in range(1, len(tokens) + 1):  # the stop string that is complete first
        so_far = GPT2_TOKENIZER.decode_bytes(tokens[:count]).decode("utf-8", "ignore")
        if places := [place for stop in stops if (place := so_far.find(stop)) >= 0]:
            expected = text[: min(places)]
            break
    assert found == expected
