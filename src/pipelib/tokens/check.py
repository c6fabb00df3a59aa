"""Check a folder of shards against its own manifest. `pipelib.inspection.verify` checks it against DVC."""

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
    """True: its bytes are wrong or missing. False: it is intact but does not belong here, so only the user may remove it."""


@dataclass(frozen=True)
class Report:
    """The result of checking a folder."""

    problems: tuple[Problem, ...]
    good: frozenset[Path]
    """Files whose bytes match their hash."""


def holds_shards(folder: Path) -> bool:
    """Return whether a folder holds shards: its manifest lists them, or is unreadable and there is a validation shard."""
    value = _read_manifest_file(folder)
    return (folder / VALIDATION_SHARD).exists() if value is None else isinstance(value, dict) and "shards" in value


def _read_manifest_file(folder: Path) -> object:
    """Read manifest.json; None if it is missing or cannot be read."""
    try:
        return read_json(folder / MANIFEST)
    except (UserError, OSError):
        return None


def check_shards(folder: Path) -> Report:
    """Check the manifest, every shard and the token counts, and that the folder holds nothing else."""
    try:
        manifest = read_manifest(folder)
        tokenizer = manifest.tokenizer
    except UserError as error:
        what, _, _ = str(error).rpartition(";")  # drop its remedy: DVC would restore a deleted file
        damaged = _read_manifest_file(folder) is None  # otherwise it is intact, but of another version
        remedy = _REPAIR if damaged else "run dvc repro."
        text = f"{what}, so it is unknown what the shards should be; {remedy}"
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
    """Return the problems, the good shards, and the token counts of the training shards (None unless all are good)."""
    problems: list[Problem] = []
    good: set[Path] = set()
    total: Counts | None = np.zeros(tokenizer.size, np.int64)
    progress = Progress(f"verifying {folder}", sum(shard.tokens for shard in manifest.shards), "tokens")
    with ThreadPoolExecutor(available_cores()) as threads:
        # `map` returns in the order of the shards, so the messages have that order too.
        for shard, (found, counts) in zip(
            manifest.shards,
            threads.map(lambda shard: _check_shard(folder, shard, tokenizer), manifest.shards),
            strict=True,
        ):
            problems += [Problem(folder / shard.name, text) for text in found]
            if not found:
                good.add(folder / shard.name)
            if shard.split == "train":
                total = None if total is None or counts is None else total + counts  # one bad shard spoils the sum
            progress.add(shard.tokens)
    progress.close(f"{len(good)} of {len(manifest.shards)} shards are good")
    return problems, good, total


def _check_shard(folder: Path, shard: Shard, tokenizer: Tokenizer) -> tuple[list[str], Counts | None]:
    """Return the problems of a shard, and the counts of its tokens if there are none."""
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
    """Yield a problem if the manifest lists no validation shard, no training shard, or a shard twice."""
    names = [shard.name for shard in manifest.shards]
    path = folder / MANIFEST
    for split in ("val", "train"):
        if not manifest.split(split):
            yield Problem(path, f"{path} lists no {split} shard, so nothing can be trained; {_REPAIR}")
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(path, f"{path} lists {name} twice, so its tokens would count twice; {_REPAIR}")


def _count_problems(folder: Path, counts: Counts | None) -> Iterator[Problem]:
    """Yield a problem if unigram_counts.npy does not hold `counts`. If `counts` is None, only check that it is readable."""
    path = folder / UNIGRAM_COUNTS
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        yield Problem(path, f"{path} is missing, so there is no unigram baseline; run dvc repro.")
        return
    except (ValueError, OSError, EOFError) as error:
        yield Problem(path, f"{path} is not an array of counts ({error}); {_REPAIR}")
        return
    if counts is not None and not (found.dtype == counts.dtype and np.array_equal(found, counts)):
        text = f"{path} does not match the tokens of the training shards"
        yield Problem(path, f"{text}, so the unigram baseline would be wrong; {_REPAIR}")


def _unexpected(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Yield a problem for each file that no stage reads: it changes the folder's hash."""
    expected = {folder / name for name in (MANIFEST, UNIGRAM_COUNTS, *(shard.name for shard in manifest.shards))}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        if path not in expected:
            text = f"{path} is not in the manifest, so DVC sees the folder as changed and would delete the file"
            yield Problem(path, f"{text}; move it away.", damaged=False)
