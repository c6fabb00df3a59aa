"""The ranks of a training: which one this process is, and what they exchange."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelib.model.device import autocast, pick_device
from pipelib.processes import positive_int_from_env
from pipelib.workspace.places import state_root

T = TypeVar("T")
TIMEOUT_MINUTES = 30
"""How long ranks wait for each other before the training fails, unless `$PIPELIB_TIMEOUT` says otherwise.

NCCL's own 10 minutes would end a healthy training whose first rank hashes large checkpoints on a slow network disk.
"""
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks."""

    rank: int
    world_size: int
    device: torch.device
    local_ranks: int = 1
    """Ranks on this rank's machine."""

    @property
    def is_main(self) -> bool:
        """Whether this rank records, saves and prints."""
        return self.rank == 0

    @property
    def runs_ahead(self) -> bool:
        """Whether the host runs ahead of the device, so that reading a value would wait for it."""
        return self.device.type == "cuda"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model for training: with several ranks, DDP averages their gradients."""
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from host memory to this rank's device. The host does not wait if the tensor is pinned."""
        return tensor.to(self.device, non_blocking=True)

    def warm_up(self, network: nn.Module, batch: Sequence[Tensor], precision: str) -> None:
        """Run one backward pass on a dummy batch, so that DDP sums gradients in the same buckets from the first step on.

        DDP rebuilds its buckets after the first backward pass. With three ranks or more, the last bits of a sum depend on the
        buckets, so the first step of a resumed run would differ from that step in an uninterrupted run.

        Args:
            batch: a micro-batch of dummy tokens; for another shape torch.compile would compile again.
        """
        if self.world_size > 1:
            warmup_backward(network, batch, precision, self.device)
            network.zero_grad(set_to_none=True)

    def sync_when(self, wanted: bool, model: nn.Module) -> AbstractContextManager[object]:
        """Average gradients over ranks only if `wanted`, for forward passes in this block and their backward passes."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not wanted else nullcontext()

    def all_gather(self, value: Tensor) -> Tensor:
        """Give every rank the tensors of all ranks, one row each: (...) -> (world_size, ...)."""
        if self.world_size == 1:
            return value[None]
        rows = value.new_empty(self.world_size, *value.shape)
        _all_gather(rows, value[None])
        return rows

    def min(self, value: int) -> int:
        """Give every rank the smallest of all ranks' numbers."""
        return int(self.all_gather(torch.tensor(value, device=self.device)).min())

    def broadcast(self, value: T) -> T:
        """Give every rank the value of rank 0."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def from_rank_0(self, find: Callable[[], T]) -> T:
        """Call `find` on rank 0 only, and give every rank its result."""
        return self.broadcast(find() if self.is_main else None)  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum_exactly(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Give every rank the sum of an array of 64-bit numbers over all ranks."""
        if self.world_size == 1:
            return values
        summed: npt.NDArray[np.float64] = self.sum(torch.from_numpy(values).to(self.device)).cpu().numpy()
        return summed

    def sum(self, value: Tensor) -> Tensor:
        """Give every rank the sum of a tensor over all ranks."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


def warmup_backward(network: nn.Module, batch: Sequence[Tensor], precision: str, device: torch.device) -> None:
    """Run a forward and a backward pass on a dummy batch. It leaves gradients but changes no weight."""
    inputs = [tensor.to(device) for tensor in batch]
    with autocast(device, precision):
        loss = network(*inputs)
    loss.backward()


@contextmanager
def join_world() -> Iterator[World]:
    """Join the ranks: alone, or as the rank in torchrun's environment variables. The stage has removed another job's.

    With GPUs, each rank has one and they communicate over NCCL. Without, the ranks share the CPU's cores equally, over gloo.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")), local_ranks)
    if device.type == "cuda":
        # torch's own choice is the temporary folder, which new machines and new containers do not keep.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(state_root() / "inductor"))
    if world_size == 1:
        yield World(0, 1, device)
        return
    on_gpu = device.type == "cuda"
    # With `device_id` NCCL connects now, so a broken network shows before the model is built.
    backend, bound_to = ("nccl", device) if on_gpu else ("gloo", None)
    timeout = timedelta(minutes=positive_int_from_env("PIPELIB_TIMEOUT") or TIMEOUT_MINUTES)
    dist.init_process_group(backend, timeout=timeout, device_id=bound_to)
    yield World(rank, world_size, device, local_ranks)
    dist.destroy_process_group()  # not in a `finally`: after an error on this rank alone, NCCL would wait for the others


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether ranks could not communicate, as when one has died. gloo raises no type of its own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
