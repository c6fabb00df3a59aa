"""AdamW (Loshchilov and Hutter, 2019), fused, for parameters with the same rate and decay: a part of every optimizer."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pipelib.training.params import TrainParams


class State(NamedTuple):
    """The state of one parameter, by torch's names."""

    step: Tensor
    """How many steps it has taken, a scalar."""
    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamWGroup:
    """torch's AdamW on some parameters.

    This calls torch's function, because the class `torch.optim.AdamW` imports torch's compiler, which takes two seconds. The
    results have the same bits, and the state has the same names.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float, params: TrainParams) -> None:
        self.parameters, self.weight_decay, self._params = list(parameters), weight_decay, params
        self.states: list[State] = []
        """One per parameter; none before the first step, so that they take no memory until then."""

    def step(self, learning_rate: float, finite: Tensor) -> None:
        """See `Optimizer.step`."""
        self.states = self.states or list(map(_new_state, self.parameters))
        adamw(
            list[Tensor](self.parameters),
            [parameter.grad for parameter in self.parameters],  # type: ignore[misc]  # the backward pass set them
            [state.exp_avg for state in self.states],
            [state.exp_avg_sq for state in self.states],
            [],
            [state.step for state in self.states],
            fused=True,
            # The fused kernel changes neither weights nor moments if this is 1; gradient scalers use it the same way.
            found_inf=1 - finite.float(),
            amsgrad=False,
            beta1=self._params.beta1,
            beta2=self._params.beta2,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=self._params.eps,
            maximize=False,
        )


def saved_states(groups: Iterable[AdamWGroup]) -> dict[str, Any]:
    """The states of groups, numbered through, as torch numbers them."""
    states = (state._asdict() for group in groups for state in group.states)
    return {"state": dict(enumerate(states))}


def restore_states(groups: Iterable[AdamWGroup], saved: dict[str, Any]) -> None:
    """Restore what `saved_states` returned. The tensors are copied to the devices of the parameters."""
    states: Iterator[dict[str, Tensor]] = iter(saved["state"].values())
    for group in groups:
        pairs = zip(group.parameters, islice(states, len(group.parameters)), strict=False)
        group.states = [
            State(**{name: tensor.to(parameter.device) for name, tensor in tensors.items()})
            for parameter, tensors in pairs
        ]


def _new_state(parameter: nn.Parameter) -> State:
    step = torch.zeros((), device=parameter.device)
    return State(step, torch.zeros_like(parameter), torch.zeros_like(parameter))
