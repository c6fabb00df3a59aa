"""`pipelib chat`: through a pseudo-terminal as a user types, and in a pipe."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_chat import base_model
from small_vocabulary import TOKENIZER

from pipelib.cli.main import main
from pipelib.finetuning.formats import conversation_of
from pipelib.model.dialogue import Dialogue
from pipelib.model.generate import GREEDY, Sampling, generate
from pipelib.model.huggingface import export_model, import_model
from pipelib.vocabulary.chat import SYSTEM, USER, ChatTemplate, Message
from pipelib.vocabulary.folder import read_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, and beside it one without."""
    root = tmp_path_factory.mktemp("models")
    model = base_model("qwen3", TOKENIZER.size)
    export_model(model, TOKENIZER, root / "chat", {}, ChatTemplate.of(TOKENIZER))
    export_model(model, TOKENIZER, root / "base", {})
    return root


def talk(
    folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "--model", str(folder), "--tokens", "12", *more]) == 0
    return capsys.readouterr().out


def dialogue_of(folder: Path, tokens: int = 8, temperature: float = 0.0) -> Dialogue:
    tokenizer = read_tokenizer(folder)
    return Dialogue(import_model(folder, tokenizer), tokenizer, True, tokens, Sampling(temperature), seed=3)


def test_in_a_pipe_each_line_has_its_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = talk(folder / "chat", "blue north\n\nof blue\n", monkeypatch, capsys, "--temperature", "0")
    again = dialogue_of(folder / "chat", tokens=12)
    expected = ["".join(again.answer(text)) for text in ("blue north", "of blue")]
    assert said == "".join(f"{text}\n" for text in expected)
    base = talk(folder / "base", "blue north\n", monkeypatch, capsys, "--temperature", "0")
    assert base.splitlines() != expected[:1]
    assert talk(folder / "chat", "/seed 3\n", monkeypatch, capsys), "in a pipe a slash is text"


def test_an_answer_sees_what_was_said_and_streams_what_is_generated_at_once(folder: Path) -> None:
    dialogue = dialogue_of(folder / "chat")
    dialogue.reset("be brief")
    first, second = ("".join(dialogue.answer(text)) for text in ("blue", "north"))
    template = ChatTemplate.of(dialogue.tokenizer)
    messages = [Message(SYSTEM, "be brief"), Message(USER, "blue")]
    for answer, question in ((first, "north"), (second, "")):
        (tokens,) = generate(
            dialogue.model, [template.prompt(messages)], 8, GREEDY, stop_token_id=template.stop_token_ids
        )
        assert dialogue.tokenizer.decode(tokens) == answer
        messages += [Message("assistant", answer), Message(USER, question)]
    assert [message.role for message in dialogue.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_full_context_loses_the_oldest_exchange_and_keeps_the_system_message(folder: Path) -> None:
    dialogue = dialogue_of(folder / "chat")
    dialogue.reset("x")
    for number in range(6):
        list(dialogue.answer(f"north {number}"))
    assert dialogue.dropped > 0
    assert dialogue.dropped % 2 == 0
    prompt = dialogue._prompt("north 5")
    assert len(prompt) + dialogue.tokens <= dialogue.model.params.context_length
    assert dialogue.tokenizer.decode(prompt).startswith("<|im_start|>system\nx<|im_end|>")


def test_an_answer_that_is_stopped_is_kept_so_far(folder: Path) -> None:
    dialogue = dialogue_of(folder / "chat")
    pieces = dialogue.answer("blue")
    piece = next(pieces)
    pieces.close()
    assert dialogue.messages[-1] == Message("assistant", piece)


def test_a_dialogue_is_saved_as_a_conversation_that_finetune_reads(folder: Path, tmp_path: Path) -> None:
    dialogue = dialogue_of(folder / "chat")
    list(dialogue.answer("日本"))
    for _ in range(2):
        dialogue.save(tmp_path / "said.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [conversation_of(row, "auto", "row") for row in rows] == [dialogue.messages] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal as Linux has it")
def test_in_a_terminal_commands_are_followed_and_ctrl_c_stops_the_answer_alone(folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pipelib.cli.main", "chat", "--model", str(folder / "chat"), "--tokens", "4000"]
    environment = {**os.environ, "PYTHONPATH": "src", "TERM": "dumb", "PIPELIB_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    said = ""

    def wait_for(text: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while text not in said:
            assert select.select([ours], [], [], max(0, deadline - time.monotonic()))[0], said
            said += os.read(ours, 4096).decode(errors="replace")

    def type_in(line: str, answer: str) -> None:
        nonlocal said
        wait_for("> ")
        said = ""
        os.write(ours, f"{line}\n".encode())
        wait_for(answer)

    type_in("/help", "/save FILE")
    type_in("/temperature hot", "has no number; for example /temperature 0.7")
    type_in("/temperature -1", "temperature -1 is negative")
    type_in("/nothing", "/nothing is not a command")
    type_in("/temperature 0", "temperature")  # so that no draw ends the answer
    wait_for("> ")
    said = ""
    os.write(ours, b"blue\n")
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    wait_for(" ...")
    type_in(f"/save {tmp_path}/said.jsonl", "> ")
    os.write(ours, b"/quit\n")
    assert process.wait(30) == 0
    assert json.loads((tmp_path / "said.jsonl").read_text(encoding="utf-8"))["messages"][0]["content"] == "blue"
    os.close(ours)


def test_what_cannot_be_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--tokens", "0"], "--tokens 0 would answer nothing"),
        (["--temperature", "-1"], "--temperature -1 is negative"),
        (["--top-k", "0"], "--top-k 0 leaves no token"),
    ):
        assert main(["chat", "--model", str(folder / "chat"), *options]) == 1
        assert words in capsys.readouterr().err
    assert main(["chat", "--model", str(folder / "nowhere")]) == 1
    assert "is not a folder with a model" in capsys.readouterr().err
