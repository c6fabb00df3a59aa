"""The shape of a GPT-2."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelib.config import PositiveInt
from pipelib.model.vocabulary import PADDED_VOCAB_SIZE, VOCAB_SIZE


@dataclass(frozen=True)
class ModelParams:
    """Section `model` of params.yaml, in GPT-2's own names."""

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
    def parameters(self) -> int:
        """Trainable numbers, tied embeddings counted once, padding left out: 124,439,808 for GPT-2 124M."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return (VOCAB_SIZE + self.context_length) * self.n_embd + self.n_layer * block + 2 * self.n_embd

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations that training needs for one token, forward and backward.

        6 for every weight of a matrix product (the padded, tied head included; looked-up positions and biases not) and
        12·n_layer·n_embd·T for attention (PaLM, appendix B): 854.7 million for GPT-2 124M at T = 1024.
        """
        matrices = 12 * self.n_layer * self.n_embd**2 + PADDED_VOCAB_SIZE * self.n_embd
        return 6 * matrices + 12 * self.n_layer * self.n_embd * sequence_length
