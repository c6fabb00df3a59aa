"""The parameters that every family of models has, and section `model` of params.yaml.

A family is two files of the same name, which is also its `model_type` in config.json. `shapes/NAME.py` has its parameters and
the arithmetic on them, without torch; `families/NAME.py` has its network. Both are imported by that name, so a new family
changes nothing for the users of another one.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import Field, asdict, dataclass
from typing import Any, ClassVar

from pipelib.corpus.published_models import PUBLISHED_MODELS, is_model_folder
from pipelib.model import shapes
from pipelib.schema import Choice

DEFAULT = "gpt2"
"""The only family of versions before `model.architecture` existed; see `ModelParams.decides`."""


class ModelParams(ABC):
    """A model's parameters: a frozen dataclass of its family, with `architecture` and `context_length` among its fields."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    title: ClassVar[str]
    """The family's name for people: `GPT-2`."""
    architecture: str
    """The family's name, which is that of its files."""
    context_length: int
    """The most tokens that the model can attend to."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The shape, for people: `12 layers, 12 heads, ...`."""

    @abstractmethod
    def parameters(self, vocab_size: int) -> int:
        """Trainable numbers. Memory estimates count the vocabulary's padding, everything else does not."""

    @abstractmethod
    def matrix_parameters(self, vocab_size: int) -> int:
        """Numbers in matrices that take part in products, the output layer included. Autocast keeps bf16 copies of them."""

    @abstractmethod
    def flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """Floating-point operations of training per token, forward and backward."""

    @abstractmethod
    def activation_bytes(self, bf16: bool, checkpointing: bool) -> int:
        """Bytes per token that the layers keep for the backward pass.

        With checkpointing they are the inputs of all layers, and everything that one layer keeps.
        """

    def decides(self) -> dict[str, object]:
        """The parameters that decide the result.

        GPT-2's architecture is left out: earlier versions did not name it, so their results stay valid.
        """
        fields = asdict(self)
        return {key: value for key, value in fields.items() if (key, value) != ("architecture", DEFAULT)}


def known_families() -> list[str]:
    """The names that `model.architecture` accepts."""
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


SCRATCH, ZERO_PROJECTIONS = "scratch", "zero_projections"
RANDOM = (SCRATCH, ZERO_PROJECTIONS)
"""The values of `model.init_from` for random weights."""


@dataclass(frozen=True)
class InitialisedModelParams(ModelParams):
    """Section `model` of params.yaml: the parameters of the family that `architecture` names, and the initial weights."""

    choice: ClassVar[Choice] = Choice("architecture", known_families, _section)
    init_from: str
    """`scratch` for random weights; `zero_projections` for random weights with zeros where blocks and an untied output layer
    write; a name in `download.models`; or a Hugging Face folder, which has a slash in it and no commit."""

    @property
    def init_is_published(self) -> bool:
        """Whether download fetches the weights, to data/models."""
        return self.init_from not in RANDOM and not is_model_folder(self.init_from)

    def difference(self, found: ModelParams) -> str:
        """How weights with the parameters `found` differ from this section, and what to write; empty if they fit."""
        # `found` has no `init_from`, so only the parameters of the shape are compared.
        theirs, ours = asdict(found), asdict(self)
        names = [name for name in theirs if theirs[name] != ours.get(name)]
        if not names:
            return ""
        differs = ", ".join(f"{name} = {theirs[name]}, not {ours.get(name)}" for name in names)
        remedy = ", ".join(f"model.{name}: {theirs[name]}" for name in names)
        return f"{differs}, so its weights do not fit section model; write {remedy}, or model.init_from: scratch."
