"""Llama's parameters."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelib.model.params import InitialisedModelParams
from pipelib.model.rotary_params import RopeScaling, RotaryParams


@dataclass(frozen=True)
class LlamaParams(RotaryParams):
    """The shape of a Llama."""

    title: ClassVar[str] = "Llama"
    architecture: Literal["llama"] = field(default="llama", kw_only=True)
    rope_scaling: RopeScaling | None = field(default=None, kw_only=True)
    """Slower rotary positions, as in Llama 3.1 and later: see `RopeScaling`. None in a model trained from the start."""

    @property
    def scaling(self) -> RopeScaling | None:
        """See `RotaryParams.scaling`."""
        return self.rope_scaling


@dataclass(frozen=True)
class LlamaSection(InitialisedModelParams, LlamaParams):
    """Section `model` of params.yaml for a Llama."""


PARAMS, SECTION = LlamaParams, LlamaSection
