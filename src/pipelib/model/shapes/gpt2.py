"""The parameters of a GPT-2, and the arithmetic that follows from them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelib.model.params import InitialisedModelParams, ModelParams
from pipelib.schema import PositiveInt
from pipelib.vocabulary.tokenizer import padded_size


@dataclass(frozen=True)
class GPT2Params(ModelParams):
    """The shape, in GPT-2's own names."""

    title: ClassVar[str] = "GPT-2"
    architecture: Literal["gpt2"] = field(default="gpt2", kw_only=True)
    n_layer: PositiveInt
    """Transformer blocks."""
    n_head: PositiveInt
    """Attention heads in a block."""
    n_embd: PositiveInt
    """Width of the residual stream."""
    context_length: PositiveInt
    """The most tokens the model can look at: rows of its position embedding."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.n_embd % self.n_head:
            yield (
                f"n_embd: {self.n_embd} is not a multiple of n_head = {self.n_head}, so the heads would differ in width; "
                f"the nearest that fits is {max(1, round(self.n_embd / self.n_head)) * self.n_head}."
            )

    @property
    def description(self) -> str:
        """See `ModelParams.description`."""
        return f"{self.n_layer} layers, {self.n_head} heads, {self.n_embd} wide, context {self.context_length:,}"

    def parameters(self, vocab_size: int) -> int:
        """Tied embeddings counted once: 124,439,808 for GPT-2 124M."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return (vocab_size + self.context_length) * self.n_embd + self.n_layer * block + 2 * self.n_embd

    def matrix_parameters(self, vocab_size: int) -> int:
        """The padded, tied head included; looked-up positions and biases not."""
        return 12 * self.n_layer * self.n_embd**2 + padded_size(vocab_size) * self.n_embd

    def flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """6 for every weight of a matrix product and 12·n_layer·n_embd·T for attention (PaLM, appendix B): 854.7 million for
        GPT-2 124M at T = 1024.
        """
        return 6 * self.matrix_parameters(vocab_size) + 12 * self.n_layer * self.n_embd * sequence_length

    def nanogpt_flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """The same as nanoGPT counts it: 6 for every parameter but the positions, of a padded vocabulary too, and 12·L·H·Q·T.

        855.4 million for GPT-2 124M at T = 1024: biases and LayerNorms are the difference.
        """
        parameters = self.parameters(padded_size(vocab_size)) - self.context_length * self.n_embd
        return 6 * parameters + 12 * self.n_layer * self.n_embd * sequence_length

    def activation_bytes(self, bf16: bool, checkpointing: bool) -> int:
        """Each block keeps, in units of n_embd numbers: the inputs of two LayerNorms (2), their outputs (2), query, key and
        value (3), attention's output (1), the MLP before and after GELU (8): 16 in all. In fp32 that is 64 bytes; in bf16 the
        LayerNorms' inputs stay fp32 and the rest has 2 bytes: 36. With checkpointing a block keeps its input in fp32, 4 bytes.
        """
        of_block = 36 if bf16 else 64
        return self.n_embd * (4 * self.n_layer + of_block if checkpointing else of_block * self.n_layer)


@dataclass(frozen=True)
class GPT2Section(InitialisedModelParams, GPT2Params):
    """Section `model` of params.yaml for a GPT-2."""


PARAMS, SECTION = GPT2Params, GPT2Section
