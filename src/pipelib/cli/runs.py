"""The files of a run of the pipeline: of a folder, of a commit, or of an experiment of DVC.

Parameters, metrics and dvc.lock are in git. The outs are in DVC's cache, found by the MD5 that dvc.lock has of them; nothing
is checked out and nothing is fetched.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelib.cli.outs import Out, cache_folder
from pipelib.config import flatten, parse_yaml
from pipelib.dvc_files import LOCK, LockedStage, parse_lock, parse_metrics, read_if_there
from pipelib.errors import UserError
from pipelib.provenance import GitError, run_git
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
    lock: Mapping[str, LockedStage]
    """The stages of dvc.lock."""
    items: Path | None
    """The bytes of reports/items.npz; None where they are neither in the workspace nor in the cache."""

    def md5(self, path: str) -> str:
        """DVC's MD5 of an out; empty where dvc.lock has none."""
        return next((out.md5 for stage in self.lock.values() for out in stage.outs if out.path == path), "")

    def code(self) -> dict[str, str]:
        """MD5 of every file of code, by its path."""
        deps = [dep for stage in self.lock.values() for dep in stage.deps]
        return {dep.path: dep.md5 for dep in deps if dep.path.startswith(("src/", "stages/"))}


def find_run(name: str) -> Run:
    """The run that a user calls `name`: `workspace`, a folder of a checkout, a git revision, or an experiment of DVC.

    Raises:
        UserError: there is no such run, it has no metrics, or a file of it is broken; in git's words where git fails.
    """
    folder = Path("." if name == "workspace" else name)
    if os.path.isfile(folder / "params.yaml"):  # noqa: PTH113  (Path.is_file raises where a name is too long)
        items = folder / ITEMS
        return _run(_InFolder(name, folder), items if items.is_file() else None)
    files = _InCommit(name, _commit(name))
    run = _run(files, None)
    speed = {
        stage: _metrics(files, SPEED.format(stage), _read(_object(run.md5(SPEED.format(stage))))) for stage in STAGES
    }
    return replace(run, items=_cached(run.md5(ITEMS.parent.as_posix()), ITEMS.name), speed=speed)


@dataclass(frozen=True)
class _InFolder:
    """The files of a checkout."""

    name: str
    folder: Path
    remedy: str = ""  # dvc_files knows what helps in a workspace

    @property
    def where(self) -> str:
        return self.folder.as_posix()

    def called(self, path: str) -> str:
        """What messages call a file."""
        return (self.folder / path).as_posix()

    def read(self, path: str) -> bytes | None:
        return read_if_there(self.folder / path)


@dataclass(frozen=True)
class _InCommit:
    """The files of a commit."""

    name: str
    commit: str
    remedy: str = "name another commit or experiment (`git log`, `dvc exp list`)"

    @property
    def where(self) -> str:
        return self.commit[:10]

    def called(self, path: str) -> str:
        """What messages call a file."""
        return f"{path} of {self.name} ({self.where})"

    def read(self, path: str) -> bytes | None:
        if not run_git(Path.cwd(), "ls-tree", "-z", "--name-only", self.commit, "--", path):
            return None
        return run_git(Path.cwd(), "show", f"{self.commit}:./{path}")


def _run(files: _InFolder | _InCommit, items: Path | None) -> Run:
    name, where = files.name, files.where
    params, lock = files.read("params.yaml"), files.read(str(LOCK))
    if params is None:
        raise UserError(f"{name} ({where}) has no params.yaml, so it is not a run of this pipeline; name another one.")
    metrics = {stage: _metrics(files, path, files.read(path)) for stage in STAGES for path in [RESULT.format(stage)]}
    if not metrics["train"]:
        raise UserError(
            f"{name} ({where}) has no metrics/train.json, so nothing was trained there that could be compared; run dvc repro "
            "there and commit its metrics, or name another run (`dvc exp list`, `git log`)."
        )
    values = flatten(parse_yaml(params, files.called("params.yaml")))
    return Run(
        name,
        where,
        {key: value for key, value in values if not key.startswith("logging.")},
        metrics,
        {stage: _metrics(files, path, files.read(path)) for stage in STAGES for path in [SPEED.format(stage)]},
        {} if lock is None else parse_lock(lock, files.called(str(LOCK)), files.remedy),
        items,
    )


def _metrics(files: _InFolder | _InCommit, path: str, content: bytes | None) -> dict[str, object]:
    return {} if content is None else parse_metrics(content, files.called(path), files.remedy)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _commit(name: str) -> str:
    """The commit of a revision, or of an experiment, which DVC keeps under refs/exps/."""
    try:
        found = run_git(Path.cwd(), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except GitError:  # not a revision; or git cannot be used at all, and then it says why in the next line
        refs = (
            run_git(Path.cwd(), "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps/").decode().splitlines()
        )
        commits = {ref.split(" ")[0] for ref in refs if ref.endswith(f"/{name}") and "/exec/" not in ref}
        if len(commits) != 1:
            many = "is the name of several experiments" if commits else "is not a folder, git revision or experiment"
            raise UserError(
                f"{name} {many}, so there is nothing to compare; `dvc exp list --all-commits` names the experiments, and "
                "`workspace` is the folder you are in."
            ) from None
        return commits.pop()
    return found.decode().strip()


def _cached(md5: str, name: str) -> Path | None:
    """DVC's object of a file of a folder, by the folder's MD5; None where the cache does not have it, or is damaged."""
    entries = Out(Path(), md5, _objects()).entries() if md5.endswith(".dir") else None
    file = (entries or {}).get(Path(name), "")
    return _object(file) if _object(file).is_file() else None


def _object(md5: str) -> Path:
    """Where DVC keeps the bytes of that MD5, if it has them; a path to nothing where there is none."""
    return _objects() / (md5[:2] or "none") / md5[2:]


def _objects() -> Path:
    return cache_folder(Path.cwd()) / "files/md5"


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
