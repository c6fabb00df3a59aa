"""Read the files of a run of the pipeline: from a folder, a commit, or a DVC experiment.

Parameters, metrics and dvc.lock are in git. The outs are in DVC's cache, under the MD5 that dvc.lock has. Nothing is checked
out or fetched.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipelib.errors import UserError
from pipelib.schema import flatten, parse_yaml
from pipelib.workspace.dvc import (
    LockedStage,
    Out,
    object_path,
    objects_folder,
    parse_lock,
    parse_metrics,
    read_if_there,
)
from pipelib.workspace.git import GitError, run_git
from pipelib.workspace.places import HERE, Places
from pipelib.workspace.provenance import code_hash
from pipelib.workspace.stages import STAGES

CODE = ("src/", "stages/")
"""The folders with the code of the stages."""


@dataclass(frozen=True)
class RunFiles:
    """The content of a run's files."""

    name: str
    """As the user typed it."""
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
    code: Mapping[str, str]
    """For each file of code, by its path, a hash to compare with another run: see `_code`."""
    items: Path | None
    """The path of reports/items.npz or of its object in the cache; None if neither exists."""

    def md5(self, path: str) -> str:
        """DVC's MD5 of an out; empty if dvc.lock has none."""
        return next((out.md5 for stage in self.lock.values() for out in stage.outs if out.path == path), "")


def find_run(name: str) -> RunFiles:
    """Find a run by name: `workspace`, the folder of a checkout, a git revision, or a DVC experiment.

    Raises:
        UserError: there is no such run, it has no metrics, one of its files is broken, or git fails.
    """
    folder = Path("." if name == "workspace" else name)
    if os.path.isfile(Places(folder).params):  # noqa: PTH113  (Path.is_file raises where a name is too long)
        items = Places(folder).items
        return _run(_InFolder(name, folder), items if items.is_file() else None)
    files = _InCommit(name, _commit(name))
    run = _run(files, None)
    # items and speed are outs, so they are in DVC's cache, not in git
    items, objects = HERE.items, objects_folder(Path.cwd())
    speed = {
        stage: _metrics(files, path, read_if_there(object_path(objects, run.md5(path))))
        for stage in STAGES
        for path in [str(HERE.speed(stage))]
    }
    return replace(run, items=_cached(run.md5(str(items.parent)), items.name, objects), speed=speed)


@dataclass(frozen=True)
class _InFolder:
    """The files of a checkout."""

    name: str
    folder: Path
    remedy: str = ""  # the messages of `workspace.dvc` already have a remedy for a workspace

    @property
    def where(self) -> str:
        return self.folder.as_posix()

    def called(self, path: str) -> str:
        """The name of a file in messages."""
        return (self.folder / path).as_posix()

    def read(self, path: str) -> bytes | None:
        return read_if_there(self.folder / path)

    def read_all(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Those of the files that exist."""
        return {path: content for path in paths if (content := self.read(path)) is not None}


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
        """The name of a file in messages."""
        return f"{path} of {self.name} ({self.where})"

    def read(self, path: str) -> bytes | None:
        if not run_git(Path.cwd(), "ls-tree", "-z", "--name-only", self.commit, "--", path):
            return None
        return run_git(Path.cwd(), "show", f"{self.commit}:./{path}")

    def read_all(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Those of the files that exist, read with one call of git."""
        known = run_git(Path.cwd(), "ls-tree", "-r", "-z", "--name-only", self.commit, "--", *CODE).decode().split("\0")
        wanted = [path for path in paths if path in set(known)]
        if not wanted:
            return {}
        archive = run_git(Path.cwd(), "archive", "--format=tar", self.commit, *wanted)
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            return {file.name: content.read() for file in files if (content := files.extractfile(file))}


def _run(files: _InFolder | _InCommit, items: Path | None) -> RunFiles:
    name, where = files.name, files.where
    params, content = files.read(str(HERE.params)), files.read(str(HERE.lock))
    if params is None:
        raise UserError(f"{name} ({where}) has no params.yaml, so it is not a run of this pipeline; name another one.")
    lock = {} if content is None else parse_lock(content, files.called(str(HERE.lock)), files.remedy)
    metrics = {stage: _metrics(files, path, files.read(path)) for stage in STAGES for path in [str(HERE.result(stage))]}
    if not metrics["train"]:
        raise UserError(
            f"{name} ({where}) has no metrics/train.json, so nothing was trained there that could be compared; run dvc repro "
            "there and commit its metrics, or name another run (`dvc exp list`, `git log`)."
        )
    values = flatten(parse_yaml(params, files.called("params.yaml")))
    return RunFiles(
        name,
        where,
        {key: value for key, value in values if not key.startswith("logging.")},
        metrics,
        {stage: _metrics(files, path, files.read(path)) for stage in STAGES for path in [str(HERE.speed(stage))]},
        lock,
        _code(lock, files),
        items,
    )


def _metrics(files: _InFolder | _InCommit, path: str, content: bytes | None) -> dict[str, object]:
    return {} if content is None else parse_metrics(content, files.called(path), files.remedy)


def _commit(name: str) -> str:
    """The commit of a revision or of an experiment, which DVC keeps under refs/exps/."""
    try:
        found = run_git(Path.cwd(), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except GitError:  # not a revision; if git itself fails, the next line raises the reason
        refs = (
            run_git(Path.cwd(), "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps/").decode().splitlines()
        )
        # refs/exps/exec/ is DVC's own bookkeeping
        commits = {ref.split(" ")[0] for ref in refs if ref.endswith(f"/{name}") and "/exec/" not in ref}
        if len(commits) != 1:
            many = "is the name of several experiments" if commits else "is not a checkout, git revision or experiment"
            raise UserError(
                f"{name} {many}, so it names no run; `dvc exp list --all-commits` names the experiments, and "
                "`workspace` is the folder you are in."
            ) from None
        return commits.pop()
    return found.decode().strip()


def _cached(md5: str, name: str, objects: Path) -> Path | None:
    """The cache object of a file in a folder, by the folder's MD5; None if it is missing or damaged."""
    entries = Out(Path(), md5, objects).entries() if md5.endswith(".dir") else None
    file = object_path(objects, (entries or {}).get(Path(name), ""))
    return file if file.is_file() else None


def _code(lock: Mapping[str, LockedStage], files: _InFolder | _InCommit) -> dict[str, str]:
    """The code that the stages of a dvc.lock ran, as hashes by path: for a Python file, a hash that ignores comments and
    docstrings; for other files, or if the Python file is not available, DVC's MD5."""
    ran = {dep.path: dep.md5 for stage in lock.values() for dep in stage.deps if dep.path.startswith(CODE)}
    sources = files.read_all([path for path in ran if path.endswith(".py")])
    for path, content in sources.items():
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == ran[path]:
            with suppress(SyntaxError, ValueError):  # written for another version of Python
                ran[path] = code_hash(content.decode())
    return ran


def changed_code(first: RunFiles, second: RunFiles) -> list[str]:
    """The files of code that differ between two runs."""
    return sorted(
        path for path in first.code.keys() | second.code.keys() if first.code.get(path) != second.code.get(path)
    )


def differing_params(runs: Sequence[RunFiles]) -> Iterator[tuple[str, list[object]]]:
    """Parameters that differ between the runs, with their values."""
    for key in dict.fromkeys(key for run in runs for key in run.params):
        values = [run.params.get(key) for run in runs]
        if any(value != values[0] for value in values):
            yield key, values
