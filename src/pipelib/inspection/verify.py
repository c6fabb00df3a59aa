"""Verify that DVC's folders are still what it recorded, and remove damage for good.

With hard links, a file of the workspace, its object in DVC's cache and the finished state of the stage are one inode. DVC
trusts read-only objects without reading them (observed with 3.67). So after a bit has flipped

- `dvc repro` says "is cached" and links the damaged bytes again, or "didn't change" if the modification time is the same;
- deleting the workspace's file brings the damaged bytes back;
- even `dvc repro --force`, which makes good bytes, ends with the damaged ones, because an object of that name exists already.

The remedy is to remove the file *and* its object. The run cache and the `.dir` object may stay: DVC restores a folder only
if all its objects exist, and otherwise runs the stage. The stage's state verifies its own hashes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelib.errors import UserError, how_to_repair
from pipelib.files import files_under, remove
from pipelib.processes import available_cores
from pipelib.progress import Progress
from pipelib.tokens.check import Problem, Report, check_shards, holds_shards
from pipelib.workspace.dvc import Out, is_sound, md5_file, objects_folder, read_lock
from pipelib.workspace.places import HERE, MANIFEST, Places

TOKENS = HERE.tokens


# ---- What to verify --------------------------------------------------------------------------------------------------


def find_folders(wanted: Path | None) -> dict[Path, Out | None]:
    """The folders to verify, each with DVC's record of it, or None for a folder of shards that DVC does not know.

    Args:
        wanted: an out of dvc.lock, a path in one, a folder with several outs, or a folder of shards; None for all outs of
            dvc.lock that are in the workspace.

    Raises:
        UserError: there is nothing to verify.
    """
    outs = _outs_near(_absolute(wanted or Path()))
    if wanted is None:
        found: dict[Path, Out | None] = {folder: out for folder, out in outs.items() if folder.is_dir()}
        found |= {TOKENS: None} if TOKENS not in found and holds_shards(TOKENS) else {}
        if not found:
            raise UserError(
                "none of the outs in dvc.lock is here, so there is nothing to verify; run dvc repro, or name a folder."
            )
        return found
    target = _absolute(wanted)
    found = {
        folder: out
        for folder, out in outs.items()
        if _absolute(folder) in (target, *target.parents) or (target in _absolute(folder).parents and folder.is_dir())
    }
    for folder in [*found] or [wanted]:
        if not os.path.isdir(folder):  # noqa: PTH112
            raise UserError(
                f"{folder} is not a folder, so there is nothing to verify; run dvc repro, or name another folder."
            )
    if found or holds_shards(wanted):
        return found or {wanted: None}
    raise UserError(
        f"{wanted} is not an out of dvc.lock and its {MANIFEST} lists no shards, so it is unknown what it should hold, "
        f"and nothing was changed; name one of {', '.join(map(str, outs)) or 'the outs, once dvc repro has made them'}."
    )


def _outs_near(start: Path) -> dict[Path, Out]:
    """The folders of the nearest dvc.lock, by their paths relative to the current folder."""
    parents = (start, *start.parents)
    # os.path.isfile and isdir, since those of Path raise if a name is too long
    root = next((folder for folder in parents if os.path.isfile(Places(folder).lock)), None)  # noqa: PTH113
    if root is None:
        return {}
    stages = read_lock(_from_here(Places(root).lock)).values()
    listed = [out for stage in stages for out in stage.outs if out.md5.endswith(".dir")]
    objects = objects_folder(root) if listed else Path()
    folders = [(_from_here(root / out.path), out.md5) for out in listed]
    return {folder: Out(folder, md5, objects) for folder, md5 in folders}


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # removes `..` without following links


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---- What is wrong ---------------------------------------------------------------------------------------------------


def check_folder(folder: Path, out: Out | None) -> Report:
    """Compare a folder with DVC's record of it and, if it holds shards, with its own manifest."""
    recorded = Report((), frozenset()) if out is None else _check_out(out)
    if not holds_shards(folder):
        return recorded
    shards = check_shards(folder)
    # if the manifest itself is damaged, it may blame shards that match DVC's record: ignore that
    trusted = out is None or folder / MANIFEST in recorded.good or not recorded.good
    problems = [problem for problem in shards.problems if trusted or problem.path not in recorded.good]
    named = {problem.path for problem in problems}
    problems += [problem for problem in recorded.problems if problem.path not in named]
    return Report(tuple(problems), (shards.good | recorded.good) - {problem.path for problem in problems})


def _check_out(out: Out) -> Report:
    """Compare every file's MD5 with DVC's list."""
    found = _sums(out.folder)
    entries = out.entries()
    if entries is not None:
        problems = [p for path in sorted({*entries, *found}) for p in _compare(out, path, entries, found)]
        return Report(tuple(problems), frozenset(found) - {problem.path for problem in problems})
    is_good = _folder_md5(out.folder, found) == out.md5
    problems = [] if is_good else list(_problems_without_list(out, found))
    if out.listing.exists():
        text = f"{out.listing}, DVC's list of {out.folder}, is damaged, so DVC cannot restore the folder"
        problems.append(Problem(out.listing, f"{text}; {how_to_repair(str(out.folder))}."))
    return Report(tuple(problems), frozenset(found if is_good else ()))


def _sums(folder: Path) -> dict[Path, str | None]:
    """The MD5 of every file; None for one that cannot be read."""
    stats = dict(_stats(folder))
    progress = Progress(f"verifying {folder}", sum(stat.st_size for stat in stats.values()), "bytes")
    sums: dict[Path, str | None] = {}
    with ThreadPoolExecutor(available_cores()) as threads:
        for path, sums[path] in zip(stats, threads.map(md5_file, stats), strict=True):
            progress.add(stats[path].st_size)
    progress.close(f"{len(sums)} files read")
    return sums


def _compare(out: Out, path: Path, entries: Mapping[Path, str], found: Mapping[Path, str | None]) -> Iterator[Problem]:
    """What is wrong with one file that DVC recorded or that exists."""
    remedy = how_to_repair(str(out.folder))
    if path not in entries:
        text = (
            f"{path} is not in DVC's list, so DVC considers the folder changed and would delete the file; move it away."
        )
        yield Problem(path, text, damaged=False)
    elif path not in found:
        yield Problem(path, f"{path} is missing, so the folder is not complete; {remedy}.")
    elif (md5 := found[path]) is None:
        yield Problem(path, f"{path} cannot be read, so its content is lost; {remedy}.")
    elif md5 != entries[path]:
        if out.object(md5).is_file():
            text = (
                f"{path} is intact but of another version than dvc.lock has, so results would not be those of dvc.lock"
            )
            yield Problem(path, f"{text}; run dvc repro, or dvc checkout.", damaged=False)
        else:
            text = f"{path} has md5 {md5} and DVC recorded {entries[path]}: its bytes changed"
            yield Problem(path, f"{text}; {remedy}.")


def _problems_without_list(out: Out, found: Mapping[Path, str | None]) -> Iterator[Problem]:
    """What is wrong with a folder that is not what DVC recorded, if DVC's list of its files is lost."""
    linked = out.linked_objects()
    wrong = [path for path in found if path in linked and not is_sound(linked[path])]
    for path in wrong:
        text = (
            f"{path} does not have the md5 in the name of its object in DVC's cache, {linked[path]}: its bytes changed"
        )
        yield Problem(path, f"{text}; {how_to_repair(str(out.folder))}.")
    if not wrong:
        text = f"{out.folder} is not what dvc.lock says, and DVC's list of its files ({out.listing}) is lost or damaged"
        remedy = f"move the folder {out.folder} away and run dvc repro"
        yield Problem(out.folder, f"{text}, so it is unknown which file is wrong; {remedy}.", damaged=False)


def _folder_md5(folder: Path, sums: Mapping[Path, str | None]) -> str:
    """DVC's MD5 of a folder with these files: the MD5 of its list."""
    listing = sorted((path.relative_to(folder).as_posix(), md5) for path, md5 in sums.items())
    text = json.dumps([{"md5": md5, "relpath": relpath} for relpath, md5 in listing])
    return hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest() + ".dir"


# ---- Repair ----------------------------------------------------------------------------------------------------------


def repair(out: Out | None, report: Report) -> list[Path]:
    """Remove each damaged file and its object in DVC's cache, so that the next `dvc repro` makes them again.

    Intact files stay. So does an intact object of a damaged file (DVC copied instead of linking): DVC restores the file
    from it.

    Returns:
        The removed files of the workspace, and the removed objects.
    """
    entries = (out.entries() or {}) if out else {}
    # if DVC's list is lost, the hard links still lead to the objects
    linked = out.linked_objects() if out else {}
    doomed: list[Path] = []
    for path in sorted({problem.path for problem in report.problems if problem.damaged}):
        objects = {out.object(entries[path])} if out and path in entries else set()
        objects |= {linked[path]} if path in linked else set()
        doomed += [
            path,
            *(entry for entry in sorted(objects) if not is_sound(entry) or md5_file(entry) == md5_file(path)),
        ]
    removed = [path for path in doomed if path.exists() or path.is_symlink()]
    for path in removed:
        remove(path)
    return removed


def _stats(folder: Path) -> list[tuple[Path, os.stat_result]]:
    return [(path, path.stat()) for path in files_under(folder)]
