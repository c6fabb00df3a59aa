"""One optimizer step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelib.model.device import autocast
from pipelib.training.batches import TensorBatch
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import Objective
from pipelib.training.optimizer import Optimizer
from pipelib.training.params import TrainParams


class StepResult(NamedTuple):
    """What a step came to: on the device, so that nothing waits for it."""

    loss: Tensor
    """The mean of the global batch, a scalar."""
    grad_norm: Tensor
    """Of its gradient before clipping, a scalar."""
    rank_losses: Tensor
    """The mean of every rank's share, (world_size,)."""
    stop: Tensor
    """The signal that asks a rank to stop, a scalar; 0 where none is asked."""


def take_step(
    network: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    batches: Sequence[TensorBatch],
    learning_rate: float,
    params: TrainParams,
    world: World,
    stop: int = 0,
) -> StepResult:
    """One optimizer step on this rank's micro-batches; none where a loss or the gradient norm is not finite.

    Args:
        network: the objective as this rank runs it: compiled, and wrapped where there are several ranks.
        stop: the signal that asks this rank to stop, for all ranks to know of.
    """
    weights = [objective.weight(targets) for _, targets in batches]
    total = objective.total(weights, world)
    losses = []
    for micro_step, ((inputs, targets), weight) in enumerate(zip(batches, weights, strict=True), start=1):
        # Gradients of several ranks are averaged in the backward pass of the last micro-step only.
        with world.sync_when(micro_step == len(batches), network), autocast(world.device, params.precision):
            # Divided twice: so equal micro-batches give the very bits of a mean of their means.
            counted = weight or 1  # where no target counts, the loss is 0
            loss = network(world.to_device(inputs), world.to_device(targets)) / counted / (total / counted)
        loss.backward()
        losses.append(loss.detach())
    grad_norm = nn.utils.clip_grad_norm_(network.parameters(), params.grad_clip_norm)
    loss = torch.stack(losses).sum()
    rank_losses, stops = world.all_gather(torch.stack((loss, torch.full_like(loss, stop)))).unbind(1)
    optimizer.step(learning_rate, (rank_losses.sum() + grad_norm).isfinite())
    network.zero_grad(set_to_none=True)
    return StepResult(rank_losses.mean(), grad_norm, rank_losses, stops.max())
