"""AdamW with weight decay on matrices only; biases and norms do not decay (GPT-3, appendix B)."""

from typing import Any

from torch import Tensor, nn

from pipelib.training.adamw_group import AdamWGroup, restore_states, saved_states
from pipelib.training.params import TrainParams


class AdamW:
    """One rate for all parameters."""

    def __init__(self, model: nn.Module, params: TrainParams) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.groups = (
            AdamWGroup([parameter for parameter in parameters if parameter.dim() >= 2], params.weight_decay, params),
            AdamWGroup([parameter for parameter in parameters if parameter.dim() < 2], 0.0, params),
        )

    def step(self, learning_rate: float, finite: Tensor) -> None:
        """See `Optimizer.step`."""
        for group in self.groups:
            group.step(learning_rate, finite)

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return saved_states(self.groups)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        restore_states(self.groups, state)


OPTIMIZER = AdamW
