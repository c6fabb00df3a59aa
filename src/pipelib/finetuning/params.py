"""The finetune stage's parameters, and the training that follows from them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

from pipelib.schema import Bounds, NaturalFloat, NaturalInt, PositiveFloat, PositiveInt
from pipelib.training.params import Beta, TrainParams

Share = Annotated[float, Bounds(minimum=0, maximum=0.5)]
BASE = "models"
"""`init_from`: the model that train makes."""


@dataclass(frozen=True)
class AdapterParams:
    """Section `finetune.adapter` of params.yaml: LoRA, small trained matrices beside those of the model (Hu et al., 2021)."""

    rank: PositiveInt
    """Width of the small matrices."""
    alpha: PositiveFloat
    """Their product is multiplied by alpha / rank."""
    targets: tuple[str, ...] | Literal["all"]
    """The layers that get one, by the last part of their names, such as q_proj; all: every linear layer of the blocks."""


@dataclass(frozen=True)
class FinetuneTraining(TrainParams):
    """The training that section `finetune` describes."""

    section: ClassVar[str] = "finetune"


@dataclass(frozen=True)
class FinetuneParams:
    """Section `finetune` of params.yaml."""

    source: Literal["none", "docs", "local", "hub"]
    """Where the conversations come from. `none`: no fine-tuning; `docs`: made from the docstrings of the offline corpus, and none
    for another corpus; `local`: the user's files; `hub`: `download.conversations`."""
    path: str
    """`local`: the folder of the user's files, or one file. The stage depends on it for every source."""
    pattern: str
    """`local`: which files of that folder to read, as a glob."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt"]
    """`local` and `hub`: how a row holds a conversation; auto: recognised by its columns."""
    bad_rows: Literal["refuse", "skip"]
    """`local` and `hub`: what to do with a row that is not a conversation. `skip` leaves it out and counts it, up to 1 % of all
    rows."""
    max_conversations: PositiveInt | None
    """The most conversations, the first ones; null: all."""
    validation: Share
    """The share of the conversations that are held out, chosen by their hash; one, if that chooses none."""
    init_from: str
    """The model to start from: `models`, which train makes, one of `download.models`, or a folder such as ./DIR."""
    adapter: AdapterParams | None
    """null: all weights are trained; else LoRA."""
    train_on: Literal["assistant", "all", "last"]
    """The targets that count: those of the assistant's turns, all, or those of the last turn."""
    packing: bool
    """Put several conversations into one row. They do not see each other."""
    seed: NaturalInt
    """Decides the order of the rows and the initial weights of an adapter."""
    epochs: PositiveFloat
    """Passes over the conversations."""
    global_batch_tokens: PositiveInt
    """Tokens of one optimizer step, padding included, over all micro-steps and ranks."""
    sequence_length: PositiveInt
    """Tokens in one row of a batch. Longer conversations are cut after an answer."""
    micro_batch_size: PositiveInt | Literal["auto"]
    """Rows that one rank runs at a time; see `train.micro_batch_size`."""
    schedule: Literal["cosine", "linear"]
    """How the learning rate falls after warmup; see `train.schedule`."""
    max_lr: PositiveFloat
    """Peak learning rate of AdamW."""
    min_lr: NaturalFloat
    """Learning rate where the schedule ends."""
    warmup: Share
    """The share of the steps, the first ones, in which the rate rises."""
    weight_decay: NaturalFloat
    """Decoupled decay of matrices."""
    beta1: Beta
    """Adam's decay of the gradient's mean."""
    beta2: Beta
    """Adam's decay of the gradient's mean square."""
    eps: PositiveFloat
    """Added to Adam's denominator."""
    grad_clip_norm: PositiveFloat
    """The gradients are scaled down so that their total norm is at most this."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Arithmetic of matrix products."""
    compile: bool
    """Compile the model with torch.compile."""
    activation_checkpointing: bool
    """Compute blocks again in the backward pass: the same result with less memory."""
    deterministic: bool
    """On a GPU, use only deterministic kernels."""
    validate_every: PositiveInt
    """Steps between losses on the held-out conversations; the last step always has one."""
    answers: NaturalInt
    """How many held-out conversations the model answers at the end, for the metrics."""
    answer_tokens: PositiveInt
    """The most tokens of an answer."""
    questions: tuple[str, ...]
    """Questions that the model answers at the end, for people to read."""

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
        rows = 1 if self.micro_batch_size == "auto" else self.micro_batch_size
        if self.global_batch_tokens % (self.sequence_length * rows):
            fits = max(1, round(self.global_batch_tokens / (self.sequence_length * rows))) * self.sequence_length * rows
            yield (
                f"micro_batch_size: {rows} rows of {self.sequence_length} tokens do not divide global_batch_tokens = "
                f"{self.global_batch_tokens}, so a step would be cut short; change one of them (global_batch_tokens: {fits} "
                "would fit)."
            )
        if self.min_lr > self.max_lr:
            yield (
                f"min_lr: {self.min_lr:g} is greater than max_lr = {self.max_lr:g}, so the learning rate would rise after "
                "warmup; 0 is usual."
            )
        if self.adapter and self.adapter.targets == ():
            yield "adapter.targets: [] names no layer, so nothing would be trained; write all, or names such as q_proj."

    @property
    def init_is_folder(self) -> bool:
        """Whether `init_from` names a folder of the user."""
        return "/" in self.init_from

    def decides(self) -> dict[str, object]:
        """The parameters that decide the result, as JSON values: those that the chosen source uses."""
        if self.source == "none":
            return {"source": "none"}
        left_out = {"local": {"path"}, "hub": {"path", "pattern"}}.get(
            self.source, {"path", "pattern", "format", "bad_rows"}
        )
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in fields.items() if key not in left_out}

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.global_batch_tokens // self.sequence_length

    def training(self, rows: int) -> FinetuneTraining:
        """The training of `rows` rows, with the number of steps that is nearest to `epochs`."""
        steps = max(1, round(self.epochs * rows / self.rows_per_step))
        return FinetuneTraining(
            seed=self.seed,
            max_tokens=steps * self.global_batch_tokens,
            max_epochs=self.epochs + 1,
            global_batch_tokens=self.global_batch_tokens,
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            optimizer="adamw",
            muon=None,
            schedule=self.schedule,
            cooldown=None,
            max_lr=self.max_lr,
            min_lr=self.min_lr,
            warmup_steps=min(round(self.warmup * steps), steps - 1),
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            grad_clip_norm=self.grad_clip_norm,
            precision=self.precision,
            compile=self.compile,
            spike=None,
            activation_checkpointing=self.activation_checkpointing,
            deterministic=self.deterministic,
            validate_every=self.validate_every,
            validate_tokens=self.sequence_length,
            hellaswag_every=None,
            sample_every=steps,
            sample_prompts=(),
            experiments=None,
        )
