"""How far a step moves the weights, relative to their size, for each role: about 1e-3 in a healthy training with AdamW."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipelib.training.optimizer import Optimizer
from pipelib.training.roles import roles_of


class UpdateSizes:
    """An optimizer that measures the steps of another one. For that it copies the weights to main memory."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._roles = {role: list(parameters.values()) for role, parameters in roles_of(model).items()}
        self._norms = self._measure()
        self.last: dict[str, float] = {}
        """The norm of the last measured step's change by the norm of the weights before it; roles of zeros are left out."""

    def _measure(self) -> dict[str, float]:
        return {role: _norm(parameters) for role, parameters in self._roles.items()}

    @torch.no_grad()
    def step(self, learning_rate: float, finite: Tensor) -> None:
        """See `Optimizer.step`. It waits for the device."""
        # copies in main memory: on a GPU there may be no room beside gradients and moments
        before = {role: [weight.to("cpu", copy=True) for weight in weights] for role, weights in self._roles.items()}
        self._optimizer.step(learning_rate, finite)
        self._norms = {role: _norm(old) for role, old in before.items()}
        self.last = {}
        for role, old in before.items():
            for weight, earlier in zip(self._roles[role], old, strict=True):
                earlier.sub_(weight.cpu())
            if self._norms[role]:
                self.last[role] = _norm(old) / self._norms[role]

    def most_grown(self) -> tuple[str, float]:
        """The role whose weights have grown most since the last measured step, or since the start, and by which factor."""
        growth = {role: norm / (self._norms[role] or math.inf) for role, norm in self._measure().items()}
        role = max(growth, key=growth.__getitem__)
        return role, growth[role]

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        self._optimizer.load_state_dict(state)


@torch.no_grad()
def _norm(tensors: list[Any]) -> float:
    """The norm of all of these together. In fp64, since weights that diverge have squares above fp32's largest number."""
    return math.sqrt(math.fsum(tensor.double().norm().item() ** 2 for tensor in tensors))
