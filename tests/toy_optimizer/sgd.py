"""Gradient descent with momentum."""

from typing import Any

import torch
from torch import Tensor, nn

from pipelib.training.params import TrainParams


class SGD:
    def __init__(self, model: nn.Module, params: TrainParams) -> None:
        self._parameters, self._decay = list(model.parameters()), params.beta1
        self._momenta = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def step(self, learning_rate: float, finite: Tensor) -> None:
        for parameter, momentum in zip(self._parameters, self._momenta, strict=True):
            assert parameter.grad is not None
            momentum.copy_(torch.where(finite, momentum * self._decay + parameter.grad, momentum))
            parameter.sub_(torch.where(finite, momentum * learning_rate, 0.0))

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": self._momenta}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        for momentum, saved in zip(self._momenta, state["momenta"], strict=True):
            momentum.copy_(saved)


OPTIMIZER = SGD
