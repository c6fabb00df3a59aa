"""GPT-2's parameters, and the arithmetic on them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelib.model.params import InitialisedModelParams, ModelParams
from pipelib.schema import PositiveInt
from pipelib.vocabulary.tokenizer import padded_size


@dataclass(frozen=True)
class GPT2Params(ModelParams):
    """The shape of a GPT-2, in GPT-2's own names."""

    title: ClassVar[str] = "GPT-2"
    architecture: Literal["gpt2"] = field(default="gpt2", kw_only=True)
    n_layer: PositiveInt
    """Transformer blocks."""
    n_head: PositiveInt
    """Attention heads in a block."""
    n_embd: PositiveInt
    """Width of the residual stream."""
    context_length: PositiveInt
    """The most tokens that the model can attend to: the rows of its position embedding."""

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
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
        """See `ModelParams.parameters`. Tied embeddings count once: 124,439,808 for GPT-2 124M."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return (vocab_size + self.context_length) * self.n_embd + self.n_layer * block + 2 * self.n_embd

    def matrix_parameters(self, vocab_size: int) -> int:
        """See `ModelParams.matrix_parameters`. The padded, tied head counts; the position embedding and biases do not."""
        return 12 * self.n_layer * self.n_embd**2 + padded_size(vocab_size) * self.n_embd

    def flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """6 for every weight in a matrix product, and 12·n_layer·n_embd·T for attention (PaLM, appendix B).

        854.7 million for GPT-2 124M at T = 1024.
        """
        return 6 * self.matrix_parameters(vocab_size) + 12 * self.n_layer * self.n_embd * sequence_length

    def nanogpt_flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """The same in nanoGPT's count: 6 for every parameter except positions, vocabulary padding included, and 12·L·H·Q·T.

        855.4 million for GPT-2 124M at T = 1024. The difference is biases and LayerNorms.
        """
        parameters = self.parameters(padded_size(vocab_size)) - self.context_length * self.n_embd
        return 6 * parameters + 12 * self.n_layer * self.n_embd * sequence_length

    def activation_bytes(self, bf16: bool, checkpointing: bool) -> int:
        """Each block keeps, in units of n_embd numbers: the inputs of two LayerNorms (2), their outputs (2), query, key and
        value (3), attention's output (1), the MLP before and after GELU (8): 16 in all.

        In fp32 they take 64 bytes. In bf16 the LayerNorms' inputs stay fp32 and the rest takes 2 bytes each: 36. With
        checkpointing, a block keeps only its input in fp32: 4 bytes.
        """
        per_block = 36 if bf16 else 64
        return self.n_embd * (4 * self.n_layer + per_block if checkpointing else per_block * self.n_layer)


@dataclass(frozen=True)
class GPT2Section(InitialisedModelParams, GPT2Params):
    """Section `model` of params.yaml for a GPT-2."""


PARAMS, SECTION = GPT2Params, GPT2Section
