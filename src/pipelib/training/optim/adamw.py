"""AdamW (Loshchilov and Hutter, 2019), fused, with weight decay on matrices only."""

from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass
class Group:
    """Parameters with the same weight decay."""

    parameters: list[nn.Parameter]
    weight_decay: float
    states: list[State] = field(default_factory=list)
    """One per parameter; none before the first step, so that they take no memory until then."""


class AdamW:
    """torch's AdamW; biases and LayerNorms do not decay (GPT-3, appendix B).

    This calls torch's function, because the class `torch.optim.AdamW` imports torch's compiler, which takes two seconds. The
    results have the same bits, and the state has the same names.
    """

    def __init__(self, model: nn.Module, params: TrainParams) -> None:
        parameters = list(model.parameters())
        self._params = params
        self.groups = (
            Group([parameter for parameter in parameters if parameter.dim() >= 2], params.weight_decay),
            Group([parameter for parameter in parameters if parameter.dim() < 2], 0.0),
        )

    def step(self, learning_rate: float, finite: Tensor) -> None:
        """See `Optimizer.step`."""
        # The fused kernel changes neither weights nor moments if this is 1; gradient scalers use it the same way.
        found_inf = 1 - finite.float()
        for group in self.groups:
            group.states = group.states or list(map(_new_state, group.parameters))
            adamw(
                list[Tensor](group.parameters),
                [parameter.grad for parameter in group.parameters],  # type: ignore[misc]  # the backward pass set them
                [state.exp_avg for state in group.states],
                [state.exp_avg_sq for state in group.states],
                [],
                [state.step for state in group.states],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self._params.beta1,
                beta2=self._params.beta2,
                lr=learning_rate,
                weight_decay=group.weight_decay,
                eps=self._params.eps,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        states = (state._asdict() for group in self.groups for state in group.states)
        return {"state": dict(enumerate(states))}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        states: Iterator[dict[str, Tensor]] = iter(state["state"].values())
        for group in self.groups:
            saved = zip(group.parameters, islice(states, len(group.parameters)), strict=False)
            group.states = [
                State(**{name: tensor.to(parameter.device) for name, tensor in tensors.items()})
                for parameter, tensors in saved
            ]


def _new_state(parameter: nn.Parameter) -> State:
    step = torch.zeros((), device=parameter.device)
    return State(step, torch.zeros_like(parameter), torch.zeros_like(parameter))


OPTIMIZER = AdamW
