"""A tokenizer: its vocabulary, its sizes, and text to token ids and back.

tiktoken is the reference for the tokens of a text. It is imported when text is first encoded or decoded, so a process that
only needs the sizes works without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError

Tokens = npt.NDArray[np.uint16]
"""Token ids (N,)."""
TILE = 128
"""The widest tile of a GPU's matrix units; a vocabulary is padded to a multiple of it."""


def padded_size(vocab_size: int) -> int:
    """Return the rows of the token embedding: the vocabulary's size, rounded up to a multiple of `TILE`.

    The added tokens occur in no text, and no model predicts them.
    """
    return -(-vocab_size // TILE) * TILE  # -(-a // b) rounds up


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

    @property
    def padded_size(self) -> int:
        """See the function `padded_size`."""
        return padded_size(self.size)

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
        if with_special:
            return list(reference(self).encode(text, allowed_special="all"))
        return list(reference(self).encode_ordinary(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode tokens to text. Bytes that are not UTF-8 become U+FFFD."""
        text: str = reference(self).decode(token_ids)
        return text

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return how many bytes of text each token stands for (size,): 0 for special tokens."""
        lengths = np.zeros(self.size, np.int64)
        for token, number in self.ranks().items():
            lengths[number] = len(token)
        return lengths


def _pattern(name: str) -> str:
    """Return the regular expression of a pre-tokenizer."""
    from tiktoken_ext import openai_public

    pattern: str = getattr(openai_public, PATTERNS[name])
    return pattern


PATTERNS = {"gpt2": "r50k_pat_str"}
"""The names of pre-tokenizers, and of their patterns in tiktoken."""


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
        pat_str=_pattern(tokenizer.pre_tokenizer),
        mergeable_ranks=dict(tokenizer.ranks()),
        special_tokens=dict(tokenizer.special_tokens),
        explicit_n_vocab=tokenizer.size,
    )
