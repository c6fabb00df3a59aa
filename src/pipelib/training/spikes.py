"""Loss spikes: roll back to an earlier checkpoint, and skip the batches that caused the spike (PaLM, section 5.1).

The result does not depend on which checkpoint it goes back to: the steps from there on are the same as before, up to the
first of the batches left out. Which those are, and the losses that the next one is compared with, are part of every
checkpoint, so a run that is killed and goes on leaves the same ones out.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from pipelib.training.params import SpikeParams


@dataclass(frozen=True)
class Spike:
    """A finished step that is to be undone."""

    step: int
    """Finished steps, it included."""
    loss: float
    limit: float
    """What the loss would have had to stay under; infinite where it is not finite itself and too few were before it."""
    batches: tuple[int, ...]
    """The numbers of the batches that are left out from now on."""


class Spikes:
    """The rule `train.spike`, and what it has left out so far; with None as rule nothing ever is."""

    def __init__(self, params: SpikeParams | None) -> None:
        self._params = params
        self.found: list[Spike] = []
        """Those that were undone, in order."""
        self._recent: list[float] = []

    @property
    def rollback_depth(self) -> int:
        """The number of steps that a spike undoes, at least."""
        return self._params.batches if self._params else 0

    def batch_of(self, step: int) -> int:
        """The number of the batch that step `step` takes, both from 0: of those not left out the one at this place."""
        batch = step
        for left_out in sorted(number for spike in self.found for number in spike.batches):
            batch += left_out <= batch
        return batch

    def detect(self, step: int, loss: float, finite: bool) -> Spike | None:
        """The spike, if the finished step `step` is one; if not, None, and later losses are compared with its loss.

        Args:
            loss: the mean over the global batch.
            finite: whether losses and gradient norm are.
        """
        if self._params is None:
            return None
        limit = self._limit(self._params)
        if (finite and loss <= limit) or len(self.found) >= self._params.rollbacks:
            self._recent = [*self._recent, loss][-self._params.window :]
            return None
        first = max(0, step - self._params.batches)
        return Spike(step, loss, limit, tuple(self.batch_of(number) for number in range(first, step)))

    def _limit(self, params: SpikeParams) -> float:
        if len(self._recent) < params.window:
            return math.inf
        return statistics.fmean(self._recent) + params.deviations * statistics.pstdev(self._recent)

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        found = [[spike.step, spike.loss, spike.limit, list(spike.batches)] for spike in self.found]
        return {"found": found, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        self.found = [Spike(step, loss, limit, tuple(batches)) for step, loss, limit, batches in state["found"]]
        self._recent = list(state["recent"])
