"""The task of fine-tuning, for the trainer that pretraining uses too: answers, in rows of conversations."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipelib.evaluation.loss import Loss
from pipelib.files import read_json
from pipelib.finetuning.dataset import Dataset
from pipelib.finetuning.objective import Answers
from pipelib.finetuning.packing import ConversationRows
from pipelib.finetuning.params import FinetuneParams, FinetuneTraining
from pipelib.model.adapters import adapter_of, add_adapter, export_adapter, merged
from pipelib.model.decoder import Decoder, build
from pipelib.model.huggingface import export_model, export_tokenizer, import_model, read_params
from pipelib.model.params import ModelParams
from pipelib.training.checkpoint import Stateful
from pipelib.training.launch.distributed import World
from pipelib.training.launch.job import Job
from pipelib.training.params import TrainParams
from pipelib.training.probes import Validation
from pipelib.training.task import Task
from pipelib.training.training_log import MainLog
from pipelib.vocabulary.chat import ChatTemplate
from pipelib.vocabulary.choice import chosen_tokenizer, tokenizer_of_model
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import ChatPlaces, Places


@dataclass(frozen=True)
class Base:
    """The model that fine-tuning starts from."""

    folder: str
    """A Hugging Face folder."""
    sha256: str
    """The hash of its weights."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return tokenizer_of_model(Path(self.folder), chosen_tokenizer())

    def read(self) -> Decoder:
        """Read the model."""
        return import_model(Path(self.folder), self.tokenizer, quiet=True)


class Finetuning(Task):
    """A model that learns to answer."""

    def __init__(self, params: FinetuneParams, base: Base, dataset: Dataset) -> None:
        self.params, self.base, self.dataset = params, base, dataset
        self.model: ModelParams = read_params(Path(base.folder), base.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """See `Task.tokenizer`."""
        return self.base.tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """See `Task.fingerprint`."""
        return self.dataset.fingerprint

    def initial_model(self, params: TrainParams, *, draw: bool) -> Decoder:  # noqa: ARG002  (no weight of the base is drawn)
        """See `Task.initial_model`."""
        return self._adapted(self.base.read().train())

    def _adapted(self, model: Decoder) -> Decoder:
        if adapter := self.params.adapter:
            add_adapter(model, adapter.rank, adapter.alpha, adapter.targets, self.params.seed)
        return model

    @cached_property
    def trained_parameters(self) -> int | None:
        """See `Task.trained_parameters`.

        Raises:
            UserError: the adapter does not fit the model.
        """
        if self.params.adapter is None:
            return None
        adapter = adapter_of(self._adapted(build(self.model, self.tokenizer.size)))
        return sum(matrix.numel() for matrix in adapter.parameters())

    def trained(self, model: Decoder) -> Stateful:
        """See `Task.trained`: a frozen model is in no checkpoint."""
        return adapter_of(model) if self.params.adapter else model

    @property
    def objective_name(self) -> str:
        """See `Task.objective_name`."""
        return Answers.__qualname__

    def objective(self, model: Decoder) -> Answers:
        """See `Task.objective`."""
        return Answers(model, packed=self.params.packing)

    def rows(self, params: TrainParams) -> ConversationRows:
        """See `Task.rows`."""
        return self.split(params.sequence_length, held_out=False)

    def split(self, length: int, *, held_out: bool) -> ConversationRows:
        """The rows of one split."""
        numbers, end = self.dataset.numbers(held_out=held_out), self.tokenizer.end_token_id
        return ConversationRows.of(self.dataset, numbers, length, end, packing=self.params.packing)

    def validation(self, params: TrainParams, world: World) -> "AnswerValidation":
        """See `Task.validation`."""
        return AnswerValidation(self, params, world)


class AnswerValidation(Validation):
    """The loss on all answers of the conversations that are held out, shared among the ranks."""

    def __init__(self, task: Finetuning, params: TrainParams, world: World) -> None:
        self._task, self._params, self._world = task, params, world
        self._rows = task.split(params.sequence_length, held_out=True)

    def measure(self, model: Decoder) -> Loss:
        """See `Validation.measure`."""
        size, world = self._params.micro_batch_rows(1), self._world
        objective, nats, tokens = self._task.objective(model), 0.0, 0
        for start in range(world.rank * size, len(self._rows), size * world.world_size):
            batch = self._rows.batch(np.arange(start, min(start + size, len(self._rows))))
            loss = objective.loss(batch, self._params.precision)
            nats, tokens = nats + loss.nats, tokens + loss.tokens
        summed, count = world.sum_exactly(np.array([nats, tokens]))
        return Loss(float(summed), int(count))


@dataclass(frozen=True, kw_only=True)
class FinetuneJob(Job):
    """A fine-tuning as all its ranks see it."""

    train: FinetuneTraining
    finetune: FinetuneParams
    base: Base
    dataset: str
    """The file of the conversations as tokens."""
    lineage: str
    """The JSON file of what identifies the conversations and the base."""

    stage = "finetune"

    @cached_property
    def task(self) -> Finetuning:
        """See `Job.task`."""
        return Finetuning(self.finetune, self.base, Dataset.read(Path(self.dataset)))

    def export(self, model: Decoder, log: MainLog, outs: Path) -> Mapping[str, object]:
        """See `Job.export`."""
        chat, template = ChatPlaces(Places(outs).chat), ChatTemplate.of(self.task.tokenizer)
        if self.finetune.adapter:
            export_adapter(model, chat.adapter, {"path": self.base.folder, "sha256": self.base.sha256})
            export_tokenizer(self.task.tokenizer, self.task.model.context_length, chat.adapter, template)
            model = merged(model)
        recipe = {
            **read_json(Path(self.lineage)),
            "code_sha256": self.code,
            "finetune": self.finetune.decides(),
            **({"resumed_with_other_code": True} if self.resumed_with_other_code else {}),
        }
        export_model(model, self.task.tokenizer, chat.model, recipe, template)
        log.export(chat.curves, Places(outs).speed(self.stage, "csv"))
        first, last = log.validation.rows()[0], log.validation.rows()[-1]
        return {"val_loss_before": round(first["val_loss"], 6), "val_loss": round(last["val_loss"], 6)}


JOB = FinetuneJob
