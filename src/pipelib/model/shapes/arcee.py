"""Arcee's parameters."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelib.model.params import InitialisedModelParams
from pipelib.model.rotary_params import RotaryParams


@dataclass(frozen=True)
class ArceeParams(RotaryParams):
    """The shape of an Arcee."""

    title: ClassVar[str] = "Arcee"
    mlp_matrices: ClassVar[int] = 2
    mlp_kept: ClassVar[int] = 3
    architecture: Literal["arcee"] = field(default="arcee", kw_only=True)


@dataclass(frozen=True)
class ArceeSection(InitialisedModelParams, ArceeParams):
    """Section `model` of params.yaml for an Arcee."""


PARAMS, SECTION = ArceeParams, ArceeSection
