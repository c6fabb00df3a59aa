"""Conversations for tests: random ones with hard contents, made-up facts, and a base model that can learn them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from small_params import ROTARY, finetune_params, model_params

from pipelib.finetuning.dataset import Counts, Dataset, encode
from pipelib.model.decoder import Decoder, build
from pipelib.model.params import family_params
from pipelib.vocabulary.chat import ASSISTANT, SYSTEM, USER, ChatTemplate, Message
from pipelib.vocabulary.engines import HARD_STRINGS
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer

FAMILIES = ("gpt2", "llama", "qwen3", "arcee")
PIECES = (
    "blue",
    "of",
    " north",
    "numpy.clip",
    "x = 1",
    "\n\n",
    "  ",
    "Ünïcode",
    "日本",
    "🇩🇪",
    "'s",
    "12345",
    "1.",
    "!\n",
)


def random_content(chance: random.Random, pieces: Sequence[str] = (*PIECES, *HARD_STRINGS)) -> str:
    """A content of hard strings with white space at its ends, or an empty one."""
    parts = [chance.choice(pieces) for _ in range(chance.randrange(6))]
    ends = ("", " ", "\n", "\t ")
    return chance.choice(ends) + chance.choice((" ", "")).join(parts) + chance.choice(ends)


def random_conversation(chance: random.Random, **options: Any) -> list[Message]:
    """A conversation of one to four exchanges; a third have a system message."""
    messages = [Message(SYSTEM, random_content(chance, **options))] if chance.random() < 1 / 3 else []
    for _ in range(chance.randint(1, 4)):
        messages += [Message(role, random_content(chance, **options)) for role in (USER, ASSISTANT)]
    return messages


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as transformers takes them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def facts(count: int, seed: int = 0) -> list[list[Message]]:
    """Invented facts, each a question and a short answer."""
    chance = random.Random(seed)

    def word() -> str:
        return "".join(chance.choice("bdfgklmnprst") + chance.choice("aeiou") for _ in range(3))

    return [[Message(USER, f"Where is {word()}?"), Message(ASSISTANT, f"In {word()}.")] for _ in range(count)]


def write_conversations(path: Path, conversations: Sequence[Sequence[Message]]) -> None:
    """Write the format `messages` as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"messages": as_dicts(messages)}) + "\n" for messages in conversations)
    path.write_text("".join(rows), encoding="utf-8")


def base_model(family: str, size: int, **changes: Any) -> Decoder:
    """A model that can learn a few facts."""
    if family == "gpt2":
        model = build(model_params(**{"context_length": 96, **changes}), size)
    else:
        values = {name: value for name, value in ROTARY.items() if name != "init_from"}
        model = build(family_params(family)(**{**values, "context_length": 96, **changes}), size)
    model.initialise(5)
    return model


def encoded(
    conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer = GPT2_TOKENIZER, longest: int = 64, **options: Any
) -> tuple[Dataset, Counts]:
    """Conversations as tokens, with the options of `finetune_params`."""
    params = finetune_params()
    values = {"train_on": params.train_on, "validation": params.validation, **options}
    named = ((f"row {number}", messages) for number, messages in enumerate(conversations, start=1))
    return encode(named, ChatTemplate.of(tokenizer), longest=longest, **values)
