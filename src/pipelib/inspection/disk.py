"""The size of the corpus and the disk space that a run needs, by arithmetic; and whether the disk has room for it."""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG

from pipelib.corpus.raw import TEXT
from pipelib.errors import UserError
from pipelib.files import format_bytes, nearest_folder
from pipelib.params import Params
from pipelib.tokens.shards import HEADER_BYTES, Manifest, Shard, read_manifest
from pipelib.training.checkpoint import checkpoint_bytes
from pipelib.training.memory import Footprint
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.planned import planned_size, planned_tokenizer
from pipelib.vocabulary.tokenizer import token_type
from pipelib.workspace.places import HERE, MANIFEST, Places, state_root


@dataclass(frozen=True)
class Corpus:
    """The size of the corpus."""

    tokens: int
    """All tokens, including the validation shard and one `<|endoftext|>` per document."""
    raw_bytes: int
    """Bytes of data/raw."""
    origin: str
    """How the size is known."""
    is_exact: bool = False
    """Whether `tokens` is a count, not an estimate."""
    files: int = 1
    """Files of data/raw, about equally large. From the hub, `download.max_tokens` takes whole files."""

    def prefix(self, max_tokens: int | None) -> "Corpus":
        """The corpus cut to `download.max_tokens`."""
        if max_tokens is None or max_tokens >= self.tokens:
            return self
        share = max_tokens / self.tokens
        files = math.ceil(self.files * share)
        # the hub's files are downloaded whole
        raw_bytes = round(self.raw_bytes * (files / self.files if self.files > 1 else share))
        return Corpus(max_tokens, raw_bytes, f"about download.max_tokens, from {self.origin}", files=files)


_DOCS = Corpus(7_400_214, 7_428_143, "an estimate: the offline corpus varies with the packages' versions")
_HUB = {
    ("HuggingFaceFW/fineweb-edu", "sample/10BT"): Corpus(
        9_972_918_177 + 9_672_101,
        28_518_193_415,
        "the hub's own count of tokens, and one for each of 9,672,101 documents",
        is_exact=True,
        files=14,
    )
}


def corpus_of(params: Params, root: Path) -> Corpus | None:
    """The corpus of a parameter file: the one in `root`/data if it was made with these parameters, else a known size.

    None if the size is unknown until the stages have run.
    """
    return _made_corpus(params, root) or _known_corpus(params)


def _known_corpus(params: Params) -> Corpus | None:
    download = params.download
    match download.source:
        case "docs":
            known: Corpus | None = _DOCS
        case "hub":
            known = _HUB.get((download.repo, download.folder))
        case _:
            known = None
    if known and params.vocabulary.source != "gpt2":
        known = replace(known, origin=f"{known.origin}; in GPT-2's tokens", is_exact=False)
    return known.prefix(download.max_tokens) if known else None


def _made_corpus(params: Params, root: Path) -> Corpus | None:
    try:
        manifest = read_manifest(Places(root).tokens)
    except UserError:
        return None
    download, source = params.download, manifest.source
    wanted: dict[str, object] = {"kind": download.source, "max_tokens": download.max_tokens}
    if download.source in ("hub", "local") and download.text_column != TEXT:
        wanted["text_column"] = download.text_column
    if download.source == "hub":
        wanted |= {"repo": download.repo, "revision": download.revision, "folder": download.folder}
    # other parameters would give other tokens
    if not _is_of(manifest, params.vocabulary):
        return None
    has_dedup = manifest.dedup.get("method") if manifest.dedup else "none"
    if has_dedup != params.tokenize.dedup or any(source.get(key) != value for key, value in wanted.items()):
        return None
    raw_bytes = sum(path.stat().st_size for path in Places(root).raw.glob("*.parquet"))
    tokens = sum(shard.tokens for shard in manifest.shards)
    return Corpus(tokens, raw_bytes, f"as {HERE.tokens / MANIFEST} says", is_exact=True)


def _is_of(manifest: Manifest, params: VocabularyParams) -> bool:
    """Whether shards were made with the vocabulary that the parameters ask for, as far as it is known before it is trained."""
    tokenizer = planned_tokenizer(params)
    if tokenizer:
        return manifest.encoding == tokenizer.encoding
    return manifest.encoding["name"] == f"bpe-{params.vocab_size}"


def manifest_of(corpus: Corpus, shard_tokens: int) -> Manifest:
    """A manifest with the corpus's number of tokens: one validation shard, and the rest."""
    val = min(shard_tokens, corpus.tokens)
    shards = (Shard("", "val", val, 0, ""), Shard("", "train", corpus.tokens - val, 0, ""))
    return Manifest({}, {}, shards)


@dataclass(frozen=True)
class Disk:
    """Bytes that the stages write; hard links count once."""

    raw: int | None
    tokens: int | None
    units: int | None
    """Encoded text, while tokenize runs."""
    checkpoints: int
    """Checkpoints, while train runs."""
    model: int
    token_bytes: int
    """Of a token in a shard."""

    @property
    def total(self) -> int:
        """The most at any time, as far as known."""
        return (self.raw or 0) + (self.tokens or 0) + max(self.units or 0, self.checkpoints) + self.model


def disk_of(params: Params, corpus: Corpus | None) -> Disk:
    """Compute the bytes: 2 or 4 per token and a header per shard; a checkpoint's fp32 weights and optimizer state, 12 per
    parameter with AdamW; 4 per parameter in models/.
    """
    vocab_size = planned_size(params.vocabulary)
    footprint = Footprint(params.model, vocab_size, params.train)
    checkpoints = checkpoint_bytes(footprint, params.logging.checkpoint_every)
    model = 4 * params.model.parameters(vocab_size)
    width = token_type(vocab_size).itemsize
    if corpus is None:
        return Disk(None, None, None, checkpoints, model, width)
    shards = -(-corpus.tokens // params.tokenize.shard_size(corpus.tokens))
    tokens = width * corpus.tokens
    return Disk(corpus.raw_bytes, tokens + HEADER_BYTES * shards, tokens, checkpoints, model, width)


def check_disk(file: Path, params: Params, corpus: Corpus | None) -> str:
    """Return a line with the space that the stages need, the space in use, and the free space.

    Raises:
        UserError: the space is clearly too small. Space that earlier runs use counts as available to this run.
    """
    need, folder = disk_of(params, corpus).total, nearest_folder(state_root())
    have, free = used_bytes([HERE.data, HERE.model, state_root()]), shutil.disk_usage(folder).free
    known = "" if corpus else " plus the text, whose size is known once tokenize has run"
    used = f"{format_bytes(have)} are in use by earlier runs"
    said = f"{file}: the stages take at most {format_bytes(need)} of disk{known}; {used}"
    if need - have > free:
        raise UserError(
            f"{said}, and {folder} has {format_bytes(free)} free: {format_bytes(need - have - free)} too little, so a stage "
            "would stop half-way; free some space (`pipelib clean` lists old state, `dvc gc -w` old cache), set "
            "PIPELIB_STATE_DIR to a larger disk, or lower download.max_tokens."
        )
    return f"{said}, {format_bytes(free)} are free."


def used_bytes(folders: Iterable[Path]) -> int:
    """The bytes of the files in folders; hard links count once."""
    files = {(stat.st_dev, stat.st_ino): stat.st_size for folder in folders for stat in _stats(folder)}
    return sum(files.values())


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except OSError:  # removed meanwhile, or a broken link
            continue
        if S_ISREG(stat.st_mode):
            yield stat
