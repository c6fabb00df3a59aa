"""What is wrong with a folder of shards, by its own manifest; DVC is not asked (`pipelib.inspection.verify` does that)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError
from pipelib.files import read_json
from pipelib.processes import available_cores
from pipelib.progress import Progress
from pipelib.tokens.shards import (
    UNIGRAM_COUNTS,
    VALIDATION_SHARD,
    Manifest,
    Shard,
    count_tokens,
    open_shard,
    read_manifest,
    shard_problems,
)
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import MANIFEST

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file."""

    path: Path
    text: str
    damaged: bool = True
    """Its bytes are wrong or missing. False: it is whole, but does not belong here, so nobody but the user may remove it."""


@dataclass(frozen=True)
class Report:
    """What a check of a folder found."""

    problems: tuple[Problem, ...]
    good: frozenset[Path]
    """Files whose bytes are proved by a hash."""


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards: its manifest lists them, or is no manifest at all and a validation shard is there."""
    value = _read_manifest_file(folder)
    return (folder / VALIDATION_SHARD).exists() if value is None else isinstance(value, dict) and "shards" in value


def _read_manifest_file(folder: Path) -> object:
    """What manifest.json holds; None where it is missing or cannot be read."""
    try:
        return read_json(folder / MANIFEST)
    except (UserError, OSError):
        return None


def check_shards(folder: Path) -> Report:
    """Check the manifest, every shard, the token counts, and that nothing else lies there."""
    try:
        manifest = read_manifest(folder)
        tokenizer = manifest.tokenizer
    except UserError as error:
        what, _, _ = str(error).rpartition(";")  # its remedy may be to delete the file, which DVC would restore
        damaged = _read_manifest_file(folder) is None  # else it is another version's, and whole
        remedy = _REPAIR if damaged else "run dvc repro."
        text = f"{what}, so nothing says what the shards should be; {remedy}"
        return Report((Problem(folder / MANIFEST, text, damaged),), frozenset())
    problems, good, counts = _check_shards(folder, manifest, tokenizer)
    problems += _manifest_problems(folder, manifest)
    problems += _count_problems(folder, counts)
    problems += _unexpected(folder, manifest)
    return Report(tuple(problems), frozenset(good))


_REPAIR = "add --repair, then run dvc repro."


def _check_shards(
    folder: Path, manifest: Manifest, tokenizer: Tokenizer
) -> tuple[list[Problem], set[Path], Counts | None]:
    """The shards' problems, the good shards, and the token counts of the training shards if all of them are good."""
    problems: list[Problem] = []
    good: set[Path] = set()
    total: Counts | None = np.zeros(tokenizer.size, np.int64)
    progress = Progress(f"verifying {folder}", sum(shard.tokens for shard in manifest.shards), "tokens")
    with ThreadPoolExecutor(available_cores()) as threads:
        for shard, (found, counts) in zip(
            manifest.shards,
            threads.map(lambda shard: _check_shard(folder, shard, tokenizer), manifest.shards),
            strict=True,
        ):
            problems += [Problem(folder / shard.name, text) for text in found]
            if not found:
                good.add(folder / shard.name)
            if shard.split == "train":
                total = None if total is None or counts is None else total + counts
            progress.add(shard.tokens)
    progress.close(f"{len(good)} of {len(manifest.shards)} shards are good")
    return problems, good, total


def _check_shard(folder: Path, shard: Shard, tokenizer: Tokenizer) -> tuple[list[str], Counts | None]:
    """What is wrong with a shard, and the counts of its tokens if nothing is."""
    path = folder / shard.name
    try:
        problems = shard_problems(folder, shard, tokenizer)
        if problems:
            return problems, None
        counts = count_tokens([open_shard(path)], tokenizer.size)
    except OSError as error:
        return [f"{path} cannot be read ({error}), so its tokens are lost; {_REPAIR}"], None
    documents = counts[tokenizer.end_token_id]
    if documents != shard.documents:
        text = f"{path} holds {documents} documents and the manifest says {shard.documents}"
        return [f"{text}, so one of the two is wrong; {_REPAIR}"], None
    return [], counts


def _manifest_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """A manifest that names no validation shard, no training shard, or one shard twice."""
    names = [shard.name for shard in manifest.shards]
    path = folder / MANIFEST
    for split in ("val", "train"):
        if not manifest.split(split):
            yield Problem(path, f"{path} lists no {split} shard, so nothing can be trained; {_REPAIR}")
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(path, f"{path} lists {name} twice, so its tokens would count twice; {_REPAIR}")


def _count_problems(folder: Path, counts: Counts | None) -> Iterator[Problem]:
    """Whether unigram_counts.npy holds `counts`; without them nothing but its presence can be said."""
    path = folder / UNIGRAM_COUNTS
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        yield Problem(path, f"{path} is missing, so there is no unigram baseline; run dvc repro.")
        return
    except (ValueError, OSError, EOFError) as error:
        yield Problem(path, f"{path} is no array of counts ({error}); {_REPAIR}")
        return
    if counts is not None and not (found.dtype == counts.dtype and np.array_equal(found, counts)):
        text = f"{path} does not hold how often each token occurs in the training shards"
        yield Problem(path, f"{text}, so the unigram baseline would be wrong; {_REPAIR}")


def _unexpected(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files that nothing reads and that change the folder's hash."""
    expected = {folder / name for name in (MANIFEST, UNIGRAM_COUNTS, *(shard.name for shard in manifest.shards))}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        if path not in expected:
            text = f"{path} is not in the manifest, so DVC takes the folder for changed and would delete it"
            yield Problem(path, f"{text}; move it away.", damaged=False)
