"""What a training minimises: nats summed over targets, divided by how many targets count.

So micro-batches and ranks add up exactly, also where rows have different numbers of targets. The training page, the
checkpoints and the guards are the same for every objective.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelib.model.decoder import Decoder
from pipelib.training.launch.distributed import World


class Objective(nn.Module, ABC):
    """A loss of a model. This is the module that is compiled and shared among ranks."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The summed nats of the targets that count, a scalar, from `inputs` and `targets`, (B, T) each."""

    @abstractmethod
    def weight(self, targets: Tensor) -> int:
        """How many targets of a micro-batch count; `targets` are on the host."""

    def total(self, weights: Sequence[int], world: World) -> Tensor | float:
        """What the micro-batches of a step weigh on an average rank, from those of this rank; on the device, so that nothing
        waits for it. All ranks call it."""
        return world.sum(torch.tensor(float(sum(weights)), device=world.device)) / world.world_size


class NextToken(Objective):
    """Predict every token from those before it."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See `Objective.forward`."""
        logits = self.model.logits(self.model.hidden(inputs).flatten(0, 1))  # (B·T, padded vocabulary)
        return F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")

    def weight(self, targets: Tensor) -> int:
        """All of them."""
        return targets.numel()

    def total(self, weights: Sequence[int], world: World) -> float:  # noqa: ARG002
        """The same on every rank, which need not tell each other."""
        return sum(weights)
