"""What a training minimizes: the nats of all targets that count, divided by their number.

Sums and counts are kept apart, so that micro-batches and ranks add up exactly, even if rows have different numbers of
targets. The training loop, the checkpoints and the guards are the same for every objective.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelib.model.decoder import Decoder
from pipelib.training.launch.distributed import World


class Objective(nn.Module, ABC):
    """A model's loss as a module: the one that is compiled, and wrapped for several ranks."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, inputs: Tensor, targets: Tensor, *more: Tensor) -> Tensor:
        """The summed nats of the targets that count, a scalar. `inputs` and `targets` are (B, T), `more` is the rest."""

    def dummy_batch(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """A batch of the shapes that training has, in which no number means anything."""
        tokens = torch.zeros(rows, length, dtype=torch.long)
        return tokens, tokens.clone()  # torch.compile would specialize on the same tensor passed twice

    @abstractmethod
    def target_count(self, targets: Tensor) -> int:
        """How many targets of a micro-batch count. `targets` are on the host."""

    def targets_per_rank(self, counts: Sequence[int], world: World) -> Tensor | float:
        """How many targets of a step count, averaged over ranks. All ranks call it.

        The result stays on the device, so that the host does not wait.

        Args:
            counts: of this rank's micro-batches.
        """
        # fp32 would round more than 2^24 targets; Apple's GPUs have no float64
        exact = torch.float32 if world.device.type == "mps" else torch.float64
        return world.sum(torch.tensor(float(sum(counts)), device=world.device, dtype=exact)) / world.world_size


class NextToken(Objective):
    """Predict every token from the tokens before it."""

    def forward(self, inputs: Tensor, targets: Tensor, *more: Tensor) -> Tensor:  # noqa: ARG002
        """See `Objective.forward`."""
        logits = self.model.logits(self.model.hidden(inputs).flatten(0, 1))  # (B·T, padded vocabulary)
        return F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")

    def target_count(self, targets: Tensor) -> int:
        """All of them."""
        return targets.numel()

    def targets_per_rank(self, counts: Sequence[int], world: World) -> float:  # noqa: ARG002
        """The sum of this rank: all ranks have the same, so they need not communicate."""
        return sum(counts)
