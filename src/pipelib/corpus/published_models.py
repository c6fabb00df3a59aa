"""The published models: the location of their weights, and their shapes. `published_models.yaml` is the only list of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class PublishedModel:
    """A model that others trained, with its weights pinned."""

    title: str
    """The name for people: `GPT-2 124M`."""
    repo: str
    """The model repository on the Hugging Face hub, OWNER/NAME."""
    revision: str
    """The commit of the repository."""
    sha256: str | None
    """The SHA-256 of its `model.safetensors`; None if only the hub's list at the commit gives it."""
    vocab_size: int
    """Its tokens, the special ones included."""
    architecture: str
    """The model family, as in `model.architecture`."""
    shape: Mapping[str, int]
    """The parameters of the family."""


_LIST = Path(__file__).with_suffix(".yaml")
PUBLISHED_MODELS = {name: PublishedModel(**entry) for name, entry in yaml.safe_load(_LIST.read_bytes()).items()}
"""The models by their names in `download.models`, `model.init_from` and `evaluate.baselines`."""
