"""Where encoded units are kept: `STATE/units/CODE/`, one folder for each state of the code that makes them.

Several processes may work in one folder, on one machine or on several that share a file system: each holds the lock of
its share, and a file appears under its name only when it is whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipelib.errors import UserError
from pipelib.files import sha256_json
from pipelib.tokens.units import Unit
from pipelib.workspace.locks import LOCK, is_held, locked
from pipelib.workspace.places import StatePlaces


@dataclass(frozen=True)
class Share:
    """A part of the units, for one of several processes: neighbours, so that each process reads few files."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `i/n`, with i from 0 to n - 1.

        Raises:
            UserError: it is nothing of the kind.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(
                f"--share {text} is not i/n with i from 0 to n - 1, so it names no share; for example --share 0/4"
            )
        return cls(int(index), int(count))

    def of(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units of this share."""
        first, end = (number * len(units) // self.count for number in (self.index, self.index + 1))
        return units[first:end]


@contextmanager
def unit_store(code: Mapping[str, str], share: Share | None = None) -> Iterator[Path]:
    """The folder of units that this code made or makes, locked while the `with` block lasts.

    Args:
        code: what makes the shards: see `provenance.code_hashes`.
        share: what this process does in it; None for a run that makes all of it, of which there is one at a time.

    Raises:
        UserError: another process works on the same share.
    """
    store = StatePlaces.chosen().units / sha256_json(dict(code))[:16]
    name = f"{LOCK}-{share.index}-of-{share.count}" if share else LOCK
    with locked(store / name, wait=share is None):
        if share is None and not any(map(is_held, store.glob(f"{LOCK}-*"))):
            for leftover in store.glob("*/.*.tmp"):  # of processes that were killed
                leftover.unlink(missing_ok=True)
        yield store
