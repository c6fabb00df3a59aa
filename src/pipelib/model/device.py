"""Where a model runs, in which arithmetic, and with how much memory."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pipelib.processes import available_cores, control_groups, keep_freed_memory, positive_int_from_env, system_file


def pick_device(local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """This rank's GPU, or the CPU with this rank's share of the cores as threads.

    The number of threads is fixed, because sums on a CPU depend on it in their last bits; `$PIPELIB_THREADS` sets it.
    """
    # torch.compile would start one for each of the machine's cores, whatever a container's quota allows.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, available_cores())))
    if torch.cuda.is_available():
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # read once, at the first product; determinism needs it
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    keep_freed_memory()
    torch.set_num_threads(positive_int_from_env("PIPELIB_THREADS") or max(1, available_cores() // local_world_size))
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 matrix products where `precision` is "bf16"; nothing for "fp32". Weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes free on a GPU; on a CPU what the system and the control groups around this process leave.

    Args:
        root: where /proc and /sys are.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_meminfo("MemAvailable"), *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """The bytes that each control group still allows, where it limits them; cached files give way when it is needed."""
    for group in control_groups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
        ):
            stat = dict(line.split(" ", 1) for line in system_file(group / "memory.stat").splitlines() if " " in line)
            numbers = system_file(group / limit), system_file(group / used), stat.get(cached, "0")
            if all(number.isdecimal() for number in numbers):
                most, taken, freed = map(int, numbers)
                yield max(0, most - taken + freed)


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
