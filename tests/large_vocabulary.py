"""A vocabulary as large as published ones, in no time: all pairs of bytes are tokens, and pairs and a byte as far as needed."""

import json
from pathlib import Path
from typing import Any

from pipelib.files import write_json
from pipelib.vocabulary.bpe import pre_tokenizer_of
from pipelib.vocabulary.folder import CONFIG, TOKENIZER, read_tokenizer
from pipelib.vocabulary.tokenizer import BYTES, Tokenizer, byte_characters

QWEN3: dict[str, Any] = {"ordinary": 151_643, "special": 26, "pre_tokenizer": "qwen2", "normalizer": "NFC"}
LLAMA3: dict[str, Any] = {"ordinary": 128_000, "special": 256, "pre_tokenizer": "gpt4"}
SMOLLM2: dict[str, Any] = {"ordinary": 49_151, "special": 1}
"""The numbers of tokens, the rule and the normalizer of these models' vocabularies."""


def write_large_vocabulary(
    folder: Path, ordinary: int, special: int, pre_tokenizer: str = "gpt2", normalizer: str = ""
) -> Tokenizer:
    """Write tokenizer.json and its config. Of several special tokens, every second one is not called special, as in Qwen3's."""
    letters = [*byte_characters()]
    pairs = [(first, second) for first in letters for second in letters]
    longer = [(first + second, third) for first, second in pairs[:2000] for third in letters[:64]]
    merges = [*pairs, *longer][: ordinary - BYTES]
    vocabulary = {token: number for number, token in enumerate([*letters, *map("".join, merges)])}
    assert len(vocabulary) == ordinary
    added = [
        {
            "id": ordinary + number, "content": "<|endoftext|>" if not number else f"<|{number}|>", "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False, "special": number % 2 == 0,
        }
        for number in range(special)
    ]  # fmt: skip
    value: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": json.loads(pre_tokenizer_of(pre_tokenizer).__getstate__()),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER).write_text(json.dumps(value), encoding="utf-8")
    write_json(folder / CONFIG, {"eos_token": "<|endoftext|>"})
    return read_tokenizer(folder)
