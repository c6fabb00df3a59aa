"""Muon: the momentum of every matrix in a block is orthogonalised, so that all of its directions move equally far.

Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024 (https://kellerjordan.github.io/posts/muon/);
`torch.optim.Muon` computes the same update in bf16. Embeddings, an untied output layer and vectors have AdamW, each with a rate
of its own.
"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from pipelib.model.decoder import Decoder
from pipelib.training.adamw_group import AdamWGroup, restore_states, saved_states
from pipelib.training.params import TrainParams
from pipelib.training.roles import EMBEDDING, HEAD, MATRICES, VECTORS, roles_of

A, B, C = 3.4445, -4.7750, 2.0315
"""The polynomial of Newton and Schulz: its slope at 0 is steep, and five steps bring singular values to 0.7 to 1.2."""
STEPS = 5


def precision(device: torch.device) -> torch.dtype:
    """The precision in which matrices are orthogonalised: a CPU is many times slower in bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalised(matrices: Tensor) -> Tensor:
    """Bring every singular value near 1: (n, rows, columns) -> the same, in the precision of the input.

    The gradient of a matrix has few large singular values. They would take all of the step.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if rows > columns else x


class Matrices:
    """Matrices of one shape, which take their step together: one large product is faster than many small ones."""

    def __init__(self, parts: list[tuple[nn.Parameter, int, int]]) -> None:
        """Args:
        parts: a parameter, and from where to where its rows are one of the matrices.
        """
        self._parts = parts
        self.momentum: Tensor | None = None
        """(n, rows, columns), in fp32; none before the first step."""

    def step(self, learning_rate: float, weight_decay: float, beta: float, finite: Tensor) -> None:
        """Move all matrices, unless the gradients are not finite."""
        gradients = torch.stack([_rows(parameter.grad, first, last) for parameter, first, last in self._parts])
        if self.momentum is None:
            self.momentum = torch.zeros_like(gradients)
        gradients = torch.where(finite, gradients, 0.0)  # else 0 times infinity would be NaN below
        taken = finite.to(gradients.dtype)
        self.momentum.lerp_(gradients, (1 - beta) * taken)
        update = gradients.lerp(self.momentum, beta)  # Nesterov
        rows, columns = update.shape[-2:]
        rate = learning_rate * max(1, rows / columns) ** 0.5
        update = orthogonalised(update.to(precision(update.device))).float() * (-rate * taken)
        weights = [_rows(*part) for part in self._parts]
        torch._foreach_mul_(weights, 1 - learning_rate * weight_decay * taken)
        torch._foreach_add_(weights, update.unbind())

    def restore(self, momentum: Tensor | None) -> None:
        """Restore the momentum of a checkpoint; None if it is from before the first step."""
        self.momentum = None if momentum is None else momentum.to(self._parts[0][0].device)


def _rows(matrix: Tensor | None, first: int, last: int) -> Tensor:
    assert matrix is not None  # the backward pass set the gradient
    return matrix[first:last]


class Muon:
    """Muon for the matrices of blocks, AdamW for the rest.

    The learning rate of a step is that of the matrices; the others follow it in proportion.
    """

    def __init__(self, model: nn.Module, params: TrainParams) -> None:
        assert params.muon is not None
        self._muon = params.muon
        roles = roles_of(model)
        stacked = model.stacked_names if isinstance(model, Decoder) else {}
        self._shapes = _by_shape(roles.get(MATRICES, {}), stacked)
        rates = {
            EMBEDDING: params.muon.embedding_lr,
            HEAD: params.muon.head_lr,
            VECTORS: params.muon.vector_lr,
        }
        self._groups = {
            role: AdamWGroup(roles[role].values(), 0.0 if role == VECTORS else params.weight_decay, params)
            for role in rates
            if role in roles
        }
        self._ratios = {role: rate / params.max_lr for role, rate in rates.items()}

    @torch.no_grad()
    def step(self, learning_rate: float, finite: Tensor) -> None:
        """See `Optimizer.step`."""
        for matrices in self._shapes:
            matrices.step(learning_rate, self._muon.weight_decay, self._muon.momentum, finite)
        for role, group in self._groups.items():
            group.step(learning_rate * self._ratios[role], finite)

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        momenta = [matrices.momentum for matrices in self._shapes if matrices.momentum is not None]
        return {"momenta": momenta, **saved_states(self._groups.values())}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        restore_states(self._groups.values(), state)
        for matrices, saved in zip_longest(self._shapes, state["momenta"]):
            matrices.restore(saved)


def _by_shape(parameters: Mapping[str, nn.Parameter], stacked: Mapping[str, int]) -> list[Matrices]:
    """The matrices by shape. One that is several, one below another, is taken apart."""
    shapes: dict[tuple[int, ...], list[tuple[nn.Parameter, int, int]]] = {}
    for name, parameter in parameters.items():
        count = next((count for ending, count in stacked.items() if name.endswith(ending)), 1)
        rows = len(parameter) // count
        for first in range(0, len(parameter), rows):
            shapes.setdefault((rows, parameter.shape[1]), []).append((parameter, first, first + rows))
    return [Matrices(parts) for parts in shapes.values()]


OPTIMIZER = Muon
