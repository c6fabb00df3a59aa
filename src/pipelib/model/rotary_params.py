"""The parameters that llama, qwen3 and arcee have in common, in the names of Hugging Face's config.json."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pipelib.model.params import ModelParams
from pipelib.schema import Bounds, PositiveFloat, PositiveInt
from pipelib.vocabulary.tokenizer import padded_size


@dataclass(frozen=True)
class RopeScaling:
    """Section `model.rope_scaling`: slower rotary positions, for longer texts than a model was first trained on.

    It is Hugging Face's `rope_type: llama3` (Llama 3.1 and later); `rotary.py` has the formula.
    """

    factor: Annotated[float, Bounds(minimum=1)]
    """How many times slower the slow pairs of numbers turn."""
    low_freq_factor: PositiveFloat
    """Pairs that turn fewer times than this within the original context are the slow ones."""
    high_freq_factor: PositiveFloat
    """Pairs that turn more often than this keep their speed; those in between are slowed in part."""
    original_max_position_embeddings: PositiveInt
    """The original context."""

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
        if self.high_freq_factor <= self.low_freq_factor:
            yield (
                f"high_freq_factor: {self.high_freq_factor} is not greater than low_freq_factor = {self.low_freq_factor}, so no "
                "pair would be between slow and fast; Llama 3.1 has 4.0 and 1.0."
            )


@dataclass(frozen=True)
class RotaryParams(ModelParams):
    """The shape of a decoder with rotary positions, RMSNorm and grouped queries."""

    mlp_matrices: ClassVar[int] = 3
    """Matrices of an MLP: gate, up and down, or up and down."""
    mlp_kept: ClassVar[int] = 4
    """How many times its width an MLP keeps for the backward pass: gate and up before and after the activation."""
    norms_queries: ClassVar[bool] = False
    """Whether queries and keys are normed in each head."""

    hidden_size: PositiveInt
    """Width of the residual stream."""
    intermediate_size: PositiveInt
    """Width inside of the MLP."""
    num_hidden_layers: PositiveInt
    """Blocks."""
    num_attention_heads: PositiveInt
    """Query heads in a block."""
    num_key_value_heads: PositiveInt
    """Key and value heads in a block; several query heads share one."""
    head_dim: PositiveInt
    """Width of a head."""
    context_length: PositiveInt
    """The most tokens that the model is trained for; `max_position_embeddings` in config.json."""
    rope_theta: PositiveFloat
    """The base of the rotary positions' frequencies."""
    rms_norm_eps: PositiveFloat
    """Added to the mean square in every norm."""
    tie_word_embeddings: bool
    """Whether the output layer is the token embedding."""

    @property
    def scaling(self) -> RopeScaling | None:
        """How rotary positions are slowed; None, as in most families, if they are not."""
        return None

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            yield (
                f"num_key_value_heads: {groups} does not divide num_attention_heads = {heads}, so the query heads could not "
                f"share them evenly; use a divisor of {heads}."
            )
        if self.head_dim % 2:
            yield (
                f"head_dim: {self.head_dim} is odd, and rotary positions turn pairs of numbers; use {self.head_dim + 1} or "
                "another even number."
            )

    @property
    def description(self) -> str:
        """See `ModelParams.description`."""
        groups = self.num_key_value_heads
        shared = "" if groups == self.num_attention_heads else f" on {groups} key and value heads"
        return (
            f"{self.num_hidden_layers} layers, {self.num_attention_heads} heads{shared}, {self.hidden_size} wide, "
            f"{self.intermediate_size} in the MLP, context {self.context_length:,}"
        )

    @property
    def _block_matrices(self) -> int:
        """Numbers in the matrices of a block: queries and output, keys and values, MLP."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return attention + self.mlp_matrices * self.hidden_size * self.intermediate_size

    def parameters(self, vocab_size: int) -> int:
        """See `ModelParams.parameters`. Tied embeddings count once."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.norms_queries else 0)
        embeddings = (1 if self.tie_word_embeddings else 2) * vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * (self._block_matrices + norms) + self.hidden_size

    def matrix_parameters(self, vocab_size: int) -> int:
        """See `ModelParams.matrix_parameters`. The padded head counts, an embedding beside it does not."""
        return self.num_hidden_layers * self._block_matrices + padded_size(vocab_size) * self.hidden_size

    def flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """6 for every weight in a matrix product, and 12·layers·heads·head_dim·T for attention (PaLM, appendix B)."""
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * sequence_length
        return 6 * self.matrix_parameters(vocab_size) + attention

    def activation_bytes(self, bf16: bool, checkpointing: bool) -> int:
        """Each block keeps the inputs of its norms (2 widths, fp32), their outputs (2), queries before and after they are turned
        and attention's output (3 query widths), keys likewise and values (3 key widths), and `mlp_kept` widths of the MLP.
        """
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        more = (queries + keys) if self.norms_queries else 0
        kept = 2 * self.hidden_size + 3 * queries + 3 * keys + more + self.mlp_kept * self.intermediate_size
        per_block = 8 * self.hidden_size + (2 if bf16 else 4) * kept
        inputs = 4 * self.hidden_size * self.num_hidden_layers
        return inputs + per_block if checkpointing else per_block * self.num_hidden_layers
