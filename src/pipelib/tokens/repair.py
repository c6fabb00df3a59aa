"""What is wrong with a folder of shards, and how to get rid of it for good.

With hard links, a file of the workspace, DVC's cache object of it and the finished state of the stage are one inode. DVC
trusts read-only objects without reading them (observed with 3.67), so after a bit has flipped

- `dvc repro` says "is cached" and links the damaged bytes again, or, where the time of change stayed, "didn't change";
- deleting the workspace's file brings the damaged bytes back;
- even `dvc repro --force`, which makes good bytes, ends with the damaged ones: an object of that name exists already.

What helps is to remove the file *and* its object. The run cache and the `.dir` object may stay: DVC restores a folder only
when every object of it is there, and otherwise runs the stage. The stage's state verifies its own hashes.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelib.config import read_yaml
from pipelib.errors import UserError
from pipelib.files import remove
from pipelib.model.vocabulary import EOT_TOKEN_ID, VOCAB_SIZE
from pipelib.processes import available_cores
from pipelib.progress import Progress
from pipelib.tokens.shards import (
    MANIFEST,
    UNIGRAM_COUNTS,
    Manifest,
    Shard,
    count_tokens,
    open_shard,
    read_manifest,
    shard_problems,
)

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file."""

    path: Path
    text: str


@dataclass(frozen=True)
class Report:
    """What a check of a folder found."""

    problems: tuple[Problem, ...]
    good: frozenset[Path]
    """Files whose bytes are proved by the manifest's hashes."""


# ---- What is wrong ---------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> Report:
    """Check the manifest, every shard, the token counts, and that nothing else lies there.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, so there is nothing to verify; run dvc repro, or name another folder.")
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        what, _, _ = str(error).rpartition(";")  # its remedy is to delete the file, which DVC would restore
        text = f"{what}, so nothing says what the shards should be; add --repair, then run dvc repro."
        return Report((Problem(folder / MANIFEST, text),), frozenset())
    problems, good, counts = _check_shards(folder, manifest)
    problems += _manifest_problems(folder, manifest)
    problems += _count_problems(folder, counts)
    problems += _unexpected(folder, manifest)
    return Report(tuple(problems), frozenset(good))


def _check_shards(folder: Path, manifest: Manifest) -> tuple[list[Problem], set[Path], Counts | None]:
    """The shards' problems, the good shards, and the token counts of the training shards if all of them are good."""
    problems: list[Problem] = []
    good: set[Path] = set()
    total: Counts | None = np.zeros(VOCAB_SIZE, np.int64)
    progress = Progress(f"verifying {folder}", sum(shard.tokens for shard in manifest.shards), "tokens")
    with ThreadPoolExecutor(available_cores()) as threads:
        for shard, (found, counts) in zip(
            manifest.shards, threads.map(lambda shard: _check_shard(folder, shard), manifest.shards), strict=True
        ):
            problems += [Problem(folder / shard.name, text) for text in found]
            if not found:
                good.add(folder / shard.name)
            if shard.split == "train":
                total = None if total is None or counts is None else total + counts
            progress.add(shard.tokens)
    progress.close(f"{len(good)} of {len(manifest.shards)} shards are good")
    return problems, good, total


def _check_shard(folder: Path, shard: Shard) -> tuple[list[str], Counts | None]:
    """What is wrong with a shard, and the counts of its tokens if nothing is."""
    path = folder / shard.name
    try:
        problems = shard_problems(folder, shard)
        if problems:
            return problems, None
        counts = count_tokens([open_shard(path)])
    except OSError as error:
        return [f"{path} cannot be read ({error}), so its tokens are lost; add --repair, then run dvc repro."], None
    if counts[EOT_TOKEN_ID] != shard.documents:
        text = f"{path} holds {counts[EOT_TOKEN_ID]} documents and the manifest says {shard.documents}"
        return [f"{text}, so one of the two is wrong; add --repair, then run dvc repro."], None
    return [], counts


def _manifest_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """A manifest that names no validation shard, no training shard, or one shard twice."""
    names = [shard.name for shard in manifest.shards]
    path = folder / MANIFEST
    for split in ("val", "train"):
        if not manifest.split(split):
            yield Problem(
                path, f"{path} lists no {split} shard, so nothing can be trained; add --repair, then run dvc repro."
            )
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(
            path, f"{path} lists {name} twice, so its tokens would count twice; add --repair, then run dvc repro."
        )


def _count_problems(folder: Path, counts: Counts | None) -> Iterator[Problem]:
    """Whether unigram_counts.npy holds `counts`; without them nothing but its presence can be said."""
    path = folder / UNIGRAM_COUNTS
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        yield Problem(path, f"{path} is missing, so there is no unigram baseline; run dvc repro.")
        return
    except (ValueError, OSError, EOFError) as error:
        yield Problem(path, f"{path} is no array of counts ({error}); add --repair, then run dvc repro.")
        return
    if counts is not None and not (found.dtype == counts.dtype and np.array_equal(found, counts)):
        text = f"{path} does not hold how often each token occurs in the training shards"
        yield Problem(path, f"{text}, so the unigram baseline would be wrong; add --repair, then run dvc repro.")


def _unexpected(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files that nothing reads and that change the folder's hash."""
    expected = {folder / name for name in (MANIFEST, UNIGRAM_COUNTS, *(shard.name for shard in manifest.shards))}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        if path not in expected:
            text = f"{path} is not in the manifest, so DVC takes the folder for changed"
            yield Problem(path, f"{text}; move it away, or add --repair to delete it.")


# ---- How to get rid of it --------------------------------------------------------------------------------------------


def repair(folder: Path, report: Report) -> list[Path]:
    """Remove each damaged file and DVC's object of it, so that the next `dvc repro` makes them again.

    An object that is sound while the workspace's file is not (DVC copied instead of linking) stays: DVC restores it.
    What no hash of the manifest proves (the manifest itself, the counts) goes too where its object is damaged.

    Returns:
        What was removed: files of the workspace, and objects.

    Raises:
        UserError: DVC knows the folder and cannot say where its cache is.
    """
    damaged = {problem.path for problem in report.problems}
    listing, objects = cache_objects(folder)
    doomed = [] if listing is None or _is_sound(listing) else [listing]
    for path in sorted((damaged | objects.keys()) - report.good):
        bad = [entry for entry in objects.get(path, ()) if _is_bad(entry, path if path in damaged else None)]
        doomed += [path, *bad] if path in damaged or bad else []
    removed = [path for path in doomed if path.exists() or path.is_symlink()]
    for path in removed:
        remove(path)
    return removed


def _is_bad(entry: Path, damaged: Path | None) -> bool:
    """Whether an object is damaged: by its own name, or because it has the bytes of a damaged file."""
    return not _is_sound(entry) or (damaged is not None and _md5(entry) == _md5(damaged))


def cache_objects(folder: Path) -> tuple[Path | None, dict[Path, set[Path]]]:
    """DVC's list of a folder that is an out of dvc.lock, and its cache objects of the files in the folder, by file.

    The objects are found by that list, and by inode where it is lost or of another version.

    Raises:
        UserError: dvc cannot say where its cache is.
    """
    root, md5 = _locked_out(folder)
    if root is None:
        return None, {}
    cache = _cache_folder(root) / "files" / "md5"
    listing = _object(cache, md5)
    objects: dict[Path, set[Path]] = {}
    for entry in json.loads(listing.read_bytes()) if listing.is_file() and _is_sound(listing) else ():
        objects.setdefault(folder / entry["relpath"], set()).add(_object(cache, entry["md5"]))
    by_inode = {(stat.st_dev, stat.st_ino): path for path in cache.glob("??/*") for stat in [path.stat()]}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        if linked := by_inode.get((stat.st_dev, stat.st_ino)):
            objects.setdefault(path, set()).add(linked)
    return listing, objects


def _locked_out(folder: Path) -> tuple[Path | None, str]:
    """The folder of the nearest dvc.lock that has `folder` as an out, and the out's md5."""
    target = folder.absolute()
    for root in target.parents:
        if (root / "dvc.lock").is_file():
            stages = read_yaml(root / "dvc.lock").get("stages", {}).values()
            for out in (out for stage in stages for out in stage.get("outs", ())):
                if root / out["path"] == target and out.get("md5"):
                    return root, str(out["md5"])
    return None, ""


def _cache_folder(root: Path) -> Path:
    """Where the DVC of this environment keeps its cache."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"`dvc cache dir` failed in {root} ({done.stderr.strip()}), so the damaged objects cannot be found and DVC would "
            "restore them; nothing was removed: mend DVC first (`pipelib doctor`)."
        )
    return root / done.stdout.strip()


def _object(cache: Path, digest: str) -> Path:
    return cache / digest[:2] / digest[2:]


def _is_sound(entry: Path) -> bool:
    """Whether an object has the md5 that it is named by; a missing one does no harm."""
    return not entry.exists() or _md5(entry) == entry.parent.name + entry.name.removesuffix(".dir")


def _md5(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return None
