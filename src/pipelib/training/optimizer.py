"""What the training loop needs from every optimizer. `optim/` has one file for each."""

import importlib
from typing import Any, Protocol

from torch import Tensor, nn

from pipelib.training.params import TrainParams


class Optimizer(Protocol):
    """Updates the weights from their gradients."""

    def step(self, learning_rate: float, finite: Tensor) -> None:
        """Take one step. If `finite` is false, change neither the weights nor the optimizer's state.

        Args:
            learning_rate: the schedule's rate, for the main parameter group; other groups have a fixed ratio to it.
            finite: whether losses and gradients are finite: a boolean scalar on the device, so that the host does not wait.
        """

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """See `Stateful`."""
        ...


def make_optimizer(model: nn.Module, params: TrainParams) -> Optimizer:
    """Make the optimizer that `train.optimizer` names."""
    optimizer: Optimizer = importlib.import_module(f"pipelib.training.optim.{params.optimizer}").OPTIMIZER(
        model, params
    )
    return optimizer
