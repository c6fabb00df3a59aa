"""`train.micro_batch_size: auto`: the largest micro-batch that fits into the memory of every rank."""

from dataclasses import replace

import torch
from torch import nn

from pipelib.training.launch.distributed import World, warmup_backward
from pipelib.training.memory import NCCL_BYTES, Footprint, divisors, is_out_of_memory
from pipelib.training.objectives import Objective
from pipelib.training.params import TrainParams


def resolve_micro_batch_size(
    footprint: Footprint, objective: Objective, network: nn.Module, world: World, free: int, restored: int
) -> TrainParams:
    """Replace `micro_batch_size: auto` by a number, the same on every rank. A number that is set stays.

    `Footprint` estimates the number. A GPU then tries it, and tries the next smaller one until one fits.

    Args:
        network: the objective, compiled or not, and not yet wrapped for several ranks.
        free: bytes that each rank had before it allocated anything.
        restored: the number in the checkpoint that was loaded, 0 without one. It is kept, since another number of rows
            rounds differently.
    """
    params = footprint.train
    if params.micro_batch_size != "auto":
        return params
    share = params.rows_per_step // world.world_size
    if restored:
        return replace(params, micro_batch_size=divisors(share, restored + 1)[0])
    rows = footprint.rows_that_fit(free) or 1
    while world.runs_ahead and rows > 1 and not world.min(_fits(footprint, objective, network, world, rows)):
        rows = divisors(share, rows)[0]
        _forget_compiled(params)  # else torch.compile sees the size change and compiles with dynamic shapes
    _forget_compiled(params)  # it was compiled without DDP
    return replace(params, micro_batch_size=rows)


def _forget_compiled(params: TrainParams) -> None:
    if params.compile:
        torch._dynamo.reset()


def _fits(footprint: Footprint, objective: Objective, network: nn.Module, world: World, rows: int) -> bool:
    """Whether two micro-steps fit beside the memory that the optimizer's state, and the exchange between ranks, will need.

    The second one adds to the gradients of the first, so both exist. DDP's buckets come on top.
    """
    params = footprint.train
    parameters, several = 4 * footprint.parameters, world.world_size > 1
    try:
        _moments = torch.empty(footprint.memory(rows).moments, dtype=torch.uint8, device=world.device)
        _exchange = torch.empty((parameters + NCCL_BYTES) * several, dtype=torch.uint8, device=world.device)
        for _ in range(min(2, params.rows_per_step // world.world_size // rows)):
            warmup_backward(
                network, objective.dummy_batch(rows, params.sequence_length), params.precision, world.device
            )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        network.zero_grad(set_to_none=True)
    return True
