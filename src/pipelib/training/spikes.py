"""Loss spikes: roll back to an earlier checkpoint, and skip the batches that caused the spike (PaLM, section 5.1).

The result does not depend on which checkpoint is loaded: the steps after it are the same as before, up to the first skipped
batch. Every checkpoint holds the skipped batches and the losses that the next loss is compared with, so a run that is
killed and resumed skips the same batches.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from pipelib.training.params import SpikeParams


@dataclass(frozen=True)
class Spike:
    """A finished step that must be undone."""

    step: int
    """Finished steps, this one included."""
    loss: float
    limit: float
    """The highest loss that is not a spike; infinite if too few losses came before, so only a non-finite loss is a spike."""
    batches: tuple[int, ...]
    """The numbers of the batches that are skipped from now on."""


class Spikes:
    """The rule `train.spike` and the spikes found so far; without a rule (None), nothing is a spike."""

    def __init__(self, params: SpikeParams | None) -> None:
        self._params = params
        self.found: list[Spike] = []
        """The spikes that were undone, in order."""
        self._recent: list[float] = []

    @property
    def rollback_depth(self) -> int:
        """The least number of steps that a spike undoes."""
        return self._params.batches if self._params else 0

    def batch_of(self, step: int) -> int:
        """The number of the batch that step `step` takes, both counted from 0; skipped batches do not count."""
        batch = step
        for skipped in sorted(number for spike in self.found for number in spike.batches):
            batch += skipped <= batch
        return batch

    def detect(self, step: int, loss: float, finite: bool) -> Spike | None:
        """Return the spike if the finished step `step` is one. If not, return None and add its loss to the baseline.

        Args:
            loss: the mean over the global batch.
            finite: whether the losses and the gradient norm are finite.
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
