"""What every family of models says of its parameters, and section `model` of params.yaml.

A family is two files of one name, which is also its `model_type` in config.json: `shapes/NAME.py`, its parameters and what
follows from them by arithmetic, without torch; and `families/NAME.py`, its network. Both are loaded by that name, so that a new
family changes nothing for those who use another one.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import Field, asdict, dataclass
from typing import Any, ClassVar

from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.model import shapes
from pipelib.schema import Choice

DEFAULT = "gpt2"
"""The family of before there was a choice; see `decides`."""


class ModelParams(ABC):
    """A model's parameters: a frozen dataclass of its family, with `architecture` and `context_length` among its fields."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    title: ClassVar[str]
    """The family's name for people: `GPT-2`."""
    architecture: str
    """The family's name: that of its files."""
    context_length: int
    """The most tokens the model can look at."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The shape, for people: `12 layers, 12 heads, ...`."""

    @abstractmethod
    def parameters(self, vocab_size: int) -> int:
        """Trainable numbers. Memory counts them for a vocabulary with its padding, everything else without."""

    @abstractmethod
    def matrix_parameters(self, vocab_size: int) -> int:
        """Numbers in matrices that tokens are multiplied with, the output layer's included: what bf16 keeps copies of."""

    @abstractmethod
    def flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """Floating-point operations that training needs for one token, forward and backward."""

    @abstractmethod
    def activation_bytes(self, bf16: bool, checkpointing: bool) -> int:
        """Bytes that the layers keep of one token for the backward pass; with checkpointing their inputs, and one layer's all."""

    def decides(self) -> dict[str, object]:
        """The parameters as what decides a result.

        The architecture is among them but for GPT-2's: earlier versions did not name it, and its results are theirs.
        """
        fields = asdict(self)
        return {key: value for key, value in fields.items() if (key, value) != ("architecture", DEFAULT)}


def known_families() -> list[str]:
    """The names that `model.architecture` may have."""
    return sorted(module.name for module in pkgutil.iter_modules(shapes.__path__))


def family_params(name: str) -> type[ModelParams]:
    """The dataclass of a family's parameters."""
    found: type[ModelParams] = importlib.import_module(f"pipelib.model.shapes.{name}").PARAMS
    return found


def published_params(name: str) -> ModelParams:
    """The parameters of one of `PUBLISHED_MODELS`."""
    published = PUBLISHED_MODELS[name]
    return family_params(published.architecture)(**published.shape)


def _section(name: str) -> type:
    section: type = importlib.import_module(f"pipelib.model.shapes.{name}").SECTION
    return section


@dataclass(frozen=True)
class InitialisedModelParams(ModelParams):
    """Section `model` of params.yaml: the parameters of the family that `architecture` names, and what training starts from."""

    choice: ClassVar[Choice] = Choice("architecture", known_families, _section)
    init_from: str
    """`scratch` for random weights; a name of `download.models`; or a Hugging Face folder, which has a slash in it."""

    @property
    def init_is_published(self) -> bool:
        """Whether the weights are OpenAI's, from data/models."""
        return self.init_from != "scratch" and "/" not in self.init_from

    def difference(self, found: ModelParams) -> str:
        """In what weights with the parameters `found` do not fit this section, and what to write; empty where they do."""
        theirs, ours = asdict(found), asdict(self)
        names = [name for name in theirs if theirs[name] != ours.get(name)]
        if not names:
            return ""
        differs = ", ".join(f"{name} = {theirs[name]}, not {ours.get(name)}" for name in names)
        remedy = ", ".join(f"model.{name}: {theirs[name]}" for name in names)
        return f"{differs}, so its weights do not fit section model; write {remedy}, or model.init_from: scratch."
