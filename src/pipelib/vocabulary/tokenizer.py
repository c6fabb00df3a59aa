"""A tokenizer: its vocabulary, its sizes, and text to token ids and back.

tiktoken is the reference for the tokens of a text. It is imported when text is first encoded or decoded, so a process that
only needs the sizes works without it.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
"""Token ids (N,), of the type that `token_type` says."""
END = "<|endoftext|>"
"""The end token of GPT-2's vocabulary and of those that are trained here."""
BYTES = 256
"""Tokens of one byte, which every vocabulary has."""
TILE = 128
"""The widest tile of a GPU's matrix units; a vocabulary is padded to a multiple of it."""


def padded_size(vocab_size: int) -> int:
    """Return the rows of the token embedding: the vocabulary's size, rounded up to a multiple of `TILE`.

    The added tokens occur in no text, and no model predicts them.
    """
    return -(-vocab_size // TILE) * TILE  # -(-a // b) rounds up


def token_type(vocab_size: int) -> "np.dtype[np.unsignedinteger[Any]]":
    """Return the type of token ids in arrays and files: 16 bits if they hold every id, else 32, little-endian."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer. Two are equal if their names, sizes, special tokens and fingerprints are."""

    name: str
    """The name in manifests: `gpt2`."""
    title: str
    """The name for people: `GPT-2`."""
    size: int
    """The number of tokens, special ones included."""
    end_token_id: int
    """The special token at the start of every document. A model generates it at the end of a text."""
    pre_tokenizer: str
    """The rule that splits a text into words before bytes are merged, by its name in `PATTERNS`."""
    special_tokens: Mapping[str, int] = field(hash=False)
    """The ids of the tokens that ordinary text is never encoded to, by their spelling."""
    fingerprint: str
    """A SHA-256 of the vocabulary: equal if and only if equal texts have equal tokens."""
    ranks: Callable[[], Mapping[bytes, int]] = field(compare=False, repr=False)
    """Reads the id of every token except the special ones, by its bytes. Tokens are merged in this order."""
    files: Callable[[int], Mapping[str, bytes]] = field(compare=False, repr=False)
    """Reads the tokenizer files for a Hugging Face model folder, by file name. The argument is the context length."""
    normalizer: Literal["", "NFC"] = ""
    """The form of Unicode that a text gets before it is encoded, as in Qwen's vocabularies; empty if it stays as it is."""

    @property
    def padded_size(self) -> int:
        """See the function `padded_size`."""
        return padded_size(self.size)

    @property
    def token_type(self) -> "np.dtype[np.unsignedinteger[Any]]":
        """See the function `token_type`."""
        return token_type(self.size)

    @property
    def encoding(self) -> dict[str, str]:
        """How the manifest of shards identifies this tokenizer."""
        return {"name": self.name, "vocabulary_sha256": self.fingerprint}

    def encode(self, text: str, *, with_special: bool = False) -> list[int]:
        """Encode a text.

        Args:
            with_special: encode the spelling of a special token as that token. Otherwise it is ordinary text, as in
                tiktoken's `encode_ordinary`.
        """
        if not with_special:
            return list(reference(self).encode_ordinary(self.normalise(text)))
        if self.normalizer:
            # the spelling of a special token stays whole: a combining mark behind it must not join its last character
            spellings = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
            text = "".join(map(self.normalise, re.split(f"({spellings})", text)))
        return list(reference(self).encode(text, allowed_special="all"))

    def normalise(self, text: str) -> str:
        """Return a text in the form that is encoded; see `normalizer`."""
        return unicodedata.normalize(self.normalizer, text) if self.normalizer else text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode tokens to text. Bytes that are not UTF-8 become U+FFFD."""
        text: str = reference(self).decode(token_ids)
        return text

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """Decode tokens to the bytes of their text."""
        found: bytes = reference(self).decode_bytes([int(token) for token in token_ids])
        return found

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return how many bytes of text each token stands for (size,): 0 for special tokens."""
        lengths = np.zeros(self.size, np.int64)
        for token, number in self.ranks().items():
            lengths[number] = len(token)
        return lengths


def byte_characters() -> dict[str, int]:
    """Return the byte that each character stands for where a vocabulary is written as text, in the order of their ids.

    OpenAI's files and Hugging Face's write a printable byte as itself, and the others as U+0100, U+0101 and so on.
    """
    printable = [byte for byte in range(BYTES) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(BYTES + place): byte for place, byte in enumerate(others)}


PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""The regular expression of each pre-tokenizer: gpt2 as in tiktoken, the others as in the files of their models."""


@cache
def reference(tokenizer: Tokenizer) -> Any:
    """Return tiktoken's `Encoding` of a tokenizer.

    Raises:
        UserError: tiktoken is not installed, or the tokenizer's files are missing or altered.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError("tiktoken is not installed, so text cannot be encoded; run `make setup`.") from None
    return tiktoken.Encoding(
        tokenizer.name,
        pat_str=PATTERNS[tokenizer.pre_tokenizer],
        mergeable_ranks=dict(tokenizer.ranks()),
        special_tokens=dict(tokenizer.special_tokens),
        explicit_n_vocab=tokenizer.size,
    )
