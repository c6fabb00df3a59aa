"""The folder of encoded units: `STATE/units/CODE/`, one for each version of the code that makes units.

Several processes may work in one folder, on one machine or on several that share a file system. Each holds the lock of
its share, and a file appears under its name only when it is complete.
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
    """One process's part of the units. The units of a share are consecutive, so that each process reads few files."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `i/n`, with i from 0 to n - 1.

        Raises:
            UserError: the text has another form.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(
                f"--share {text} is not i/n with i from 0 to n - 1, so it does not name a share; write, for example, --share 0/4"
            )
        return cls(int(index), int(count))

    def of(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Return the units of this share."""
        first, end = (number * len(units) // self.count for number in (self.index, self.index + 1))
        return units[first:end]


@contextmanager
def unit_store(code: Mapping[str, str], share: Share | None = None) -> Iterator[Path]:
    """Lock the folder for the units of this code until the block ends, and return it.

    Args:
        code: the code that makes the units: see `provenance.code_hashes`.
        share: the share that this process encodes; None for a run that needs all units. Only one such run works at a time.

    Raises:
        UserError: another process works on the same share.
    """
    store = StatePlaces.chosen().units / sha256_json(dict(code))[:16]
    name = f"{LOCK}-{share.index}-of-{share.count}" if share else LOCK
    # A full run waits for another one, and then finds its units. A second process on a share would only repeat work: refuse.
    with locked(store / name, wait=share is None):
        if share is None and not any(map(is_held, store.glob(f"{LOCK}-*"))):
            for leftover in store.glob("*/.*.tmp"):  # left by killed processes, since no share is being encoded
                leftover.unlink(missing_ok=True)
        yield store
