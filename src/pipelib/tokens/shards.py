"""Token shards in llm.c's format, and the manifest beside them.

A shard is a header of 256 little-endian int32 (20240520, 1, number of tokens, zeros), then the tokens as little-endian
uint16 (https://github.com/karpathy/llm.c, `dev/data/data_common.py`). So llm.c's and modded-nanogpt's loaders read our
shards, and ours reads theirs. A vocabulary of more than 65,536 tokens has llm.c's format for Llama 3: 20240801, 7, and uint32.
The first shard is always the validation split, however much training data there is.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError, how_to_repair
from pipelib.files import format_json, read_json, sha256_file, write_atomic, write_json, write_text
from pipelib.processes import available_cores
from pipelib.vocabulary.choice import find_tokenizer
from pipelib.vocabulary.tokenizer import Tokenizer, Tokens, token_type
from pipelib.workspace.places import HERE, MANIFEST

VERSION, HEADER_BYTES = 1, 1024
HEADERS = {"<u2": (20240520, 1), "<u4": (20240801, 7)}
"""The first two numbers of a shard, by the type of its tokens."""
VALIDATION_SHARD = "val_000000.bin"
UNIGRAM_COUNTS = "unigram_counts.npy"
_CHUNK = 1 << 20

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """A line of the manifest."""

    name: str
    split: str
    """`val` or `train`."""
    tokens: int
    documents: int
    """Documents that start in this shard."""
    sha256: str
    """Of the whole file, header included."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and what it was made from. The manifest's hash is the fingerprint of the data."""

    encoding: dict[str, str]
    source: Mapping[str, Any]
    shards: tuple[Shard, ...]
    dedup: dict[str, Any] | None = None
    """How duplicates were found, and how many documents were left out; None without deduplication."""
    validation_bytes: int | None = None
    """Bytes of the validation text before it was normalised; None if the vocabulary normalises no text: its tokens show it."""
    vocabulary: Path | None = field(default=None, compare=False)
    """The folder of the vocabulary, if it is not data/vocabulary. It is not part of the file."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            UserError: this code does not have that tokenizer.
        """
        return find_tokenizer(self.encoding, *([self.vocabulary] if self.vocabulary else []))

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of manifest.json: equal if and only if all tokens and their origin are equal."""
        return hashlib.sha256(self._text().encode("utf-8")).hexdigest()

    def split(self, name: str) -> list[Shard]:
        """Return the shards of `val` or `train`, in order."""
        return [shard for shard in self.shards if shard.split == name]

    def tokens(self, split: str) -> int:
        """Return the number of tokens in a split."""
        return sum(shard.tokens for shard in self.split(split))

    def write(self, folder: Path) -> None:
        """Write manifest.json. It is written last, because it declares the folder complete."""
        write_text(folder / MANIFEST, self._text())

    def _text(self) -> str:
        fields = asdict(self)
        del fields["vocabulary"]
        found = {key: fields.pop(key) for key in ("dedup", "validation_bytes")}
        return format_json({"version": VERSION, **fields, **{key: value for key, value in found.items() if value}})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder of shards.

    Raises:
        UserError: it is missing, is not JSON, or has another version.
    """
    path = folder / MANIFEST
    value = read_json(path)
    version = value.get("version")
    if version != VERSION:
        raise UserError(
            f"{path} has version {version!r} and this code reads {VERSION}, so its shards could be misread; "
            "run dvc repro to make them again."
        )
    try:
        shards = tuple(Shard(**shard) for shard in value["shards"])
        beside = folder.with_name(HERE.vocabulary.name)
        text_bytes = value.get("validation_bytes")
        manifest = Manifest(value["encoding"], value["source"], shards, value.get("dedup"), text_bytes, beside)
        # JSON may hold values of any type; a wrong one would fail much later, and less clearly.
        for shard in shards:
            for name, kind in Shard.__annotations__.items():
                if type(getattr(shard, name)) is not kind:
                    raise TypeError(f"{name} is {getattr(shard, name)!r}")
        if not (isinstance(manifest.source, dict) and isinstance(manifest.dedup, dict | None)):
            raise TypeError("source or dedup is not an object")
        if not isinstance(text_bytes, int | None):
            raise TypeError(f"validation_bytes is {text_bytes!r}")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a manifest of shards ({error!r}), so they cannot be trusted; {_REPAIR}"
        ) from None
    return manifest


def shard_name(index: int) -> str:
    """Return the name of a shard: `val_000000.bin`, `train_000001.bin`, ..."""
    return f"{'train' if index else 'val'}_{index:06d}.bin"


def write_shard(path: Path, tokens: int, pieces: Iterable[Tokens], tokenizer: Tokenizer) -> tuple[Shard, Counts]:
    """Write one shard, and count how often each token occurs in it (vocab_size,).

    Args:
        tokens: the number of tokens.
        pieces: the tokens in order, in arrays of any length. A document starts at each end token.
    """
    counts = np.zeros(tokenizer.size, np.int64)
    start = header(tokens, tokenizer.size)
    digest = hashlib.sha256(start)  # hash while writing, so that the file is not read again
    with write_atomic(path) as file:
        file.write(start)
        for piece in pieces:
            data = piece.astype(tokenizer.token_type, copy=False).data
            file.write(data)
            digest.update(data)
            counts += count_tokens([piece], tokenizer.size)
        assert counts.sum() == tokens, f"{path} got {counts.sum()} tokens and was to get {tokens}"
    split = path.name.partition("_")[0]
    return Shard(path.name, split, tokens, int(counts[tokenizer.end_token_id]), digest.hexdigest()), counts


def header(tokens: int, vocab_size: int = 0) -> bytes:
    """Return the first 1,024 bytes of a shard with tokens of a vocabulary of this size."""
    numbers = np.zeros(HEADER_BYTES // 4, "<i4")
    numbers[:3] = *HEADERS[token_type(vocab_size).str], tokens
    return numbers.tobytes()


def open_shard(path: Path) -> Tokens:
    """Memory-map a shard's tokens (N,), read-only, for reading all of them in order.

    Raises:
        UserError: see `shard_tokens`.
    """
    kind, _ = _read_header(path)
    return np.memmap(path, kind, "r", offset=HEADER_BYTES)


class ShardFile:
    """An open shard, for reading a few tokens at a time. The file is closed with the object.

    Raises:
        UserError: see `shard_tokens`.
    """

    def __init__(self, path: Path) -> None:
        self._kind, _ = _read_header(path)
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, count: int) -> Tokens:
        """Return tokens [start, start + count). Threads may call it at the same time.

        Raises:
            UserError: the file ends before them.
        """
        width = self._kind.itemsize
        data = os.pread(self._descriptor, width * count, HEADER_BYTES + width * start)
        if len(data) != width * count:
            raise UserError(
                f"{self._path} ends before token {start + count}, so it was cut short after it was checked; {_REPAIR}"
            )
        return np.frombuffer(data, self._kind)


def shard_tokens(path: Path) -> int:
    """Return the number of tokens in a shard, from its header.

    Raises:
        UserError: the file is missing, its header is not a shard's, or its length does not match the header.
    """
    return _read_header(path)[1]


def _read_header(path: Path) -> tuple["np.dtype[Any]", int]:
    """Return the type and the number of a shard's tokens. For the errors see `shard_tokens`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            numbers = np.frombuffer(file.read(HEADER_BYTES), "<i4")
    except FileNotFoundError:
        raise UserError(f"{path} is missing, so its tokens cannot be read; run dvc repro.") from None
    except ValueError:  # not a whole number of int32
        numbers = np.zeros(0, "<i4")
    kind = next((kind for kind, start in HEADERS.items() if start == tuple(numbers[:2].tolist())), None)
    if len(numbers) != HEADER_BYTES // 4 or kind is None:
        raise UserError(f"{path} does not begin with a shard's header, so it is not a shard; {_REPAIR}")
    expected = HEADER_BYTES + np.dtype(kind).itemsize * int(numbers[2])
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes where its header's {numbers[2]} tokens need {expected}, "
            f"so it has too few or too many tokens; {_REPAIR}"
        )
    if not numbers[2]:
        raise UserError(f"{path} holds no tokens, so there is nothing to read; {_REPAIR}")
    return np.dtype(kind), int(numbers[2])


_REPAIR = how_to_repair(str(HERE.tokens)) + "."


def shard_problems(folder: Path, shard: Shard, tokenizer: Tokenizer) -> list[str]:
    """Check one shard's header, length, tokens and hash. Return the problems; empty if there are none."""
    path = folder / shard.name
    try:
        tokens = open_shard(path)
    except UserError as error:
        return [str(error)]
    # Report every difference, not only the first.
    problems: list[str] = []
    if len(tokens) != shard.tokens:
        problems.append(f"{path} has {len(tokens)} tokens and the manifest says {shard.tokens}; {_REPAIR}")
    largest = max(int(tokens[start : start + _CHUNK].max()) for start in range(0, len(tokens), _CHUNK))
    if largest >= tokenizer.size:
        problems.append(f"{path} holds the token {largest}, which {tokenizer.title} does not have; {_REPAIR}")
    actual = sha256_file(path)
    if actual != shard.sha256:
        problems.append(
            f"{path} has sha256 {actual} and the manifest says {shard.sha256}: its bytes changed; {_REPAIR}"
        )
    return problems


def verify_shards(folder: Path, manifest: Manifest, record: Path | None = None) -> None:
    """Read every shard, and refuse a folder that differs from its manifest in any byte.

    Args:
        record: a file that names the shards which were found right, with their size, time and inode. Shards that have them still
            are not read again: 15T tokens have 30 TB.

    Raises:
        UserError: lists every problem of every shard.
    """
    tokenizer, files = manifest.tokenizer, {shard.name: _stat(folder / shard.name) for shard in manifest.shards}
    right = _known_as_right(record, manifest) if record is not None else {}
    unread = [shard for shard in manifest.shards if not files[shard.name] or right.get(shard.name) != files[shard.name]]
    with ThreadPoolExecutor(available_cores(), "hash") as threads:  # hashing and NumPy release the GIL
        found = threads.map(lambda shard: shard_problems(folder, shard, tokenizer), unread)
        problems = [problem for of_shard in found for problem in of_shard]
    if problems:
        raise UserError("\n".join(problems))
    if record is not None and unread:
        write_json(record, {"manifest": manifest.fingerprint, "files": files})


def _known_as_right(record: Path, manifest: Manifest) -> Mapping[str, Any]:
    """What a record says of these shards; nothing if it is damaged or about others: it only saves time."""
    try:
        known = json.loads(record.read_bytes())
        return dict(known["files"]) if known["manifest"] == manifest.fingerprint else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _stat(path: Path) -> list[int]:
    """What changes if a file is written again; empty if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def count_tokens(arrays: Iterable[Tokens], vocab_size: int) -> Counts:
    """Count how often each token of a vocabulary occurs (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for tokens in arrays:
        for start in range(0, len(tokens), _CHUNK):  # in chunks, because bincount converts its input to 64 bits
            counts += np.bincount(tokens[start : start + _CHUNK], minlength=vocab_size)
    return counts
