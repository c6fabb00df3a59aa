"""The files of a run of the pipeline: of a folder, of a commit, or of an experiment of DVC.

Parameters, metrics and dvc.lock are in git. The outs are in DVC's cache, found by the MD5 that dvc.lock has of them; nothing
is checked out and nothing is fetched.
"""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelib.cli.outs import cache_folder
from pipelib.config import flatten, parse_yaml
from pipelib.errors import UserError
from pipelib.stage import RESULT, SPEED

STAGES = ("download", "tokenize", "train", "evaluate")
ITEMS = Path("reports/items.npz")


@dataclass(frozen=True)
class Run:
    """What is known of a run."""

    name: str
    """As the user calls it."""
    where: str
    """Where its files are: a folder, or a commit."""
    params: Mapping[str, object]
    """Flat: `train.max_lr`; without `logging`, which changes no result."""
    metrics: Mapping[str, Mapping[str, object]]
    """By stage, flat."""
    speed: Mapping[str, Mapping[str, object]]
    """By stage, flat."""
    lock: Mapping[str, Any]
    """The stages of dvc.lock."""
    items: Path | None
    """The bytes of reports/items.npz; None where they are neither in the workspace nor in the cache."""

    def md5(self, path: str) -> str:
        """DVC's MD5 of an out; empty where dvc.lock has none."""
        outs = [out for stage in self.lock.values() for out in stage.get("outs", ())]
        return next((str(out.get("md5", "")) for out in outs if out["path"] == path), "")

    def code(self) -> dict[str, str]:
        """MD5 of every file of code, by its path."""
        deps = [dep for stage in self.lock.values() for dep in stage.get("deps", ())]
        return {dep["path"]: dep["md5"] for dep in deps if dep["path"].startswith(("src/", "stages/"))}


def find_run(name: str) -> Run:
    """The run that a user calls `name`: `workspace`, a folder of a checkout, a git revision, or an experiment of DVC.

    Raises:
        UserError: there is no such run, or it has no metrics.
    """
    folder = Path("." if name == "workspace" else name)
    if (folder / "params.yaml").is_file():
        items = folder / ITEMS
        return _run(name, folder.as_posix(), lambda path: _read(folder / path), items if items.is_file() else None)
    commit = _commit(name)
    run = _run(name, commit[:10], lambda path: _git("show", f"{commit}:./{path}"), None)
    speed = {stage: _numbers(_read(_object(run.md5(SPEED.format(stage))))) for stage in STAGES}
    return replace(run, items=_cached(run.md5(ITEMS.parent.as_posix()), ITEMS.name), speed=speed)


def _run(name: str, where: str, read: Callable[[str], bytes | None], items: Path | None) -> Run:
    params, lock = read("params.yaml"), read("dvc.lock")
    if params is None:
        raise UserError(f"{name} ({where}) has no params.yaml, so it is no run of this pipeline; name another one.")
    metrics = {stage: _numbers(read(RESULT.format(stage))) for stage in STAGES}
    if not metrics["train"]:
        raise UserError(
            f"{name} ({where}) has no metrics/train.json, so nothing was trained there that could be compared; run dvc repro "
            "there and commit its metrics, or name another run (`dvc exp list`, `git log`)."
        )
    return Run(
        name,
        where,
        {key: value for key, value in flatten(parse_yaml(params, "params.yaml")) if not key.startswith("logging.")},
        metrics,
        {stage: _numbers(read(SPEED.format(stage))) for stage in STAGES},
        parse_yaml(lock, "dvc.lock").get("stages", {}) if lock else {},
        items,
    )


def _numbers(content: bytes | None) -> dict[str, object]:
    return dict(flatten(json.loads(content))) if content else {}


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _git(*arguments: str) -> bytes | None:
    done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _commit(name: str) -> str:
    """The commit of a revision, or of an experiment, which DVC keeps under refs/exps/."""
    found = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if found is None:
        refs = (_git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps/") or b"").decode().splitlines()
        commits = {ref.split(" ")[0] for ref in refs if ref.endswith(f"/{name}") and "/exec/" not in ref}
        if len(commits) != 1:
            many = "is the name of several experiments" if commits else "is no folder, git revision or experiment"
            raise UserError(
                f"{name} {many}, so there is nothing to compare; `dvc exp list --all-commits` names the experiments, and "
                "`workspace` is what lies here."
            )
        return commits.pop()
    return found.decode().strip()


def _cached(md5: str, name: str) -> Path | None:
    """DVC's object of a file of a folder, by the folder's MD5; None where the cache does not have it."""
    listing = _read(_object(md5))
    entries = json.loads(listing) if listing else []
    file = next((entry["md5"] for entry in entries if entry["relpath"] == name), "")
    return _object(file) if _object(file).is_file() else None


def _object(md5: str) -> Path:
    """Where DVC keeps the bytes of that MD5, if it has them; a path to nothing where there is none."""
    return cache_folder(Path.cwd()) / "files/md5" / (md5[:2] or "none") / md5[2:]


def changed_code(first: Run, second: Run) -> list[str]:
    """Files of code in which two runs differ."""
    one, two = first.code(), second.code()
    return sorted(path for path in one.keys() | two.keys() if one.get(path) != two.get(path))


def differing_params(runs: Sequence[Run]) -> Iterator[tuple[str, list[object]]]:
    """Parameters that are not the same in all runs, with their values."""
    for key in dict.fromkeys(key for run in runs for key in run.params):
        values = [run.params.get(key) for run in runs]
        if any(value != values[0] for value in values):
            yield key, values
