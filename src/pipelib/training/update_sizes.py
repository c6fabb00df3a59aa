"""How far a step moves the weights, relative to their size, for each role: about 1e-3 in a healthy training with AdamW."""

from typing import Any

import torch
from torch import Tensor, nn

from pipelib.training.optimizer import Optimizer
from pipelib.training.roles import roles_of


class UpdateSizes:
    """An optimizer that measures the steps of another one. It needs memory for one more copy of the weights."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._roles = {role: list(parameters.values()) for role, parameters in roles_of(model).items()}
        self.last: dict[str, Tensor] = {}
        """The norm of the last step's change by the norm of the weights before it, scalars on the device."""

    @torch.no_grad()
    def step(self, learning_rate: float, finite: Tensor) -> None:
        """See `Optimizer.step`."""
        before = {role: [parameter.clone() for parameter in parameters] for role, parameters in self._roles.items()}
        self._optimizer.step(learning_rate, finite)
        for role, old in before.items():
            size = _norm(old)
            torch._foreach_sub_(old, list[Tensor](self._roles[role]))
            self.last[role] = _norm(old) / size

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        self._optimizer.load_state_dict(state)


def _norm(tensors: list[Tensor]) -> Tensor:
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors)
    return torch.stack(norms).norm()  # type: ignore[no-any-return]
