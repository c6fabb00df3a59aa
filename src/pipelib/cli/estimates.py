"""What a parameter file amounts to, by arithmetic: data, disk, memory. Nothing is run and torch is not imported."""

import math
from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import UserError
from pipelib.model.params import ModelParams
from pipelib.model.vocabulary import PADDED_VOCAB_SIZE, VOCAB_SIZE
from pipelib.params import Params
from pipelib.tokens.shards import HEADER_BYTES, Manifest, Shard, read_manifest
from pipelib.training.params import TrainParams

CHECKPOINTS = 3
"""Two that are kept and one that is being written (training/checkpoint.py)."""


@dataclass(frozen=True)
class Corpus:
    """How much text there is."""

    tokens: int
    """All of them, the validation shard's and one `<|endoftext|>` a document included."""
    raw_bytes: int
    """Of data/raw."""
    origin: str
    """How that is known."""
    files: int = 1
    """Of data/raw, about equally large; `download.max_tokens` takes whole ones of the hub."""

    def prefix(self, max_tokens: int | None) -> "Corpus":
        """What is left where `download.max_tokens` ends the corpus."""
        if max_tokens is None or max_tokens >= self.tokens:
            return self
        share = max_tokens / self.tokens
        files = math.ceil(self.files * share)
        raw_bytes = round(self.raw_bytes * (files / self.files if self.files > 1 else share))
        return Corpus(max_tokens, raw_bytes, f"download.max_tokens, about, of {self.origin}", files)


_DOCS = Corpus(7_400_214, 7_428_143, "the offline corpus, about: it varies with the packages' versions")
_HUB = {
    ("HuggingFaceFW/fineweb-edu", "sample/10BT"): Corpus(
        9_972_918_177 + 9_672_101,
        28_518_193_415,
        "the hub's own count of tokens, and one for each of 9,672,101 documents",
        files=14,
    )
}


def corpus_of(params: Params, root: Path) -> Corpus | None:
    """The corpus of a parameter file: what lies in `root`/data if it was made with these parameters, else a known size.

    None where nobody knows before the stages have run.
    """
    return _made_corpus(params, root) or _known_corpus(params)


def _known_corpus(params: Params) -> Corpus | None:
    download = params.download
    match download.source:
        case "docs":
            known: Corpus | None = _DOCS
        case "hub":
            known = _HUB.get((download.repo, download.folder))
        case "local":
            known = None
    return known.prefix(download.max_tokens) if known else None


def _made_corpus(params: Params, root: Path) -> Corpus | None:
    try:
        manifest = read_manifest(root / "data/tokens")
    except (UserError, KeyError, TypeError, AttributeError):
        return None
    download, source = params.download, manifest.source
    wanted: dict[str, object] = {"kind": download.source, "max_tokens": download.max_tokens}
    if download.source == "hub":
        wanted |= {"repo": download.repo, "revision": download.revision, "folder": download.folder}
    if any(source.get(key) != value for key, value in wanted.items()):
        return None
    raw_bytes = sum(path.stat().st_size for path in (root / "data/raw").glob("*.parquet"))
    return Corpus(sum(shard.tokens for shard in manifest.shards), raw_bytes, "as data/tokens/manifest.json says")


def manifest_of(corpus: Corpus, shard_tokens: int) -> Manifest:
    """A manifest with the corpus's amounts: one validation shard and the rest."""
    val = min(shard_tokens, corpus.tokens)
    shards = (Shard("", "val", val, 0, ""), Shard("", "train", corpus.tokens - val, 0, ""))
    return Manifest({}, {}, shards)


def padded_parameters(model: ModelParams) -> int:
    """Trainable numbers in memory and checkpoints: with the vocabulary's padding."""
    return model.parameters + (PADDED_VOCAB_SIZE - VOCAB_SIZE) * model.n_embd


@dataclass(frozen=True)
class Disk:
    """Bytes that the stages write, by what; hard links count once."""

    raw: int | None
    tokens: int | None
    units: int | None
    """Encoded text, while tokenize runs."""
    checkpoints: int
    """While train runs."""
    model: int

    @property
    def total(self) -> int:
        """The most at any time, as far as it is known."""
        return (self.raw or 0) + (self.tokens or 0) + max(self.units or 0, self.checkpoints) + self.model


def disk_of(params: Params, corpus: Corpus | None) -> Disk:
    """Two bytes a token and a header a shard; 12 bytes a parameter in each checkpoint (fp32 weight and AdamW's two
    moments); 4 in models/.
    """
    checkpoints = CHECKPOINTS * 12 * padded_parameters(params.model)
    model = 4 * params.model.parameters
    if corpus is None:
        return Disk(None, None, None, checkpoints, model)
    shards = -(-corpus.tokens // params.tokenize.shard_tokens)
    return Disk(corpus.raw_bytes, 2 * corpus.tokens + HEADER_BYTES * shards, 2 * corpus.tokens, checkpoints, model)


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs, in a GPU or, without one, in main memory."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two."""
    copies: int
    """bf16 copies of the matrices, kept by autocast until the backward pass is through."""
    activations: int
    """What the blocks save for the backward pass."""
    logits: int
    """The output layer at its peak."""

    @property
    def total(self) -> int:
        """All of it; the allocator and kernels want some 10 % on top."""
        return self.weights + self.gradients + self.moments + self.copies + self.activations + self.logits


def memory_of(model: ModelParams, train: TrainParams, rows: int, length: int) -> Memory:
    """What `rows` rows of `length` tokens need at a time, without torch.compile, which saves less.

    fp32: weights, gradients 4 bytes a parameter, moments 8. Each block saves, in units of n_embd numbers a token: the
    inputs of two LayerNorms (2), their outputs (2), query, key and value (3), attention's output (1), the MLP before and
    after GELU (8): 16 in all. In fp32 that is 64 bytes; in bf16 the LayerNorms' inputs stay fp32 and the rest has 2 bytes:
    36. With `activation_checkpointing` a block saves its input in fp32, 4 bytes, and one block at a time the rest. The output
    layer peaks in the backward pass, with the log-probabilities, their gradient and the logits' gradient
    alive at once: 3 fp32 numbers for each of 50,304 logits a token.
    """
    tokens, parameters, bf16 = rows * length, padded_parameters(model), train.precision == "bf16"
    of_block = 36 if bf16 else 64
    of_blocks = 4 * model.n_layer + of_block if train.activation_checkpointing else of_block * model.n_layer
    matrices = 12 * model.n_layer * model.n_embd**2 + PADDED_VOCAB_SIZE * model.n_embd
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        moments=8 * parameters,
        copies=2 * matrices if bf16 else 0,
        activations=tokens * model.n_embd * of_blocks,
        logits=tokens * PADDED_VOCAB_SIZE * 12,
    )
