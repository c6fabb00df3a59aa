"""Encode on this machine, on every core."""

from collections.abc import Generator

from pipelib.tokens.encoding import Encoding
from pipelib.tokens.units import DoneUnit
from pipelib.tokens.workers import encode_here


def encode(task: Encoding) -> Generator[DoneUnit]:
    """See `Executor`."""
    yield from task.workers.stream("units", encode_here, task.units, task.store)
