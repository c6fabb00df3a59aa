"""Text to token ids with two engines: tiktoken, the reference, and gigatoken, the fast one.

Both encode as `encode_ordinary` does: `<|endoftext|>` in a text is ordinary text, so the end token always marks the start
of a document. Input and output are arrays, never a Python object per document or per token.
"""

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError
from pipelib.files import write_atomic
from pipelib.processes import resident_memory
from pipelib.vocabulary.tokenizer import Tokenizer, Tokens, reference
from pipelib.workspace.places import StatePlaces

HARD_STRINGS = (
    "", " ", "  ", "\n", "\n\n\n", " \n \t x", "\r\n", "a", " a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "don't we'll they've I'd it's we're I'm DON'T O'Neil 's 't'", "x=1;y  =\t2", "1234567890 3.14159 1e-5 0x1F",
    "naïve café über Ångström ﬁﬂ", "日本語のテキスト 中文 한국어", "עברית العربية हिन्दी", "e\u0301 e\u0300 \u200b\u200d\ufeff",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽", "\u0000\u0001\u007f\u0085\u00a0\u2028\u3000", "<|endoftext|>", "a<|endoftext|>b <|endoftext|>",
    "https://example.org/a_b?c=d&e=%20#f", "    def f(self, *args):\n        return [x for x in args]\n", "…—–“”‘’ ½ ² ™",
    "supercalifragilisticexpialidocious" * 20, "ab" * 500, " " * 300 + "end", "\n" * 100 + " x", "ſ K Å ǆ İi",
)  # fmt: skip
"""Texts that byte-pair encoders often get wrong: space runs, contractions, marks, controls, other scripts, and the
spelling of special tokens."""

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """Several texts, concatenated."""

    data: npt.NDArray[np.uint8]
    """Their UTF-8 (bytes,)."""
    offsets: Offsets
    """The start of each text in `data`, and the end of the last one (texts + 1,)."""

    @classmethod
    def of(cls, strings: Iterable[str]) -> Self:
        """Make texts from Python strings."""
        encoded = [string.encode("utf-8") for string in strings]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def normalised(self, tokenizer: Tokenizer) -> "Texts":
        """Return the texts in the form that a tokenizer encodes. Texts of ASCII alone have every form."""
        if not tokenizer.normalizer or not (self.data >= 0x80).any():
            return self
        return Texts.of(map(tokenizer.normalise, self))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self.offsets.tolist()):
            yield self.data[start:end].tobytes().decode("utf-8")


class Engine(Protocol):
    """Encodes many texts at once."""

    name: str
    tokenizer: Tokenizer

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        """Return the tokens of all texts, concatenated (N,), and the offset of each text's tokens (texts + 1,)."""
        ...


class TiktokenEngine:
    """The reference engine."""

    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._encoding = tokenizer, reference(tokenizer)

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        """See `Engine.encode`."""
        # Like encode_ordinary, but returns an array: with no special token disallowed or allowed, all of them are text.
        texts = texts.normalised(self.tokenizer)
        encoded = [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        joined = np.concatenate([np.zeros(0, np.uint32), *encoded])
        return joined.astype(self.tokenizer.token_type), offsets


class GigatokenEngine:
    """The fast engine. It is compared with tiktoken on `HARD_STRINGS` before it encodes anything.

    It caches every word that it has seen, without limit: 600 MB of words that each occur once made it 5 GB large. So it is
    reloaded, which takes 40 ms, when the process has grown too much.
    """

    name = "gigatoken"
    MAX_GROWTH_BYTES, MIN_TEXT_BYTES = 96 << 20, 16 << 20
    """The engine is reloaded when the process has grown by more than the first (without Arrow's memory), and the engine has
    encoded more text than the second."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        lines = sorted((rank, token) for token, rank in tokenizer.ranks().items())
        expected = b"".join(b64encode(token) + b" %d\n" % rank for rank, token in lines)
        ranks = StatePlaces.chosen().vocabulary / f"{tokenizer.name}-{tokenizer.fingerprint[:16]}.tiktoken"
        # gigatoken reads its vocabulary from a file. Compare it, because an old or damaged one would change tokens.
        if not ranks.exists() or ranks.read_bytes() != expected:
            with write_atomic(ranks) as file:
                file.write(expected)
        self.tokenizer, self._ranks = tokenizer, ranks
        self._load()
        assert_same_tokens(self, HARD_STRINGS)

    def _load(self) -> None:
        import gigatoken

        self._tokenizer: Any = None  # free the old one's memory first
        self._tokenizer = gigatoken.Tokenizer.from_tiktoken(
            self._ranks, self.tokenizer.pre_tokenizer, special_tokens={}
        )
        self._text, self._memory = 0, _memory()

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        """See `Engine.encode`."""
        from awkward.contents import ListOffsetArray, NumpyArray
        from awkward.highlevel import Array
        from awkward.index import Index64

        if not len(texts):
            return np.zeros(0, self.tokenizer.token_type), np.zeros(1, np.int64)
        texts = texts.normalised(self.tokenizer)
        # gigatoken takes Awkward arrays, which can wrap our arrays without a copy.
        characters = NumpyArray(texts.data, parameters={"__array__": "char"})
        strings = ListOffsetArray(Index64(texts.offsets), characters, parameters={"__array__": "string"})
        layout = self._tokenizer.encode_batch(Array(strings), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        self._text += len(texts.data)
        if self._text > self.MIN_TEXT_BYTES and _memory() > self._memory + self.MAX_GROWTH_BYTES:
            self._load()
        return tokens.astype(self.tokenizer.token_type), offsets - offsets[0]


def _memory() -> int:
    """Return the memory of this process without Arrow's, in bytes."""
    import pyarrow as pa

    return resident_memory() - int(pa.total_allocated_bytes())


def assert_same_tokens(engine: Engine, strings: Iterable[str]) -> None:
    """Compare an engine with tiktoken on some texts.

    Raises:
        UserError: names the first text on which they differ.
    """
    texts = Texts.of(strings)
    tokens, offsets = engine.encode(texts)
    for text, start, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        if tokens[start:end].tolist() != engine.tokenizer.encode(text):
            raise UserError(
                f"{engine.name} and tiktoken encode {text[:200]!r} differently, so the shards would not be "
                f"{engine.tokenizer.title}'s; use the reference with PIPELIB_TOKENIZER=tiktoken, and please report the string."
            )


def load_engine(name: str, tokenizer: Tokenizer) -> Engine:
    """Load the engine `gigatoken` or `tiktoken`.

    Raises:
        UserError: there is no engine of that name.
    """
    engines: dict[str, Callable[[Tokenizer], Engine]] = {"gigatoken": GigatokenEngine, "tiktoken": TiktokenEngine}
    if name not in engines:
        raise UserError(f"PIPELIB_TOKENIZER={name} is not a known tokenizer; use {' or '.join(engines)}.")
    return engines[name](tokenizer)
