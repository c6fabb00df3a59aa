"""The finetune stage's parameters, and the training that follows from them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Annotated, ClassVar, Literal

from pipelib.corpus.published_models import is_model_folder
from pipelib.schema import Bounds, NaturalInt, PositiveFloat, PositiveInt
from pipelib.training.params import StepParams, TrainParams

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
class FinetuneParams(StepParams):
    """Section `finetune` of params.yaml. Padding counts as tokens; conversations longer than a row are cut after an answer."""

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
    epochs: PositiveFloat
    """Passes over the conversations."""
    schedule: Literal["cosine", "linear"]
    """How the learning rate falls after warmup; see `train.schedule`."""
    warmup: Share
    """The share of the steps, the first ones, in which the rate rises."""
    answers: NaturalInt
    """How many held-out conversations the model answers at the end, for the metrics."""
    answer_tokens: PositiveInt
    """The most tokens of an answer."""
    questions: tuple[str, ...]
    """Questions that the model answers at the end, for people to read."""

    def problems(self) -> Iterator[str]:
        """Values that do not fit together."""
        yield from super().problems()
        if self.adapter and self.adapter.targets == ():
            yield "adapter.targets: [] names no layer, so nothing would be trained; write all, or names such as q_proj."

    @property
    def init_is_folder(self) -> bool:
        """Whether `init_from` names a folder of the user."""
        return is_model_folder(self.init_from)

    def decides(self) -> dict[str, object]:
        """The parameters that decide the result, as JSON values: those that the chosen source uses."""
        if self.source == "none":
            return {"source": "none"}
        left_out = {"local": {"path"}, "hub": {"path", "pattern"}}.get(
            self.source, {"path", "pattern", "format", "bad_rows"}
        )
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if key not in left_out}

    def training(self, rows: int) -> FinetuneTraining:
        """The training of `rows` rows, with the number of steps that is nearest to `epochs`."""
        steps = max(1, round(self.epochs * rows / self.rows_per_step))
        shared = {field.name: getattr(self, field.name) for field in fields(StepParams)}
        return FinetuneTraining(
            **shared,
            max_tokens=steps * self.global_batch_tokens,
            max_epochs=self.epochs + 1,
            optimizer="adamw",
            muon=None,
            schedule=self.schedule,
            cooldown=None,
            warmup_steps=min(round(self.warmup * steps), steps - 1),
            spike=None,
            validate_tokens=self.sequence_length,
            hellaswag_every=None,
            sample_every=steps,
            sample_prompts=(),
            experiments=None,
        )
