"""The train stage's parameters, and the numbers that follow from them."""

import pkgutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

from pipelib.schema import Bounds, NaturalFloat, NaturalInt, OneOf, PositiveFloat, PositiveInt
from pipelib.training import optim

Fraction = Annotated[float, Bounds(above=0, maximum=1)]
Beta = Annotated[float, Bounds(minimum=0, maximum=0.9999999)]
DEFAULTS = {"optimizer": "adamw", "muon": None, "schedule": "cosine", "cooldown": None, "experiments": None}
"""What versions did before these parameters existed; see `TrainParams.decides`."""
HORIZON = ("max_tokens", "max_epochs", "cooldown", "min_lr")
"""What decides nothing before the cooldown of wsd."""


def known_optimizers() -> list[str]:
    """The names that `train.optimizer` accepts."""
    return sorted(module.name for module in pkgutil.iter_modules(optim.__path__))


@dataclass(frozen=True)
class SpikeParams:
    """Section `train.spike` of params.yaml: when a step is undone, and which batches are then skipped."""

    window: PositiveInt
    """How many preceding losses form the baseline. Before that many steps, only a non-finite loss is a spike."""
    deviations: PositiveFloat
    """A loss this many standard deviations above the baseline's mean is a spike."""
    batches: PositiveInt
    """How many batches are skipped: the spike's own and those before it."""
    rollbacks: PositiveInt
    """The most spikes that one run undoes."""

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
        if self.window < 2:
            yield (
                f"window: {self.window}: one loss has no standard deviation, so every rise would be a spike; 100 is a "
                "good start."
            )


@dataclass(frozen=True)
class ExperimentParams:
    """Section `train.experiments` of params.yaml: arithmetic that may be faster on a GPU and has not been measured yet.

    `bench/gpu.py --only ab` measures each of them.
    """

    bf16_residual: bool
    """Keep the residual stream in bf16, which halves its traffic and rounds it."""
    separate_qkv: bool
    """Compute query, key and value by three products, so that the backward pass need not copy their gradients together."""
    max_autotune: bool
    """Let torch.compile time more kernels for every product and choose the fastest, which takes minutes."""


@dataclass(frozen=True)
class MuonParams:
    """Section `train.muon` of params.yaml. `train.max_lr` is the peak rate of the matrices, and the others are in proportion."""

    momentum: Beta
    """Decay of the gradient's mean."""
    weight_decay: NaturalFloat
    """Decoupled decay of the matrices; `train.weight_decay` is that of embeddings and of an untied output layer."""
    embedding_lr: PositiveFloat
    """AdamW's peak rate for embeddings, and for an output layer that is tied to them."""
    head_lr: PositiveFloat
    """AdamW's peak rate for an output layer of its own."""
    vector_lr: PositiveFloat
    """AdamW's peak rate for the scales of norms and for biases."""


MUON_EXAMPLE = "{momentum: 0.95, weight_decay: 0.0, embedding_lr: 0.01, head_lr: 0.01, vector_lr: 0.01}"


@dataclass(frozen=True)
class StepParams:
    """What every training needs for its optimizer steps, in sections `train` and `finetune` of params.yaml."""

    seed: NaturalInt
    """Decides the initial weights, the order of the sequences, and the samples."""
    global_batch_tokens: PositiveInt
    """Tokens of one optimizer step, over all micro-steps and ranks."""
    sequence_length: PositiveInt
    """Tokens in one row of a batch."""
    micro_batch_size: PositiveInt | Literal["auto"]
    """Rows that one rank runs at a time, but no more than its share of a step. `auto`: as many as fit into its memory."""
    max_lr: PositiveFloat
    """Peak learning rate, reached after warmup."""
    min_lr: NaturalFloat
    """Learning rate at the last step."""
    weight_decay: NaturalFloat
    """Decoupled decay of matrices and embeddings; biases and norms have none."""
    beta1: Beta
    """Adam's decay of the gradient's mean."""
    beta2: Beta
    """Adam's decay of the gradient's mean square."""
    eps: PositiveFloat
    """Added to Adam's denominator."""
    grad_clip_norm: PositiveFloat
    """The gradients are scaled down so that their total norm is at most this."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Arithmetic of matrix products; weights and optimizer state are always fp32. fp16 is for GPUs without bf16."""
    compile: bool
    """Compile the model with torch.compile."""
    activation_checkpointing: bool
    """Keep only each block's input, and compute the block again in the backward pass: the same result with less memory."""
    deterministic: bool
    """On a GPU, use only deterministic kernels, so that a resumed run is bit-identical to an uninterrupted one."""
    validate_every: PositiveInt
    """Steps between validation losses; the last step always has one."""

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
        rows = 1 if self.micro_batch_size == "auto" else self.micro_batch_size  # `auto` chooses a size that divides
        micro_batch_tokens = self.sequence_length * rows
        if self.global_batch_tokens % micro_batch_tokens:
            fits = max(1, round(self.global_batch_tokens / micro_batch_tokens)) * micro_batch_tokens
            yield (
                f"micro_batch_size: {rows} rows of {self.sequence_length} tokens do not divide "
                f"global_batch_tokens = {self.global_batch_tokens}, so a step would be cut short; change one of them "
                f"(global_batch_tokens: {fits} would fit)."
            )
        if self.min_lr > self.max_lr:
            yield (
                f"min_lr: {self.min_lr:g} is greater than max_lr = {self.max_lr:g}, so the learning rate would rise after "
                f"warmup; 0 or a tenth of max_lr ({self.max_lr / 10:g}) is usual."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.global_batch_tokens // self.sequence_length


@dataclass(frozen=True)
class TrainParams(StepParams):
    """Section `train` of params.yaml."""

    section: ClassVar[str] = "train"
    """What messages call the section that holds these parameters."""

    max_tokens: PositiveInt
    """Tokens to train on; the number of steps follows from it."""
    max_epochs: PositiveFloat
    """The most passes over the training tokens. A training whose `max_tokens` are more passes ends earlier."""
    optimizer: Annotated[str, OneOf(known_optimizers)]
    """The optimizer: the name of a file in `training/optim`."""
    muon: MuonParams | None
    """What `optimizer: muon` needs; null for other optimizers."""
    schedule: Literal["cosine", "linear", "wsd"]
    """How the learning rate falls from `max_lr` to `min_lr` after warmup. wsd (warmup, stable, decay) keeps it at `max_lr` until
    the cooldown."""
    cooldown: Fraction | None
    """The part of all steps in which wsd's rate falls linearly, the last ones; null for other schedules."""
    warmup_steps: NaturalInt
    """Steps of linear warmup."""
    spike: SpikeParams | None
    """Undo a step whose loss jumps or is not finite, and skip its batches; null: never."""
    validate_tokens: PositiveInt
    """Tokens of the validation shard that each validation uses; the evaluate stage uses all."""
    hellaswag_every: PositiveInt | None
    """Steps between scores on HellaSwag; the last step always has one; null: never."""
    sample_every: PositiveInt
    """Steps between samples of the model's text; the last step always has them."""
    sample_prompts: tuple[str, ...]
    """The prompts that the samples continue."""
    experiments: ExperimentParams | None
    """Arithmetic that may be faster on a GPU and has not been measured; null: none."""

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
        yield from super().problems()
        if self.tried.bf16_residual and self.precision != "bf16":
            yield (
                f"experiments.bf16_residual: true needs precision: bf16, not {self.precision}, so its products would fail; "
                "set it to false."
            )
        yield from self._choice_problems()
        if self.validate_tokens < self.sequence_length:
            yield (
                f"validate_tokens: {self.validate_tokens} is less than one row of sequence_length = {self.sequence_length} "
                "tokens, so there would be no validation loss; raise it."
            )
        if self.max_tokens < self.global_batch_tokens:
            yield (
                f"max_tokens: {self.max_tokens} is less than one step of global_batch_tokens = {self.global_batch_tokens}, "
                "so nothing would be trained; raise it."
            )
        elif self.warmup_steps >= self.max_steps:
            yield (
                f"warmup_steps: warmup takes {self.warmup_steps} of the {self.max_steps} steps, so max_lr would never be "
                "reached; lower it or raise max_tokens."
            )
        elif self.cooldown and self.cooldown_start == self.max_steps:
            yield (
                f"cooldown: {self.cooldown:g} of {self.max_steps} steps is less than one step, so the rate would never fall; "
                "raise it or max_tokens."
            )
        elif self.cooldown and self.warmup_steps > self.cooldown_start:
            yield (
                f"cooldown: {self.cooldown:g} of {self.max_steps} steps begins before the {self.warmup_steps} steps of warmup "
                "end, so max_lr would never be reached; lower one of them or raise max_tokens."
            )

    def _choice_problems(self) -> Iterator[str]:
        """Keys that the chosen optimizer or schedule needs, or does not have."""
        if self.optimizer == "muon" and self.muon is None:
            yield (
                "optimizer: muon has rates and a momentum of its own, and muon is null, so it could not start; set them, for "
                f"example `-S train.optimizer=muon -S train.max_lr=0.02 -S 'train.muon={MUON_EXAMPLE}'`."
            )
        if self.optimizer != "muon" and self.muon is not None:
            yield (
                f"muon: its keys would be ignored, since the optimizer is {self.optimizer}; set muon: null, or optimizer: muon."
            )
        if self.schedule == "wsd" and self.cooldown is None:
            yield "cooldown: null, but schedule: wsd needs it, otherwise the learning rate would never fall; 0.4 is a good start."
        if self.schedule != "wsd" and self.cooldown is not None:
            yield (
                f"cooldown: {self.cooldown:g} would be ignored, since the schedule is {self.schedule}; set cooldown: null, or "
                "schedule: wsd."
            )

    def decides(self) -> dict[str, object]:
        """The parameters that decide the result, as JSON values.

        `DEFAULTS` are left out, so that the results of versions without these parameters stay valid.
        """
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in fields.items() if key not in DEFAULTS or value != DEFAULTS[key]}

    def trunk(self) -> dict[str, object]:
        """The parameters that decide a training up to the cooldown of wsd; for other schedules, all that `decides` returns."""
        left_out = HORIZON if self.schedule == "wsd" else ()
        return {key: value for key, value in self.decides().items() if key not in left_out}

    @property
    def tried(self) -> ExperimentParams:
        """The experiments, all off unless `experiments` is set."""
        return self.experiments or ExperimentParams(bf16_residual=False, separate_qkv=False, max_autotune=False)

    @property
    def max_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.max_tokens // self.global_batch_tokens  # rounded down: never more tokens than `max_tokens`

    @property
    def cooldown_start(self) -> int:
        """The steps that wsd finishes before its cooldown; 0 for other schedules."""
        return self.max_steps - round(self.cooldown * self.max_steps) if self.cooldown else 0

    @property
    def max_batches(self) -> int:
        """The most batches that a run may read: one per step, and those that `spike` may skip."""
        return self.max_steps + (self.spike.batches * self.spike.rollbacks if self.spike else 0)

    def within_epochs(self, row_count: int) -> Self:
        """Return these parameters, with as many tokens as `max_epochs` passes over so many rows have, if `max_tokens` is more."""
        skipped = self.max_batches - self.max_steps
        steps = int(self.max_epochs * row_count / self.rows_per_step) - skipped
        return self if self.max_steps <= steps else replace(self, max_tokens=max(0, steps) * self.global_batch_tokens)

    def micro_batch_rows(self, world_size: int) -> int:
        """Rows that each of `world_size` ranks runs at a time: `micro_batch_size`, but no more than its share of a step.

        `auto` must have become a number before (`resolve_micro_batch_size`).
        """
        assert self.micro_batch_size != "auto"
        return min(self.micro_batch_size, self.rows_per_step // world_size)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-steps that one rank takes per optimizer step."""
        return self.rows_per_step // (self.micro_batch_rows(world_size) * world_size)
