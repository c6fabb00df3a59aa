"""The state of the machine, as it is recorded beside a stage."""

import ctypes
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pipelib.tracking import system_metrics
from pipelib.tracking.record import Record, read_events
from pipelib.tracking.system_metrics import CPU, Gpus, Sampler, cpu_and_memory


def test_cpu_is_the_share_of_time_that_was_work(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_and_memory()
    before, busy = time.process_time(), 0
    while time.process_time() < before + 0.3:
        busy += 1
    assert 0 < cpu_and_memory()[CPU] <= 100
    memory = SimpleNamespace(total=4_096_000_000, available=3_072_000_000, percent=25.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    numbers = cpu_and_memory()
    assert numbers["system/system_memory_usage_megabytes"] == 1024.0
    assert numbers["system/system_memory_usage_percentage"] == 25.0


def test_a_machine_without_psutil_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert cpu_and_memory() == {}


def nvml(**broken: Any) -> Any:
    """Two GPUs behind NVML's functions, as nvml.h declares them; the second one tells no power."""

    def count(out: Any) -> int:
        out._obj.value = 2
        return 0

    def handle(index: int, out: Any) -> int:
        out._obj.value = index + 1
        return 0

    def used(handle: ctypes.c_void_p, out: Any) -> int:
        out._obj.total, out._obj.used = 80_000_000_000, 20_000_000_000 * (handle.value or 0)
        return 0

    def busy(handle: ctypes.c_void_p, out: Any) -> int:
        out._obj.gpu = 90 + (handle.value or 0)
        return 0

    def power(handle: ctypes.c_void_p, out: Any) -> int:
        out._obj.value = 650_500
        return 0 if handle.value == 1 else 3  # NVML_ERROR_NOT_SUPPORTED

    functions = {
        "nvmlInit_v2": lambda: 0, "nvmlDeviceGetCount_v2": count, "nvmlDeviceGetHandleByIndex_v2": handle,
        "nvmlDeviceGetMemoryInfo": used, "nvmlDeviceGetUtilizationRates": busy, "nvmlDeviceGetPowerUsage": power,
    }  # fmt: skip
    return SimpleNamespace(**{**functions, **broken})


def test_gpus_tell_use_memory_and_power() -> None:
    assert Gpus(nvml()).state() == {
        "system/gpu_0_memory_usage_megabytes": 20000.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_0_utilization_percentage": 91,
        "system/gpu_0_power_usage_watts": 650.5,
        "system/gpu_1_memory_usage_megabytes": 40000.0,
        "system/gpu_1_memory_usage_percentage": 50.0,
        "system/gpu_1_utilization_percentage": 92,
    }


def test_a_driver_that_does_not_start_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Gpus(nvml(nvmlInit_v2=lambda: 9)).state() == {}  # NVML_ERROR_DRIVER_NOT_LOADED

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(system_metrics.ctypes, "CDLL", missing)
    assert Gpus().state() == {}


def test_nothing_is_logged_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(system_metrics, "cpu_and_memory", lambda: {"a": 1.0})
    said: list[str] = []
    logging = threading.Event()

    def slow(*_: object) -> None:
        logging.set()
        time.sleep(0.2)  # long enough for a close that does not wait
        said.append("logged")

    sampler = Sampler(slow, 1)
    assert logging.wait(60)
    sampler.close()
    said.append("closed")
    sampler._thread.join()
    assert said[-1] == "closed"


def test_samples_go_on_after_a_resume_and_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "SAMPLE_SECONDS", 0.02)
    path = tmp_path / "record.jsonl"
    for least in (2, 4):
        record = Record(path)
        first = record.last_step(CPU) + 1
        sampler = Sampler(lambda numbers, step, record=record: record.append_metrics(numbers, step), first)
        while record.last_step(CPU) < least:
            sum(range(1000))  # work, so that ticks pass
        sampler.close()
        sampler._thread.join()
        record.close()
    steps = [event["step"] for event in read_events(path)[0] if CPU in event["metrics"]]
    assert steps == sorted(set(steps))
    assert steps[0] == 1 or len(steps) >= 4
