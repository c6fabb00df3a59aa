"""`train.micro_batch_size: auto`: as many rows at a time as the memory of every rank holds."""

from dataclasses import replace

import torch
from torch import nn

from pipelib.model.params import ModelParams
from pipelib.training.launch.distributed import World, warmup_backward
from pipelib.training.memory import divisors, padded_parameters, rows_that_fit
from pipelib.training.params import TrainParams


def resolve_micro_batch_size(
    model: ModelParams,
    vocab_size: int,
    params: TrainParams,
    network: nn.Module,
    world: World,
    free: int,
    earlier: int,
) -> TrainParams:
    """The parameters with a number for `micro_batch_size: auto`, the same on every rank; as they are where it is a number.

    The arithmetic of `memory_of` decides. A GPU then tries it, and takes the next smaller one as long as it does not fit.

    Args:
        network: not yet wrapped for several ranks.
        free: bytes of each rank, before it held anything.
        earlier: the number of the checkpoint that was restored, which stays, since other rows round otherwise; 0 without one.
    """
    if params.micro_batch_size != "auto":
        return params
    share = params.rows_per_step // world.world_size
    if earlier:
        return replace(params, micro_batch_size=divisors(share, earlier + 1)[0])
    rows = rows_that_fit(model, vocab_size, params, world.world_size, free) or 1
    moments = 8 * padded_parameters(model, vocab_size)
    while world.runs_ahead and rows > 1 and not world.min(_fits(moments, params, network, world, rows)):
        rows = divisors(share, rows)[0]
        _forget_compiled(params)  # else the next size is compiled for any size
    _forget_compiled(params)  # it was compiled without what DDP adds
    return replace(params, micro_batch_size=rows)


def _forget_compiled(params: TrainParams) -> None:
    if params.compile:
        torch._dynamo.reset()


def _fits(moments: int, params: TrainParams, network: nn.Module, world: World, rows: int) -> bool:
    """Whether a forward and a backward pass run, with the bytes taken that AdamW's moments will need."""
    try:
        _moments = torch.empty(moments, dtype=torch.uint8, device=world.device)
        warmup_backward(network, rows, params.sequence_length, params.precision, world.device)
    except torch.OutOfMemoryError:
        return False
    finally:
        network.zero_grad(set_to_none=True)
    return True
