"""The parameters of the vocabulary stage."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from pipelib.schema import MAX_INT, Bounds, PositiveInt
from pipelib.vocabulary.tokenizer import BYTES, END


@dataclass(frozen=True)
class VocabularyParams:
    """Section `vocabulary` of params.yaml."""

    source: str
    """`gpt2`, `train` (byte-level BPE, trained on the corpus), or a folder with a `tokenizer.json`, such as `./DIR`."""
    vocab_size: Annotated[int, Bounds(minimum=BYTES + 1, maximum=MAX_INT)]
    """`train`: the number of tokens: 256 bytes, merges, `<|endoftext|>` and `special_tokens`. It cannot be named `size`: DVC's
    run cache does not compare a parameter of that name."""
    pre_tokenizer: Literal["gpt2", "gpt4", "qwen2"]
    """`train`: how text is split into words, which no token crosses. The rules differ in numbers (gpt2: any length, gpt4: three
    digits at most, qwen2: one), upper-case contractions, and line ends."""
    special_tokens: tuple[str, ...]
    """`train`: tokens that text is never encoded to, besides `<|endoftext|>`."""
    max_bytes: Annotated[int, Bounds(minimum=1 << 16)]
    """`train`: text to train on, spread over the corpus. Memory grows with it."""
    validation_documents: PositiveInt | Literal["auto"]
    """`train` and a folder: documents at the start of the corpus that are the validation split, and that no vocabulary is
    trained on. `auto`: as many as have a tenth of the text, at most 1 MB of a small corpus. If `download.validation` names
    files, these are the split. For `gpt2`, `tokenize.shard_tokens` decides."""

    @property
    def folder(self) -> str:
        """The folder of an existing vocabulary; empty if there is none."""
        return self.source if "/" in self.source else ""

    def decides(self) -> dict[str, object]:
        """Return the parameters that the chosen source uses."""
        used: dict[str, tuple[str, ...]] = {"gpt2": ("source",), "train": tuple(asdict(self))}
        names = used.get(self.source, ("source", "validation_documents"))
        return {name: value for name, value in asdict(self).items() if name in names}

    def problems(self) -> Iterator[str]:
        """Yield a message for each invalid combination of values."""
        if self.source not in ("gpt2", "train") and not self.folder:
            yield (
                f"source: {self.source!r} is neither gpt2 nor train, and a folder needs a slash in its name; write "
                f"./{self.source} if it is a folder."
            )
        tokens = [END, *self.special_tokens]
        if twice := {token for token in tokens if tokens.count(token) > 1}:
            yield f"special_tokens: {', '.join(sorted(twice))} would be there twice ({END} is always there); name each once."
        if bad := [
            token
            for token in self.special_tokens
            if not token.strip() or token != token.strip() or len(token.encode()) < 2
        ]:
            yield (
                f"special_tokens: {bad[0]!r} is too short, or has white space at an end, so it would be mistaken for text; "
                "use a name such as <|im_start|>."
            )
        if self.source == "train" and self.vocab_size < BYTES + len(tokens):
            yield (
                f"vocab_size: {self.vocab_size} has no room for {BYTES} bytes and {len(tokens)} special tokens, so text could "
                f"not be encoded; use at least {BYTES + len(tokens)}."
            )
