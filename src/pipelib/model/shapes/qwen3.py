"""Qwen3's parameters."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelib.model.params import InitialisedModelParams
from pipelib.model.rotary_params import RotaryParams


@dataclass(frozen=True)
class Qwen3Params(RotaryParams):
    """The shape of a Qwen3."""

    title: ClassVar[str] = "Qwen3"
    norms_queries: ClassVar[bool] = True
    architecture: Literal["qwen3"] = field(default="qwen3", kw_only=True)


@dataclass(frozen=True)
class Qwen3Section(InitialisedModelParams, Qwen3Params):
    """Section `model` of params.yaml for a Qwen3."""


PARAMS, SECTION = Qwen3Params, Qwen3Section
