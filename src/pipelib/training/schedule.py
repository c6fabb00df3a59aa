"""What is due after which step."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelib.training.params import TrainParams

LOG, VALIDATE, SCORE, SAMPLE, SAVE = "log", "validate", "score", "sample", "save"


@dataclass(frozen=True)
class Cadence:
    """Steps between lines of progress and between checkpoints: what may change without changing any result."""

    log_every: int
    checkpoint_every: int


@dataclass(frozen=True)
class Schedule:
    """Everything that happens every so many steps, and after the last one."""

    every: Mapping[str, int | None]
    """Steps between two of a kind; None: never."""
    last: int

    @classmethod
    def of(cls, params: TrainParams, cadence: Cadence) -> "Schedule":
        """What the parameters say."""
        every = {
            LOG: cadence.log_every,
            VALIDATE: params.validate_every,
            SCORE: params.hellaswag_every,
            SAMPLE: params.sample_every,
            SAVE: cadence.checkpoint_every,
        }
        return cls(every, params.max_steps)

    def due(self, step: int) -> set[str]:
        """What is due after `step` finished steps."""
        return {name for name, every in self.every.items() if every and (step == self.last or step % every == 0)}
