"""The ranks of a training: who this one is, and what all of them agree on."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipelib.model.device import autocast, pick_device

T = TypeVar("T")
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
        """Whether the host goes on while the device works, so that looking at a value would wait for it."""
        return self.device.type == "cuda"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as every rank trains it: with averaged gradients where there are several."""
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A tensor in host memory as one on this rank's device; the host does not wait where it is pinned."""
        return tensor.to(self.device, non_blocking=True)

    def warm_up(self, network: nn.Module, rows: int, sequence_length: int, precision: str) -> None:
        """Run one backward pass on nothing, so that gradients are summed in the same groups from the first step on.

        DDP groups them anew after its first backward pass, and what three ranks or more sum depends, in its last bits,
        on the groups: a resumed run would take one step with those that an uninterrupted one has long left.

        Args:
            rows: of a micro-batch: torch.compile would compile once more for another shape.
        """
        if self.world_size > 1:
            warmup_backward(network, rows, sequence_length, precision, self.device)
            network.zero_grad(set_to_none=True)

    def sync_when(self, wanted: bool, model: nn.Module) -> AbstractContextManager[object]:
        """Average gradients in the backward pass of what runs forward in this block only when `wanted`."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not wanted else nullcontext()

    def all_gather(self, value: Tensor) -> Tensor:
        """Every rank's tensor, on every rank: one row each."""
        if self.world_size == 1:
            return value[None]
        rows = value.new_empty(self.world_size, *value.shape)
        _all_gather(rows, value[None])
        return rows

    def min(self, value: int) -> int:
        """The smallest of all ranks' numbers, on every rank."""
        return int(self.all_gather(torch.tensor(value, device=self.device)).min())

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def from_rank_0(self, look: Callable[[], T]) -> T:
        """What the first rank finds, on every rank; no other looks."""
        return self.broadcast(look() if self.is_main else None)  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


def warmup_backward(network: nn.Module, rows: int, sequence_length: int, precision: str, device: torch.device) -> None:
    """A forward and a backward pass on `rows` rows of one token; they leave gradients, and change no weight."""
    tokens = torch.zeros(rows, sequence_length, dtype=torch.long, device=device)
    with autocast(device, precision):
        loss = network(tokens, tokens.clone())  # the same tensor twice would be compiled as that
    loss.backward()


@contextmanager
def join_world() -> Iterator[World]:
    """Take this process's place: alone, or as the rank that torchrun's environment says; a stage has removed that of others.

    One rank a GPU over NCCL where there are GPUs, else ranks on the CPU over gloo, which share its cores equally.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = pick_device(int(os.environ.get("LOCAL_RANK", "0")), local_ranks)
    if world_size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield World(rank, world_size, device, local_ranks)
    dist.destroy_process_group()  # not after an error of this rank alone: NCCL would wait for the others
