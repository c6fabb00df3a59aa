"""The cores and the memory that a container allows count, whatever the machine has."""

import os
from pathlib import Path

import pytest
import torch

from pipelib.model import device
from pipelib.model.device import free_memory
from pipelib.processes import available_cores

CPU = torch.device("cpu")


def make(root: Path, files: dict[str, str]) -> Path:
    """Files of /proc and /sys below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


V2, GROUPS = "proc/self/cgroup", "sys/fs/cgroup"
ONE, INNER = f"{GROUPS}/a.slice", f"{GROUPS}/a.slice/b ü"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({V2: "0::/\n"}, 16),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "max 100000\n"}, 16),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "200000 100000\n"}, 2),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "150000 100000\n"}, 2),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "1000 100000\n"}, 1),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "9900000 100000\n"}, 16),
        ({V2: "0::/a.slice/b ü\n", f"{INNER}/cpu.max": "max 1", f"{ONE}/cpu.max": "300000 100000"}, 3),
        ({V2: "0::/a.slice/b ü\n", f"{INNER}/cpu.max": "500000 100000", f"{ONE}/cpu.max": "700000 100000"}, 5),
        ({V2: "0::/a.slice/b ü\n", f"{INNER}/cpu.max": "700000 100000", f"{GROUPS}/cpu.max": "400000 100000"}, 4),
        ({V2: "0::/only/on/the/host\n", f"{GROUPS}/cpu.max": "300000 100000"}, 3),
        ({V2: "0::/../..\n", f"{GROUPS}/cpu.max": "300000 100000"}, 3),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "nonsense"}, 16),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "100000 0"}, 16),
        ({V2: "0::/\n", f"{GROUPS}/cpu.max": "\x00\xff"}, 16),
        ({V2: "nonsense\n::\n"}, 16),
        (
            {
                V2: "4:memory:/x\n3:cpu,cpuacct:/docker/1\n0::/\n",
                f"{GROUPS}/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                f"{GROUPS}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                V2: "1:cpu:/a\n",
                f"{GROUPS}/cpu/a/cpu.cfs_quota_us": "-1\n",
                f"{GROUPS}/cpu/a/cpu.cfs_period_us": "100000\n",
                f"{GROUPS}/cpu/cpu.cfs_quota_us": "600000\n",
                f"{GROUPS}/cpu/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        ({V2: "2:name=systemd:/\n0::/a\n", f"{GROUPS}/unified/a/cpu.max": "300000 100000"}, 3),
    ],
)
def test_the_smallest_quota_on_the_way_to_the_root_counts_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert available_cores(make(tmp_path, files)) == cores


def test_a_quota_larger_than_what_a_process_may_run_on_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert available_cores(make(tmp_path, {V2: "0::/\n", f"{GROUPS}/cpu.max": "400000 100000"})) == 1


MEMORY = {"memory.max": "6000", "memory.current": "5000", "memory.stat": "anon 4000\ninactive_file 500\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 10_000),
        ({f"{GROUPS}/{name}": text for name, text in MEMORY.items()}, 1500),
        ({f"{ONE}/{name}": text for name, text in MEMORY.items()}, 1500),
        ({f"{ONE}/{name}": text for name, text in (MEMORY | {"memory.max": "max"}).items()}, 10_000),
        ({f"{ONE}/{name}": text for name, text in (MEMORY | {"memory.max": "100"}).items()}, 0),
        ({f"{INNER}/memory.max": "4000", f"{INNER}/memory.current": "100"}, 3900),
        (
            {
                f"{GROUPS}/memory/job/memory.limit_in_bytes": "7000",
                f"{GROUPS}/memory/job/memory.usage_in_bytes": "6500",
                f"{GROUPS}/memory/job/memory.stat": "total_inactive_file 40\nmore\n",
                f"{GROUPS}/memory/memory.limit_in_bytes": "9223372036854771712",
                f"{GROUPS}/memory/memory.usage_in_bytes": "6500",
            },
            540,
        ),
    ],
)
def test_the_memory_that_the_tightest_group_leaves_is_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int
) -> None:
    monkeypatch.setattr(device, "_meminfo", lambda _: 10_000)
    make(tmp_path, {V2: "7:memory:/job/step\n0::/a.slice/b ü\n", **files})
    assert free_memory(CPU, tmp_path) == free
