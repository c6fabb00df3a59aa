"""How files become documents."""

from dataclasses import asdict, dataclass
from typing import Any

from pipelib.corpus.raw import TEXT


@dataclass(frozen=True)
class Options:
    """The parameters of `download` that say so. The defaults are what versions without them did."""

    text_column: str = TEXT
    bad_rows: str = "refuse"
    encoding: str = "utf-8"
    stray_bytes: str = "refuse"
    split: str = "whole"
    separator: str = "<|endoftext|>"
    shuffle_seed: int | None = None
    """Decides the order; None for the order of the files."""
    validation: str | None = None

    def decides(self) -> dict[str, Any]:
        """Return what differs from the defaults."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Options, name)}


PLAIN = Options()
"""What versions without these parameters did."""
