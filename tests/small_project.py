"""A checkout with small parameters and small data, in which stages run as processes of their own."""

import compileall
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from small_params import PARAMS, write_params
from warm_python import run_python

from pipelib.schema import flatten
from pipelib.workspace.locks import LOCK, locked
from pipelib.workspace.provenance import code_hashes
from pipelib.workspace.stages import STAGES

CHECKOUT = Path(__file__).absolute().parents[1]


@dataclass(frozen=True)
class Project:
    """A copy of the code of this checkout."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "Project":
        """`stages/`, `src/` and params.yaml."""
        copy_code(root)
        write_params(root)
        return cls(root)

    def python(
        self, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Start this environment's Python, by default in the project's root."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd or self.root,
            env=without_pythonpath(environment or {}),
            capture_output=True,
            text=True,
            check=False,
        )

    def stage(self, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a stage as dvc.yaml does, but for a start of Python, and with one worker where nothing else is asked for."""
        changes = {"PIPELIB_WORKERS": "1", **environment}
        return run_python("-m", f"stages.{name}", cwd=self.root, env=without_pythonpath(changes))

    def refuses(self, name: str, *words: str, **environment: str) -> str:
        """Run a stage that must end with one message which has these words in it, no traceback, and status 1."""
        done = self.stage(name, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        message = done.stderr[done.stderr.index(f"{name}: ") :]
        for word in words:
            assert word in message, message
        return message

    def runs(self, name: str, **environment: str) -> None:
        """Run a stage that must end well."""
        done = self.stage(name, **environment)
        assert done.returncode == 0, done.stdout + done.stderr

    def files(self) -> set[str]:
        """What the stages made, outside of their state."""
        made = (self.root / top for top in ("data", "models", "curves", "reports", "metrics"))
        return {path.relative_to(self.root).as_posix() for top in made for path in top.rglob("*") if path.is_file()}


def copy_code(root: Path) -> None:
    """Copy `stages/` and `src/` with what Python has compiled, and what is known of the sources: else each copy begins anew."""
    _know_the_sources()
    for name in ("stages", "src"):
        shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("*.egg-info"), dirs_exist_ok=True)


def copy_linked(source: Path, target: Path) -> None:
    """Copy a folder; paths of one file there are paths of one file here."""
    copies: dict[int, str] = {}

    def copy(old: str, new: str) -> None:
        inode = os.lstat(old).st_ino
        if inode in copies:
            os.link(copies[inode], new)
        else:
            copies[inode] = shutil.copy2(old, new)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


@functools.cache
def _know_the_sources() -> None:
    compileall.compile_dir(CHECKOUT / "src", quiet=2)
    params = dict(flatten(PARAMS))
    for stage in STAGES:
        code_hashes(stage, params, CHECKOUT)


def without_pythonpath(changes: Mapping[str, str]) -> dict[str, str]:
    """This environment, less what would make another checkout importable, and with changes."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **changes}


def hold(folder: Path, name: str = LOCK) -> ExitStack:
    """A lock of a state folder, held until it is closed."""
    stack = ExitStack()
    stack.enter_context(locked(folder / name))
    return stack
