"""Sample CPU, memory and GPU use while a stage runs, under the names that MLflow's page of system metrics uses.

MLflow's own monitor sends from its own thread. It bypasses the record, and ignores the time limit at the end of a stage. This
one writes to the record, which is mirrored like every other metric.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SAMPLE_SECONDS = 10.0
"""Between two samples; a shorter stage has none."""
CPU = "system/cpu_utilization_percentage"

Log = Callable[[Mapping[str, float], int], None]


class Sampler:
    """A daemon thread that logs the state of this machine."""

    def __init__(self, log: Log, first: int) -> None:
        """Args:
        log: called with the metrics and the number of the sample, which serves as the step.
        first: the number of the first sample; a resumed run continues the numbering.
        """
        self._log, self._next = log, first
        self._gpus = Gpus()
        cpu_and_memory()  # the first call only sets the starting point
        self._ending, self._turn = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Nothing is logged after this returns; a sample in progress is dropped."""
        with self._turn:
            self._ending.set()

    def _work(self) -> None:
        while not self._ending.wait(SAMPLE_SECONDS):
            numbers = {**cpu_and_memory(), **self._gpus.state()}
            with self._turn:
                if numbers and not self._ending.is_set():
                    self._log(numbers, self._next)
                    self._next += 1


def cpu_and_memory() -> dict[str, float]:
    """CPU utilization since the last call, and the memory in use; empty without psutil, as on a bare GPU machine."""
    try:
        import psutil
    except ImportError:
        return {}
    memory = psutil.virtual_memory()
    return {
        CPU: psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": round((memory.total - memory.available) / 1e6, 1),
        "system/system_memory_usage_percentage": memory.percent,
    }


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t, in per cent of the time."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Gpus:
    """NVIDIA GPUs, read through the driver's library NVML; without it there are none."""

    def __init__(self, library: Any = None) -> None:
        """Args:
        library: NVML, if it is already loaded.
        """
        self._handles: list[ctypes.c_void_p] = []
        try:
            self._nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
            count = ctypes.c_uint()
            if self._nvml.nvmlInit_v2() == 0 and self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
                self._handles = list(self._devices(count.value))
        except (OSError, AttributeError):  # no driver, or one too old to have these functions
            return

    def _devices(self, count: int) -> Iterator[ctypes.c_void_p]:
        for index in range(count):
            handle = ctypes.c_void_p()
            if self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
                yield handle

    def state(self) -> dict[str, float]:
        """Memory, utilization and power of each GPU, as far as it reports them."""
        found: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            used, busy, milliwatts = _Memory(), _Utilization(), ctypes.c_uint()
            if self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(used)) == 0 and used.total:
                found[f"system/gpu_{index}_memory_usage_megabytes"] = round(used.used / 1e6, 1)
                found[f"system/gpu_{index}_memory_usage_percentage"] = round(100 * used.used / used.total, 1)
            if self._nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(busy)) == 0:
                found[f"system/gpu_{index}_utilization_percentage"] = busy.gpu
            if self._nvml.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)) == 0:
                found[f"system/gpu_{index}_power_usage_watts"] = milliwatts.value / 1000
        return found
