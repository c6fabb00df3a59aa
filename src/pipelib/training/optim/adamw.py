"""AdamW (Loshchilov and Hutter, 2019), fused, with weight decay on matrices only."""

from typing import Any

import torch
from torch import Tensor, nn

from pipelib.training.params import TrainParams


class AdamW:
    """torch's AdamW; biases and LayerNorms do not decay (GPT-3, appendix B)."""

    def __init__(self, model: nn.Module, params: TrainParams) -> None:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": params.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (params.beta1, params.beta2)
        self._adamw = torch.optim.AdamW(groups, lr=params.max_lr, betas=betas, eps=params.eps, fused=True)

    def step(self, learning_rate: float, finite: Tensor) -> None:
        """See `Optimizer.step`."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        # The fused kernel changes neither weights nor moments if this is 1; gradient scalers use it the same way.
        self._adamw.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return self._adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        self._adamw.load_state_dict(state)


OPTIMIZER = AdamW
