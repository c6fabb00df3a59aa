"""One optimizer step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelib.model.device import autocast
from pipelib.training.batches import TensorBatch
from pipelib.training.launch.distributed import World
from pipelib.training.loss_scale import NoLossScale
from pipelib.training.objectives import Objective
from pipelib.training.optimizer import Optimizer
from pipelib.training.params import TrainParams

NO_LOSS_SCALE = NoLossScale()


class StepResult(NamedTuple):
    """The result of a step. Its tensors stay on the device, so that the host does not wait."""

    loss: Tensor
    """The mean over the global batch, a scalar."""
    grad_norm: Tensor
    """The gradient's norm before clipping, a scalar."""
    rank_losses: Tensor
    """The mean over each rank's share, (world_size,)."""
    stop: Tensor
    """The signal that asked any rank to stop, a scalar; 0 if none did."""
    overflow: Tensor
    """Whether the gradient was not finite because of the loss scale, which is smaller now: a scalar, 0 or 1."""


def take_step(
    network: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    micro_batches: Sequence[TensorBatch],
    learning_rate: float,
    params: TrainParams,
    world: World,
    stop: int = 0,
    scale: NoLossScale = NO_LOSS_SCALE,
) -> StepResult:
    """Take one optimizer step on this rank's micro-batches. It is skipped if a loss or the gradient norm is not finite.

    Args:
        network: the objective as this rank runs it: compiled or not, and wrapped if there are several ranks.
        stop: the signal that asked this rank to stop, 0 for none; all ranks learn of it.
        scale: keeps small gradients from becoming zero in fp16.
    """
    counts = [objective.target_count(batch[1]) for batch in micro_batches]
    targets_per_rank = objective.targets_per_rank(counts, world)
    losses = []
    for micro_step, (batch, count) in enumerate(zip(micro_batches, counts, strict=True), start=1):
        # Gradients are averaged over ranks only in the backward pass of the last micro-step.
        with world.sync_when(micro_step == len(micro_batches), network), autocast(world.device, params.precision):
            # Divide twice: equal micro-batches then give exactly the bits of a mean of their means.
            divisor = count or 1  # the loss is 0 if no target counts
            loss = network(*map(world.to_device, batch)) / divisor / (targets_per_rank / divisor)
        scale.scaled(loss).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    scale.unscale(network.parameters())
    grad_norm = nn.utils.clip_grad_norm_(network.parameters(), params.grad_clip_norm)
    loss = torch.stack(losses).sum()
    # One all-gather for both: every rank then judges the same losses and learns of a stop at the same step.
    rank_losses, stops = world.all_gather(torch.stack((loss, torch.full_like(loss, stop)))).unbind(1)
    finite = (rank_losses.sum() + grad_norm).isfinite()
    optimizer.step(learning_rate, finite)
    overflow = scale.update(finite).to(loss.dtype)
    network.zero_grad(set_to_none=True)
    return StepResult(rank_losses.mean(), grad_norm, rank_losses, stops.max(), overflow)
