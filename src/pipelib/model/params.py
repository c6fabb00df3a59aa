"""The shape of a GPT-2, and what it starts from."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from pipelib.schema import PositiveInt
from pipelib.vocabulary.tokenizer import padded_size


@dataclass(frozen=True)
class ModelParams:
    """The shape, in GPT-2's own names."""

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

    def parameters(self, vocab_size: int) -> int:
        """Trainable numbers, tied embeddings counted once, padding left out: 124,439,808 for GPT-2 124M."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return (vocab_size + self.context_length) * self.n_embd + self.n_layer * block + 2 * self.n_embd

    def flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """Floating-point operations that training needs for one token, forward and backward.

        6 for every weight of a matrix product (the padded, tied head included; looked-up positions and biases not) and
        12·n_layer·n_embd·T for attention (PaLM, appendix B): 854.7 million for GPT-2 124M at T = 1024.
        """
        matrices = 12 * self.n_layer * self.n_embd**2 + padded_size(vocab_size) * self.n_embd
        return 6 * matrices + 12 * self.n_layer * self.n_embd * sequence_length

    def nanogpt_flops_per_token(self, vocab_size: int, sequence_length: int) -> int:
        """The same as nanoGPT counts it: 6 for every parameter but the positions, of a padded vocabulary too, and 12·L·H·Q·T.

        855.4 million for GPT-2 124M at T = 1024: biases and LayerNorms are the difference.
        """
        parameters = self.parameters(padded_size(vocab_size)) - self.context_length * self.n_embd
        return 6 * parameters + 12 * self.n_layer * self.n_embd * sequence_length


@dataclass(frozen=True)
class InitialisedModelParams(ModelParams):
    """Section `model` of params.yaml: a shape, and the weights that training starts from."""

    init_from: str
    """`scratch` for random weights; a name of `download.models`; or a Hugging Face folder, which has a slash in it."""

    @property
    def init_is_published(self) -> bool:
        """Whether the weights are OpenAI's, from data/models."""
        return self.init_from != "scratch" and "/" not in self.init_from

    def difference(self, found: ModelParams) -> str:
        """In what weights of the shape `found` do not fit this section, and what to write; empty where they do."""
        names = [field.name for field in fields(ModelParams) if getattr(found, field.name) != getattr(self, field.name)]
        if not names:
            return ""
        differs = ", ".join(f"{name} = {getattr(found, name)}, not {getattr(self, name)}" for name in names)
        remedy = ", ".join(f"model.{name}: {getattr(found, name)}" for name in names)
        return f"{differs}, so its weights do not fit section model; write {remedy}, or model.init_from: scratch."


PUBLISHED = {
    "gpt2": ModelParams(n_layer=12, n_head=12, n_embd=768, context_length=1024),
    "gpt2-medium": ModelParams(n_layer=24, n_head=16, n_embd=1024, context_length=1024),
    "gpt2-large": ModelParams(n_layer=36, n_head=20, n_embd=1280, context_length=1024),
    "gpt2-xl": ModelParams(n_layer=48, n_head=25, n_embd=1600, context_length=1024),
}
"""The shapes of OpenAI's four (Radford et al. 2019, table 2), by their names in `download.models`."""
