"""The parameters of a toy: a bag of words."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelib.model.params import InitialisedModelParams, ModelParams
from pipelib.schema import PositiveInt
from pipelib.vocabulary.tokenizer import padded_size


@dataclass(frozen=True)
class ToyParams(ModelParams):
    title: ClassVar[str] = "Toy"
    architecture: Literal["toy"] = field(default="toy", kw_only=True)
    width: PositiveInt
    context_length: PositiveInt

    @property
    def description(self) -> str:
        return f"{self.width} wide, context {self.context_length:,}"

    def parameters(self, vocab_size: int) -> int:
        return vocab_size * self.width + self.width**2

    def matrix_parameters(self, vocab_size: int) -> int:
        return self.parameters(padded_size(vocab_size))

    def flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        return 6 * self.matrix_parameters(vocab_size) + 12 * self.width * sequence_length

    def activation_bytes(self, bf16: bool, checkpointing: bool) -> int:  # noqa: ARG002
        return 4 * 4 * self.width


@dataclass(frozen=True)
class ToySection(InitialisedModelParams, ToyParams):
    pass


PARAMS, SECTION = ToyParams, ToySection
