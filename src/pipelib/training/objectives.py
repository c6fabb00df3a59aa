"""What a training minimises: nats summed over targets, divided by how many targets count.

So micro-batches and ranks add up exactly, also where rows have different numbers of targets. The training page, the
checkpoints and the guards are the same for every objective.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pipelib.model.decoder import Decoder
from pipelib.training.launch.distributed import World


class NextToken(nn.Module):
    """Predict every token from those before it. This is the module that is compiled and shared among ranks."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The summed nats of all targets, a scalar, from `inputs` and `targets`, (B, T) each."""
        logits = self.model.logits(self.model.hidden(inputs).flatten(0, 1))  # (B·T, padded vocabulary)
        return F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")

    @staticmethod
    def weight(targets: Tensor) -> int:
        """How many targets count, known on the host."""
        return targets.numel()

    @staticmethod
    def total(weights: Sequence[int], world: World) -> float:  # noqa: ARG004  (all ranks have as many)
        """What the micro-batches of a step weigh on an average rank."""
        return sum(weights)
