"""The published models: where their weights are, and their shapes. `published_models.yaml` is the only list of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class PublishedModel:
    """A model that others trained, its weights pinned."""

    title: str
    """For people: `GPT-2 124M`."""
    repo: str
    """The model repository of the Hugging Face hub, OWNER/NAME."""
    revision: str
    """Its commit."""
    sha256: str | None
    """Of `model.safetensors` there; None where only the hub's list at the commit says it."""
    vocab_size: int
    """Its tokens, the special ones included."""
    architecture: str
    """The family, as in `model.architecture`."""
    shape: Mapping[str, int]
    """The parameters of the family."""


_LIST = Path(__file__).with_suffix(".yaml")
PUBLISHED_MODELS = {name: PublishedModel(**entry) for name, entry in yaml.safe_load(_LIST.read_bytes()).items()}
"""By their names in `download.models`, `model.init_from` and `evaluate.baselines`."""
