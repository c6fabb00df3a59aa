"""The batches of a training: whether data, parameters and ranks fit together, and this rank's share of every step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelib.errors import UserError
from pipelib.tokens.loader import BatchPlan, Loader, RowSource, training_rows
from pipelib.tokens.shards import Manifest
from pipelib.training.launch.distributed import World
from pipelib.training.params import TrainParams

TensorBatch = tuple[Tensor, ...]
"""`inputs` and `targets`, each (rows, T), int64 in host memory, and whatever else the objective takes."""


def make_loader(
    params: TrainParams, tokens: Path, manifest: Manifest, world: World
) -> tuple[Loader[TensorBatch], BatchPlan]:
    """Make this rank's loader of the rows of shards, see `load_rows`."""
    return load_rows(params, training_rows(tokens, manifest, params.sequence_length), manifest.fingerprint, world)


def load_rows(
    params: TrainParams, rows: RowSource, fingerprint: str, world: World
) -> tuple[Loader[TensorBatch], BatchPlan]:
    """Make this rank's loader, and the plan of the global batches that all ranks share.

    Args:
        fingerprint: of the data. It decides the order of the rows, with `params.seed`.
    """
    plan = BatchPlan(fingerprint, params.seed, len(rows), params.rows_per_step)
    size = params.micro_batch_rows(world.world_size)
    return Loader(rows, plan, size, world.rank, world.world_size, lambda batch: tensors(batch, world.device)), plan


def tensors(batch: tuple[npt.NDArray[np.int64], ...], device: torch.device) -> TensorBatch:
    """Turn a batch into tensors, pinned for a GPU, so that the copy to the device does not block. Runs on the loader's thread."""
    made = tuple(map(torch.from_numpy, batch))
    if device.type == "cuda":
        with torch.cuda.device(device):  # else pinning on this thread would create a context on GPU 0
            return tuple(tensor.pin_memory() for tensor in made)
    return made


def fit_tokens(params: TrainParams, manifest: Manifest, say: Callable[[str], object] = lambda _: None) -> TrainParams:
    """Return the parameters of the training that these shards allow: with fewer tokens, if `max_tokens` is too many passes.

    Args:
        say: is told so.

    Raises:
        UserError: there are too few tokens for one step, or for warmup and cooldown.
    """
    available = manifest.tokens("train")
    row_count = (available - 1) // params.sequence_length
    if row_count < params.rows_per_step:
        raise UserError(
            f"the training shards have {available:,} tokens, {row_count} rows of {params.sequence_length}, and one step needs "
            f"{params.rows_per_step} rows, so no step can be trained; lower train.global_batch_tokens or add text."
        )
    fitted = params.within_epochs(row_count)
    if fitted is params:
        return params
    passes = f"train.max_epochs = {params.max_epochs:g}, and the training shards have {available:,} tokens"
    if problem := next(fitted.problems(), None):
        raise UserError(
            f"{passes}, so the training ends after {fitted.max_steps:,} steps, which are too few ({problem.rstrip('.')}); raise "
            "train.max_epochs, or add text."
        )
    say(
        f"train: {passes}, so the training ends after {fitted.max_tokens:,} of train.max_tokens = {params.max_tokens:,}"
    )
    return fitted


def check_shares(params: TrainParams, world_size: int) -> None:
    """Refuse a number of ranks that cannot share a step equally.

    Raises:
        UserError: a step has fewer rows than ranks, or its rows do not divide equally.
    """
    rows, auto = params.rows_per_step, params.micro_batch_size == "auto"
    if rows < world_size or rows % (world_size * (1 if auto else params.micro_batch_rows(world_size))):
        key = f"{params.section}.micro_batch_size"
        raise UserError(
            f"{world_size} ranks with {key} = {params.micro_batch_size} cannot share the {rows} rows of a step equally, so some "
            f"would wait or rows would be lost; {'' if auto else f'lower {key}, or '}start fewer ranks with PIPELIB_NPROC."
        )
