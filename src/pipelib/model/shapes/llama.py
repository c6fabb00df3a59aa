"""Llama's parameters."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelib.model.params import InitialisedModelParams
from pipelib.model.rotary_params import RotaryParams


@dataclass(frozen=True)
class LlamaParams(RotaryParams):
    """The shape of a Llama."""

    title: ClassVar[str] = "Llama"
    architecture: Literal["llama"] = field(default="llama", kw_only=True)


@dataclass(frozen=True)
class LlamaSection(InitialisedModelParams, LlamaParams):
    """Section `model` of params.yaml for a Llama."""


PARAMS, SECTION = LlamaParams, LlamaSection
