"""Where a model runs, in which arithmetic, and with how much memory."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

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


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU; on a CPU what the system and this process's control group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, group = _meminfo("MemAvailable"), Path("/sys/fs/cgroup")
    limit, used, stat = (group / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        cached = dict(line.split() for line in stat.read_text().splitlines())[
            "inactive_file"
        ]  # freed when it is needed
        free = min(free, int(most) - int(used.read_text()) + int(cached))
    return free


def total_memory(device: torch.device) -> int:
    """Bytes of memory a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo(key: str) -> int:
    """A line of Linux's /proc/meminfo in bytes; half of all memory on another system."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines[key].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
