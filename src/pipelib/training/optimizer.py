"""What the training page asks of every optimizer; `optim/` has one file for each."""

import importlib
from typing import Any, Protocol

from torch import Tensor, nn

from pipelib.training.params import TrainParams


class Optimizer(Protocol):
    """Changes the weights by their gradients."""

    def step(self, learning_rate: float, finite: Tensor) -> None:
        """Take one step; where it is not finite, change neither a weight nor anything that is remembered.

        Args:
            learning_rate: of the main group of parameters, as the schedule has it; others have a fixed ratio to it.
            finite: whether losses and gradients are, a boolean scalar on the device, so that nobody waits for it.
        """

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """See `Stateful`."""
        ...


def make_optimizer(model: nn.Module, params: TrainParams) -> Optimizer:
    """The optimizer that `train.optimizer` names."""
    optimizer: Optimizer = importlib.import_module(f"pipelib.training.optim.{params.optimizer}").OPTIMIZER(
        model, params
    )
    return optimizer
