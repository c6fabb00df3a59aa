"""A vocabulary in a folder: `tokenizer.json`, the file of Hugging Face's `tokenizers`, which transformers and others load.

Only byte-level BPE whose tokens are a function of ids and pre-tokenizer is read, so that tiktoken, gigatoken, tokenizers and
llama.cpp give equal tokens: no normalizer but NFC, a pre-tokenizer that all of them know, merges in the order of their ids.
"""

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from pipelib.errors import UserError
from pipelib.files import format_json, read_json
from pipelib.vocabulary.tokenizer import BYTES, END, PATTERNS, Tokenizer, byte_characters

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
"""The vocabulary, and what transformers must know besides: the end token."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the vocabulary in a folder.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    found = _read(folder / TOKENIZER)
    end = _end_token(folder, found.special_tokens)
    end_token_id, size = found.special_tokens[end], len(found.ranks) + len(found.special_tokens)
    return Tokenizer(
        name=f"bpe-{size}",
        title=f"BPE {size:,}",
        size=size,
        end_token_id=end_token_id,
        pre_tokenizer=found.pre_tokenizer,
        special_tokens=found.special_tokens,
        fingerprint=fingerprint(found.ranks, found.pre_tokenizer, found.special_tokens, end_token_id, found.normalizer),
        normalizer=found.normalizer,
        ranks=partial(_ranks, folder / TOKENIZER),
        files=partial(model_files, folder / TOKENIZER, end),
    )


def fingerprint(
    ranks: Mapping[bytes, int],
    pre_tokenizer: str,
    special_tokens: Mapping[str, int],
    end_token_id: int,
    normalizer: str = "",
) -> str:
    """Return the SHA-256 of what decides the tokens of documents."""
    others = {
        "pre_tokenizer": pre_tokenizer,
        "special_tokens": dict(special_tokens),
        "end_token_id": end_token_id,
        **({"normalizer": normalizer} if normalizer else {}),
    }
    return hashlib.sha256(tiktoken_lines(ranks) + format_json(others).encode("utf-8")).hexdigest()


def tiktoken_lines(ranks: Mapping[bytes, int]) -> bytes:
    """Return a vocabulary in the format of tiktoken's files: a token in base64 and its id on each line."""
    lines = sorted((rank, token) for token, rank in ranks.items())
    return b"".join(b64encode(token) + b" %d\n" % rank for rank, token in lines)


def model_files(path: Path, end: str, context_length: int | None) -> dict[str, bytes]:
    """Return the files that `AutoTokenizer` of transformers reads, by name.

    Args:
        path: tokenizer.json.
        end: the end token.
        context_length: the model's; None if there is no model.
    """
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if context_length is None else {"model_max_length": context_length}),
        "clean_up_tokenization_spaces": False,
        "bos_token": end,
        "eos_token": end,
    }
    return {TOKENIZER: path.read_bytes(), CONFIG: format_json(config).encode("utf-8")}


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """The content of a tokenizer.json."""

    ranks: Mapping[bytes, int]
    special_tokens: Mapping[str, int]
    pre_tokenizer: str
    normalizer: Literal["", "NFC"]


def _ranks(path: Path) -> Mapping[bytes, int]:
    return _read(path).ranks


def _read(path: Path) -> _File:
    try:
        stat = path.stat()
    except OSError:
        raise UserError(
            f"{path} does not exist, so there is no vocabulary; name a folder with this file of Hugging Face's tokenizers."
        ) from None
    return _parse(path, stat.st_size, stat.st_mtime_ns)


@cache
def _parse(path: Path, _size: int, _modified: int) -> _File:
    """Parse a tokenizer.json. What an earlier call found holds as long as the file has the same size and date."""
    value = read_json(path, "get the file again")
    try:
        model = _require_byte_level_bpe(path, value)
        added = value.get("added_tokens") or ()
        special = {str(token["content"]): int(token["id"]) for token in added}
        byte_of = byte_characters()
        ranks = {
            bytes(byte_of[character] for character in token): int(number)
            for token, number in model["vocab"].items()
            if token not in special
        }
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        merged = [model["vocab"][first + second] for first, second in merges]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unusable(path, f"is not a tokenizer of bytes ({error!r})") from None
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        # One that is not special, as Qwen3's <think>, is special here: no text of the corpus is encoded to it.
        if flags or (token.get("special") is not True and token.get("normalized") is not False):
            why = " and ".join(flags) or "an ordinary word"
            raise _unusable(
                path, f"has the added token {token['content']!r}, which is {why} and so changes ordinary text"
            )
    if missing := [byte for byte in range(BYTES) if bytes([byte]) not in ranks]:
        raise _unusable(
            path, f"has no token for {len(missing)} of the {BYTES} bytes, so some texts could not be encoded"
        )
    ids = sorted([*ranks.values(), *special.values()])
    if ids != list(range(len(ids))) or sorted(ranks.values()) != list(range(len(ranks))):
        raise _unusable(path, "has ids that leave gaps, or special tokens before ordinary ones")
    # Llama 3's file has each merge that gives a token, one after another.
    if list(dict.fromkeys(merged)) != list(range(BYTES, len(ranks))) or merged != sorted(merged):
        raise _unusable(path, "has merges in another order than its ids, so engines would not agree on the tokens")
    normalizer: Literal["", "NFC"] = "NFC" if value.get("normalizer") else ""
    return _File(ranks, special, _pre_tokenizer(path, value.get("pre_tokenizer")), normalizer)


def _require_byte_level_bpe(path: Path, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse a tokenizer of another kind, or one that changes the text before it encodes it."""
    model: Mapping[str, Any] = value["model"]
    if model.get("type", "BPE") != "BPE":
        raise _unusable(path, f"is of the kind {model['type']}")
    if value.get("normalizer") not in (None, {"type": "NFC"}):
        raise _unusable(path, f"changes the text first (normalizer {value['normalizer'].get('type')})")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk"):
        if model.get(key):
            raise _unusable(path, f"has {key} = {model[key]!r}")
    return model


def _pre_tokenizer(path: Path, value: Mapping[str, Any] | None) -> str:
    """Return the name of the pre-tokenizer in a file, in `PATTERNS`."""
    match value:
        case {"type": "ByteLevel", "add_prefix_space": False, **others} if others.get("use_regex", True):
            return "gpt2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            for name, known in PATTERNS.items():
                if pattern == known:
                    return name
    raise _unusable(path, f"splits text in another way than {', '.join(PATTERNS)}")


def _unusable(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} {why}, so pipelib could make other tokens than the program that it was made for; use a byte-level BPE "
        "tokenizer such as vocabulary.source: train makes, or gpt2."
    )


def _end_token(folder: Path, special_tokens: Mapping[str, int]) -> str:
    """Return the end token of a vocabulary: what tokenizer_config.json says, else `<|endoftext|>`.

    Raises:
        UserError: neither is a special token.
    """
    config = folder / CONFIG
    named: Any = read_json(config, "get the file again").get("eos_token") if config.is_file() else None
    end = named.get("content") if isinstance(named, dict) else named
    for token in (end, END):
        if isinstance(token, str) and token in special_tokens:
            return token
    known = json.dumps(sorted(special_tokens))
    raise UserError(
        f"{folder / TOKENIZER} has no end token (its special tokens are {known}), so documents could not be told apart; name one "
        f"as eos_token in {config}."
    )
