"""The benchmarks that come from the Hugging Face hub, each pinned. `hub_benchmarks.yaml` is the only list of them."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class HubBenchmark:
    """One file of a dataset repository at a commit."""

    repo: str
    """OWNER/NAME."""
    revision: str
    path: str
    """Of the file in the repository: parquet, or JSON lines."""
    sha256: str | None
    """None where only the hub's list at the commit says it."""


_LIST = Path(__file__).with_suffix(".yaml")
HUB_BENCHMARKS = {name: HubBenchmark(**entry) for name, entry in yaml.safe_load(_LIST.read_bytes()).items()}
"""By their names in `download.benchmarks`."""
COMPLETION = "completion"
"""The benchmark that is made of the corpus."""


def known_benchmarks() -> list[str]:
    """The names that `download.benchmarks` may have."""
    return [COMPLETION, *HUB_BENCHMARKS]
