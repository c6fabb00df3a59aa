"""A tokenizer: its vocabulary, its numbers, and text to token ids and back.

tiktoken is the reference for what a text's tokens are. It is loaded when text is first encoded or decoded, so that a process
that only needs the numbers does not have to have it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError

Tokens = npt.NDArray[np.uint16]
"""Token ids, one after the other (N,)."""
TILE = 128
"""The widest tile of a GPU's matrix units; a vocabulary is padded to a multiple of it."""


def padded_size(vocab_size: int) -> int:
    """Rows of the token embedding for a vocabulary: its size, rounded up to a multiple of `TILE`. No text has the tokens beyond
    the size, and no model predicts them."""
    return -(-vocab_size // TILE) * TILE


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE. Two are equal where name, numbers and fingerprint are."""

    name: str
    """In manifests: `gpt2`."""
    title: str
    """For people: `GPT-2`."""
    size: int
    """Tokens, the special ones included."""
    end_token_id: int
    """The special token that every document starts with, and that a model writes where a text ends."""
    pre_tokenizer: str
    """The rule by which a text is split into words before bytes are merged, by its name in `PATTERNS`."""
    special_tokens: Mapping[str, int] = field(hash=False)
    """Tokens that no text is encoded to, by how they are written."""
    fingerprint: str
    """A SHA-256 of the vocabulary: equal exactly where equal texts have equal tokens."""
    ranks: Callable[[], Mapping[bytes, int]] = field(compare=False, repr=False)
    """Reads the number of every token but the special ones, by its bytes. Tokens are merged in this order."""
    files: Callable[[int], Mapping[str, bytes]] = field(compare=False, repr=False)
    """Reads what the folder of a Hugging Face model gets, by file name, for a model with a context of so many tokens."""

    @property
    def padded_size(self) -> int:
        """See the function of that name."""
        return padded_size(self.size)

    @property
    def encoding(self) -> dict[str, str]:
        """What the manifest of tokens says of their vocabulary."""
        return {"name": self.name, "vocabulary_sha256": self.fingerprint}

    def encode(self, text: str, *, with_special: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            with_special: take the spelling of a special token for that token. Otherwise it is text like any other, as for
                tiktoken's `encode_ordinary`.
        """
        if with_special:
            return list(reference(self).encode(text, allowed_special="all"))
        return list(reference(self).encode_ordinary(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that tokens stand for; bytes that are not UTF-8 become U+FFFD."""
        text: str = reference(self).decode(token_ids)
        return text

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """How many bytes of text each token stands for (size,): none for special tokens."""
        lengths = np.zeros(self.size, np.int64)
        for token, number in self.ranks().items():
            lengths[number] = len(token)
        return lengths


def _pattern(name: str) -> str:
    """The regular expression of a pre-tokenizer."""
    from tiktoken_ext import openai_public

    pattern: str = getattr(openai_public, PATTERNS[name])
    return pattern


PATTERNS = {"gpt2": "r50k_pat_str"}
"""Names of pre-tokenizers, and of their patterns in tiktoken."""


@cache
def reference(tokenizer: Tokenizer) -> Any:
    """tiktoken's `Encoding` of a tokenizer.

    Raises:
        UserError: tiktoken is not installed, or the tokenizer's files are not what they should be.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError("tiktoken is not installed, so text cannot be encoded; run `make setup`.") from None
    return tiktoken.Encoding(
        tokenizer.name,
        pat_str=_pattern(tokenizer.pre_tokenizer),
        mergeable_ranks=dict(tokenizer.ranks()),
        special_tokens=dict(tokenizer.special_tokens),
        explicit_n_vocab=tokenizer.size,
    )
