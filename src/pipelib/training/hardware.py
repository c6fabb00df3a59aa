"""The hardware: the peak speed that model FLOP utilization refers to, and the peak memory."""

import re
import time
from dataclasses import dataclass
from functools import cache

import torch

from pipelib.model.device import AUTOCAST, gpu_in_use

_PEAK_BF16 = {
    # Dense bf16 TFLOP/s from the makers' data sheets. The first match in the device's name wins.
    "H200 NVL": 835.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H800": 989.0, "H20": 148.0,
    "GH200": 989.0, "GB200": 2500.0, "B200": 2250.0, "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "RTX A6000": 154.8, "RTX A5000": 111.1,
    "RTX 6000 Ada": 364.2, "RTX 5090": 209.5, "RTX 4090 D": 147.0, "RTX 4090": 165.2, "RTX 3090 Ti": 80.0, "RTX 3090": 71.0,
}  # fmt: skip
MEASURE_SECONDS = 0.25
"""How long the peak of an unknown device is measured, after a first product: 10 products or more where one takes 25 ms."""


@dataclass(frozen=True)
class Peak:
    """The most floating-point operations per second that devices can do."""

    flops: float
    source: str
    """Where the number comes from."""

    def times(self, devices: int) -> "Peak":
        """The peak of several such devices together."""
        return Peak(self.flops * devices, self.source if devices == 1 else f"{devices} times: {self.source}")


def peak_of(device: torch.device, precision: str) -> Peak:
    """The peak of a device: the data sheet's figure for bf16 on a known GPU, else the measured speed of a large product."""
    if device.type == "cuda" and precision == "bf16" and (peak := known_peak(torch.cuda.get_device_name(device))):
        return peak
    size = 8192 if device.type == "cuda" else 1024  # large enough that the launch of a kernel does not matter
    return Peak(
        _measured_matmul(device, precision, size, torch.get_num_threads()),
        f"measured: the best of up to 40 products of {size} x {size} matrices",
    )


def known_peak(name: str) -> Peak | None:
    """The peak of a GPU of this name, as its data sheet has it for bf16; None if it is not listed."""
    for part, teraflops in _PEAK_BF16.items():
        if re.search(rf"\b{part}\b(?! Laptop)", name) and " MIG " not in name:  # a MIG slice is a part of a GPU
            return Peak(teraflops * 1e12, f"data sheet of {part}, dense bf16")
    return None


def known_gpus() -> str:
    """The names of the GPUs that `known_peak` lists."""
    return ", ".join(_PEAK_BF16)


def peak_gpu_memory() -> int:
    """The most bytes that this process's tensors have taken on its GPU since `reset_peak_gpu_memory`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if gpu_in_use() else 0


def reset_peak_gpu_memory() -> None:
    """Forget the peak so far, which may be that of a micro-batch that was only tried."""
    if gpu_in_use():
        torch.cuda.reset_peak_memory_stats()


@cache  # for this number of threads
def _measured_matmul(device: torch.device, precision: str, size: int, _threads: int) -> float:
    # Random numbers: a GPU is up to 13 % faster on constant ones, which switch fewer bits.
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, AUTOCAST.get(precision))
    (matrix @ matrix)[0, 0].item()  # the first one loads kernels and takes memory
    best, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    for _ in range(40):
        started = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # wait for the device
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() > end:  # emulated bf16 would take a minute
            break
    return 2 * size**3 / best
