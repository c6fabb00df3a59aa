"""Published models: OpenAI's by name, whose shapes `published_models.yaml` lists, and any of the hub as OWNER/NAME@COMMIT."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipelib.files import sha256_json


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

_HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*@[0-9a-f]{40}", re.ASCII)
WEIGHTS = "model.safetensors"
"""The file of a model's weights, if they are in one file."""


def is_hub_model(name: str) -> bool:
    """Return whether a name is OWNER/NAME@COMMIT: a model of the hub at a commit."""
    return _HUB_MODEL.fullmatch(name) is not None


def is_model_folder(name: str) -> bool:
    """Return whether the name of a model is a folder of the user: it has a slash and no commit."""
    return "/" in name and not is_hub_model(name)


def is_downloaded(name: str) -> bool:
    """Return whether `download.models` can name such a model. Other names with a slash are folders."""
    return name in PUBLISHED_MODELS or is_hub_model(name)


def folder_name(name: str) -> str:
    """Return the name of a downloaded model's folder in data/models."""
    return name.replace("/", "--")


def hash_of_weights(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 for the weight files of a model, by their names and hashes: that of the file, if it is one."""
    return hashes.get(WEIGHTS) or sha256_json(dict(hashes))
