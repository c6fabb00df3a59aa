"""Which events are due after a step: logging, validation, scoring, samples, checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelib.training.params import TrainParams

LOG, VALIDATE, SCORE, SAMPLE, SAVE = "log", "validate", "score", "sample", "save"


@dataclass(frozen=True)
class Cadence:
    """Steps between progress lines and between checkpoints. Changing them changes no result."""

    log_every: int
    checkpoint_every: int


@dataclass(frozen=True)
class Schedule:
    """Events that happen every N steps, and after the last one."""

    every: Mapping[str, int | None]
    """Steps between two events, by their name; None: never."""
    last: int
    cooldown_start: int = 0
    """The step whose checkpoint stays, for a longer training; 0: none."""

    @classmethod
    def of(cls, params: TrainParams, cadence: Cadence) -> "Schedule":
        """The schedule that the parameters describe."""
        every = {
            LOG: cadence.log_every,
            VALIDATE: params.validate_every,
            SCORE: params.hellaswag_every,
            SAMPLE: params.sample_every,
            SAVE: cadence.checkpoint_every,
        }
        return cls(every, params.max_steps, params.cooldown_start)

    def due(self, step: int) -> set[str]:
        """The events that are due after `step` finished steps."""
        due = {name for name, every in self.every.items() if every and (step == self.last or step % every == 0)}
        return due | {SAVE} if step == self.cooldown_start else due
