"""`train.micro_batch_size: auto`: as many rows at a time as the memory of every rank holds."""

from dataclasses import replace

import torch
from torch import nn

from pipelib.training.launch.distributed import World, warmup_backward
from pipelib.training.memory import Footprint, divisors
from pipelib.training.params import TrainParams


def resolve_micro_batch_size(
    footprint: Footprint, network: nn.Module, world: World, free: int, earlier: int
) -> TrainParams:
    """The parameters with a number for `micro_batch_size: auto`, the same on every rank; as they are where it is a number.

    The arithmetic of `Footprint` decides. A GPU then tries it, and takes the next smaller one as long as it does not fit.

    Args:
        network: not yet wrapped for several ranks.
        free: bytes of each rank, before it held anything.
        earlier: the number of the checkpoint that was restored, which stays, since other rows round otherwise; 0 without one.
    """
    params = footprint.train
    if params.micro_batch_size != "auto":
        return params
    share = params.rows_per_step // world.world_size
    if earlier:
        return replace(params, micro_batch_size=divisors(share, earlier + 1)[0])
    rows = footprint.rows_that_fit(world.world_size, free) or 1
    while world.runs_ahead and rows > 1 and not world.min(_fits(footprint, network, world, rows)):
        rows = divisors(share, rows)[0]
        _forget_compiled(params)  # else the next size is compiled for any size
    _forget_compiled(params)  # it was compiled without what DDP adds
    return replace(params, micro_batch_size=rows)


def _forget_compiled(params: TrainParams) -> None:
    if params.compile:
        torch._dynamo.reset()


def _fits(footprint: Footprint, network: nn.Module, world: World, rows: int) -> bool:
    """Whether a forward and a backward pass run, with the memory taken that AdamW's moments will need."""
    params = footprint.train
    try:
        _moments = torch.empty(footprint.memory(rows).moments, dtype=torch.uint8, device=world.device)
        warmup_backward(network, rows, params.sequence_length, params.precision, world.device)
    except torch.OutOfMemoryError:
        return False
    finally:
        network.zero_grad(set_to_none=True)
    return True
