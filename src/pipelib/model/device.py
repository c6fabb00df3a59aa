"""The device that a model runs on, its precision and its memory."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pipelib.processes import available_cores, control_groups, keep_freed_memory, positive_int_from_env, system_file


def pick_device(local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """Choose this rank's GPU, or the CPU with this rank's share of the cores as threads.

    The number of threads is fixed, because the last bits of sums on a CPU depend on it; `$PIPELIB_THREADS` sets it.
    """
    # By default torch.compile starts one worker per core of the machine, which may be more than a container's quota.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, available_cores())))
    if torch.cuda.is_available():
        # Deterministic cuBLAS needs it; cuBLAS reads it once, at the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    keep_freed_memory()
    torch.set_num_threads(positive_int_from_env("PIPELIB_THREADS") or max(1, available_cores() // local_world_size))
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute matrix products in bf16 if `precision` is "bf16"; change nothing for "fp32". Weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Free bytes on a GPU; on a CPU, those that the system and this process's control groups allow.

    Args:
        root: where /proc and /sys are.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_meminfo("MemAvailable"), *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group with a limit still allows. Cached files count as free, since the kernel drops them."""
    for group in control_groups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
        ):
            stat = dict(line.split(" ", 1) for line in system_file(group / "memory.stat").splitlines() if " " in line)
            numbers = system_file(group / limit), system_file(group / used), stat.get(cached, "0")
            if all(number.isdecimal() for number in numbers):
                allowed, taken, droppable = map(int, numbers)
                yield max(0, allowed - taken + droppable)


def total_memory(device: torch.device) -> int:
    """Total bytes of a device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo(key: str) -> int:
    """A line of Linux's /proc/meminfo in bytes; on another system, half of all memory."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines[key].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
