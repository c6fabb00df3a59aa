"""What there is to encode, and the choice of who encodes it: this machine, jobs of Slurm, a cluster of Ray."""

import importlib
import os
import pkgutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelib.errors import UserError
from pipelib.tokens import executors
from pipelib.tokens.units import DoneUnit, Unit
from pipelib.tokens.workers import Workers
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.provenance import changed, versions
from pipelib.workspace.stages import STAGES

EXECUTOR = "PIPELIB_EXECUTOR"


@dataclass(frozen=True)
class Encoding:
    """Units whose files are missing, and all that their tokens depend on."""

    units: Sequence[Unit]
    store: Path
    """The folder where their files must appear."""
    tokenizer: Tokenizer
    workers: Workers
    """This machine's."""

    @property
    def engine(self) -> str:
        """The engine that encodes, by its name."""
        return self.workers.engine


class Executor(Protocol):
    """Encodes units: on this machine, or on others."""

    def __call__(self, task: Encoding, /) -> Generator[DoneUnit]:
        """Yield each unit when its file is complete in the store, in any order.

        Raises:
            UserError: text cannot be read, or the machines cannot be used.
        """


def chosen_executor() -> tuple[str, Executor]:
    """Return the executor that `$PIPELIB_EXECUTOR` names, with its name; `local` if it names none.

    Raises:
        UserError: there is no such executor.
    """
    name = os.environ.get(EXECUTOR) or "local"
    known = sorted(module.name for module in pkgutil.iter_modules(executors.__path__))
    if name not in known:
        raise UserError(f"{EXECUTOR}={name} is not a known executor, so nothing was encoded; use {', '.join(known)}.")
    executor: Executor = importlib.import_module(f"{executors.__name__}.{name}").encode
    return name, executor


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide tokens."""
    return versions(*STAGES["tokenize"].packages)


def require_same_packages(expected: Mapping[str, str]) -> None:
    """Refuse to encode on a machine whose tokens could be others.

    Args:
        expected: `package_versions` of the machine that collects the units.

    Raises:
        UserError: this machine has other versions.
    """
    if (found := package_versions()) != expected:
        machine = os.uname().nodename
        names = changed(expected, found)
        there = ", ".join(f"{name} {found[name]}" for name in names.split(", ") if name in found)
        raise UserError(
            f"{machine} has other packages than the machine that runs the stage ({there}), so its tokens could be others; "
            "install the versions of constraints.txt there."
        )
