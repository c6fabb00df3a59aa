"""Where a model runs, and in which arithmetic."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from pipelib.processes import available_cores, keep_freed_memory, positive_setting


def pick_device(local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """This rank's GPU, or the CPU with this rank's share of the cores as threads.

    The number of threads is fixed, because sums on a CPU depend on it in their last bits; `$PIPELIB_THREADS` sets it.
    """
    if torch.cuda.is_available():
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read once, at the first product; determinism needs it
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    keep_freed_memory()
    torch.set_num_threads(positive_setting("PIPELIB_THREADS") or max(1, available_cores() // local_world_size))
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 matrix products where `precision` is "bf16"; nothing for "fp32". Weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
