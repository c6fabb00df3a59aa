"""What all ranks check together, so that all act after the same step: non-finite values, spikes, a request to stop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelib.errors import UserError
from pipelib.tokens.loader import BatchPlan
from pipelib.training.checkpoint import Checkpoints
from pipelib.training.launch.distributed import World
from pipelib.training.params import TrainParams
from pipelib.training.roles import EMBEDDING, HEAD, MATRICES, VECTORS
from pipelib.training.spikes import Spike, Spikes
from pipelib.training.step import StepResult
from pipelib.training.update_sizes import UpdateSizes

RATES = {MATRICES: "max_lr", EMBEDDING: "muon.embedding_lr", HEAD: "muon.head_lr", VECTORS: "muon.vector_lr"}
"""Muon's rate of each role. AdamW has only the first."""
ROWS_NAMED = 64
"""The most rows that a message lists."""


@dataclass(frozen=True)
class Continue:
    """Nothing is wrong."""


@dataclass(frozen=True)
class RollBack:
    """A step must be undone, and the batches that caused its spike skipped."""

    spike: Spike


@dataclass(frozen=True)
class Stop:
    """A rank was asked to stop."""

    signal: int


Verdict = Continue | RollBack | Stop


class Guards:
    """The values of the steps since the last check, on the device until then."""

    def __init__(
        self,
        params: TrainParams,
        update_sizes: UpdateSizes,
        plan: BatchPlan,
        spikes: Spikes,
        checkpoints: Checkpoints,
        world: World,
    ) -> None:
        self._params, self._update_sizes, self._plan, self._spikes = params, update_sizes, plan, spikes
        self._checkpoints, self._world = checkpoints, world
        self._waiting: list[tuple[int, float, Tensor]] = []

    def note(self, step: int, learning_rate: float, result: StepResult) -> None:
        """Note a finished step without waiting for the device."""
        rest = torch.stack((result.grad_norm, result.stop, result.overflow))
        values = torch.cat((result.rank_losses, rest))  # (world_size + 3,)
        self._waiting.append((step, learning_rate, values))

    def check(self, *, wait: bool) -> Verdict:
        """Check the noted steps.

        Args:
            wait: wait for the device. If the host runs ahead of the device, nothing is checked until `wait` is true.

        Raises:
            UserError: a loss or gradient norm is not finite, and no spike rule undoes the step. `take_step` has left the
                weights unchanged.
        """
        if self._world.runs_ahead and not wait:
            return Continue()
        stop, spike = 0.0, None
        for (step, learning_rate, _), (*losses, norm, signal, overflow) in zip(
            self._waiting, torch.stack([values for *_, values in self._waiting]).tolist(), strict=True
        ):
            stop = max(stop, signal)
            losses_finite, norm_finite = all(map(math.isfinite, losses)), math.isfinite(norm)
            # A gradient that overflows in fp16 is expected: the step was skipped, and the scale is smaller now.
            finite = losses_finite and (norm_finite or bool(overflow))
            spike = spike or self._spikes.detect(step, sum(losses) / len(losses), finite)
            if not (finite or spike):
                raise UserError(self._not_finite(step, learning_rate, losses, norm))
        self._waiting.clear()
        # A spike comes first: a checkpoint saved for a stop would hold the step that must be undone.
        return RollBack(spike) if spike else Stop(int(stop)) if stop else Continue()

    def _not_finite(self, step: int, learning_rate: float, losses: Sequence[float], norm: float) -> str:
        """The message about the finished step `step`."""
        batch = self._spikes.batch_of(step - 1)
        size = self._params.micro_batch_rows(self._world.world_size)
        guilty = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        found = [f"loss {losses[rank]} on rank {rank}" for rank in guilty]
        rows = [
            f"rows {_listed(self._plan.share(batch, size, rank, self._world.world_size))} on rank {rank}"
            for rank in guilty or range(self._world.world_size)
        ]
        self._checkpoints.wait()
        self._world.barrier()  # rank 0 has written its checkpoint before any rank names the last one
        last = self._checkpoints.newest()
        role, growth = self._update_sizes.most_grown()
        rate = f"{self._params.section}.{RATES[role] if self._params.muon else RATES[MATRICES]}"
        return (
            f"step {step} has {', '.join(found) or 'a finite loss'} and gradient norm {norm} at learning rate "
            f"{learning_rate:g}, so its update was skipped and training stopped; its batch was {', '.join(rows)}. "
            f"{f'The last checkpoint is {last}, from before this step' if last else 'There is no checkpoint yet'}. The "
            f"weights of role {role} have grown most since the last validation, by a factor of {growth:.3g}. Lower {rate} or "
            f"{self._params.section}.grad_clip_norm, or look at the text of these rows."
        )


def _listed(rows: npt.NDArray[np.int64]) -> str:
    named = ", ".join(map(str, rows.flatten()[:ROWS_NAMED]))
    return f"{named} and {rows.size - ROWS_NAMED} more" if rows.size > ROWS_NAMED else named
