"""The parameters of the train stage, and the numbers that follow from them."""

import pkgutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from pipelib.schema import Bounds, NaturalFloat, NaturalInt, OneOf, PositiveFloat, PositiveInt
from pipelib.training import optim

Beta = Annotated[float, Bounds(minimum=0, maximum=0.9999999)]
DEFAULT = ("optimizer", "adamw")
"""The choice of before there was one; see `TrainParams.decides`."""


def known_optimizers() -> list[str]:
    """The names that `train.optimizer` may have."""
    return sorted(module.name for module in pkgutil.iter_modules(optim.__path__))


@dataclass(frozen=True)
class SpikeParams:
    """Section `train.spike` of params.yaml: when a step is undone, and what is left out then."""

    window: PositiveInt
    """Losses that a loss is compared with: those of so many steps before it; there is no spike before so many steps."""
    deviations: PositiveFloat
    """Their standard deviations by which a loss that is a spike exceeds their mean."""
    batches: PositiveInt
    """Batches that are left out: the spike's own and those before it."""
    rollbacks: PositiveInt
    """The most spikes that are undone."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.window < 2:
            yield f"window: {self.window} loss has no standard deviation, so every rise would be a spike; 100 is a good start."


@dataclass(frozen=True)
class TrainParams:
    """Section `train` of params.yaml."""

    seed: NaturalInt
    """Decides the initial weights, the order of the sequences and the samples."""
    max_tokens: PositiveInt
    """Tokens to train on; the number of steps follows from it."""
    max_epochs: PositiveFloat
    """The most passes over the training tokens that `max_tokens` may amount to."""
    global_batch_tokens: PositiveInt
    """Tokens of one optimizer step, over all micro-steps and ranks."""
    sequence_length: PositiveInt
    """Tokens in one row of a batch."""
    micro_batch_size: PositiveInt | Literal["auto"]
    """Rows that one rank runs at a time; fewer where its share of a step is smaller. `auto`: as many as its memory holds."""
    optimizer: Annotated[str, OneOf(known_optimizers)]
    """What changes the weights: one of the files of `training/optim`."""
    max_lr: PositiveFloat
    """Peak learning rate, reached after warmup."""
    min_lr: NaturalFloat
    """Learning rate at the last step."""
    warmup_steps: NaturalInt
    """Steps of linear warmup."""
    weight_decay: NaturalFloat
    """Decoupled decay of matrices; biases and LayerNorm have none."""
    beta1: Beta
    """Adam's decay of the gradient's mean."""
    beta2: Beta
    """Adam's decay of the gradient's mean square."""
    eps: PositiveFloat
    """Added to Adam's denominator."""
    grad_clip_norm: PositiveFloat
    """The norm of all gradients is clipped to this."""
    precision: Literal["fp32", "bf16"]
    """Arithmetic of matrix products; weights and optimizer state are always fp32."""
    compile: bool
    """Compile the model with torch.compile."""
    spike: SpikeParams | None
    """Undo a step whose loss jumps or is not finite, and leave its batch out; null: never."""
    activation_checkpointing: bool
    """Keep each block's input only and compute the block again in the backward pass: the same result with less memory."""
    deterministic: bool
    """On a GPU, use deterministic kernels only, so that a resumed run equals an uninterrupted one bit for bit."""
    validate_every: PositiveInt
    """Steps between validation losses; the last step always has one."""
    validate_tokens: PositiveInt
    """Tokens of the validation shard that each of them uses; the evaluate stage uses all."""
    hellaswag_every: PositiveInt | None
    """Steps between scores on HellaSwag; the last step always has one; null: none at all."""
    sample_every: PositiveInt
    """Steps between samples of the model's text; the last step always has them."""
    sample_prompts: tuple[str, ...]
    """What the samples go on from."""

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        rows = 1 if self.micro_batch_size == "auto" else self.micro_batch_size
        micro_batch_tokens = self.sequence_length * rows
        if self.global_batch_tokens % micro_batch_tokens:
            fits = max(1, round(self.global_batch_tokens / micro_batch_tokens)) * micro_batch_tokens
            yield (
                f"micro_batch_size: {rows} rows of {self.sequence_length} tokens do not divide "
                f"global_batch_tokens = {self.global_batch_tokens}, so a step would be cut short; change one of them "
                f"(global_batch_tokens: {fits} would fit)."
            )
        if self.validate_tokens < self.sequence_length:
            yield (
                f"validate_tokens: {self.validate_tokens} is less than one row of sequence_length = {self.sequence_length} "
                "tokens, so there would be no validation loss; raise it."
            )
        if self.min_lr > self.max_lr:
            yield (
                f"min_lr: {self.min_lr:g} is greater than max_lr = {self.max_lr:g}, so the rate would rise after warmup; "
                f"a tenth of max_lr ({self.max_lr / 10:g}) is usual."
            )
        if self.max_tokens < self.global_batch_tokens:
            yield (
                f"max_tokens: {self.max_tokens} is less than one step of global_batch_tokens = {self.global_batch_tokens}, "
                "so nothing would be trained; raise it."
            )
        elif self.warmup_steps >= self.max_steps:
            yield (
                f"warmup_steps: {self.warmup_steps} of {self.max_steps} steps, so max_lr would never be reached; "
                "lower it or raise max_tokens."
            )

    def decides(self) -> dict[str, object]:
        """The parameters as what decides a result, as JSON has them.

        The optimizer is among them but for AdamW: earlier versions did not name it, and its results are theirs.
        """
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in fields.items() if (key, value) != DEFAULT}

    @property
    def max_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.max_tokens // self.global_batch_tokens

    @property
    def max_batches(self) -> int:
        """The most batches that a run may look at: one a step, and those that `spike` may leave out."""
        return self.max_steps + (self.spike.batches * self.spike.rollbacks if self.spike else 0)

    @property
    def rows_per_step(self) -> int:
        """Sequences in one global batch."""
        return self.global_batch_tokens // self.sequence_length

    def micro_batch_rows(self, world_size: int) -> int:
        """Rows that one of so many ranks runs at a time: `micro_batch_size`, but no more than its share of a step.

        `auto` has to be a number by then (`settle_micro_batch`).
        """
        assert self.micro_batch_size != "auto"
        return min(self.micro_batch_size, self.rows_per_step // world_size)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-steps of one rank in one optimizer step."""
        return self.rows_per_step // (self.micro_batch_rows(world_size) * world_size)
