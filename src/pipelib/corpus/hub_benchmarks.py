"""The benchmarks from the Hugging Face hub, each pinned to a commit. `hub_benchmarks.yaml` is the only list of them."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class HubBenchmark:
    """One file of a dataset repository, at a commit."""

    repo: str
    """OWNER/NAME."""
    revision: str
    path: str
    """The file's path in the repository: parquet or JSON lines."""
    sha256: str | None
    """None if only the hub's list at the commit gives it."""


_LIST = Path(__file__).with_suffix(".yaml")
HUB_BENCHMARKS = {name: HubBenchmark(**entry) for name, entry in yaml.safe_load(_LIST.read_bytes()).items()}
"""The benchmarks by their names in `download.benchmarks`."""
COMPLETION = "completion"
"""The benchmark that is made from the corpus."""


def known_benchmarks() -> list[str]:
    """Return the names that `download.benchmarks` may have."""
    return [COMPLETION, *HUB_BENCHMARKS]
