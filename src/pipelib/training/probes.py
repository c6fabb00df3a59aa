"""What is measured while a training runs: validation loss, HellaSwag, samples. Each probe shares its work among the ranks."""

import gc
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipelib.evaluation.benchmark_items import Item, read_items
from pipelib.evaluation.hellaswag import Scores, score
from pipelib.evaluation.loss import Loss, TokenLosses, summed_loss
from pipelib.evaluation.samples import write_samples
from pipelib.model.decoder import Decoder
from pipelib.tokens.loader import validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD
from pipelib.training.inputs import HELLASWAG
from pipelib.training.launch.distributed import World
from pipelib.training.params import TrainParams
from pipelib.training.schedule import SAMPLE, SCORE, VALIDATE
from pipelib.training.state import TrainState
from pipelib.training.training_log import TrainingLog
from pipelib.vocabulary.tokenizer import Tokenizer

COMPILE_FROM = 3
"""Validations in a training from which on it is worth compiling them."""


class Probe(Protocol):
    """Measures the model after some steps and logs the result. It does not change the model."""

    event: str
    """When it runs: an event of `Schedule`."""

    def run(self, model: Decoder, state: TrainState, log: TrainingLog) -> None:
        """Measure now. All ranks call it."""


class Validation(ABC):
    """The loss on data that the model is not trained on."""

    event = VALIDATE
    _last: tuple[int, float] = (-1, 0.0)

    def loss_at(self, step: int) -> float | None:
        """The loss after exactly this step; None if it was not measured then."""
        measured, loss = self._last
        return loss if measured == step else None

    def run(self, model: Decoder, state: TrainState, log: TrainingLog) -> None:
        """See `Probe`."""
        with log.pause():
            gc.collect()  # automatic collection is off, see `gc_at_pauses_only`
            loss = self.measure(model)
            log.validated(state, loss)
        self._last = (state.step, loss.mean)

    @abstractmethod
    def measure(self, model: Decoder) -> Loss:
        """The loss, the same on every rank."""


class ShardValidation(Validation):
    """The loss on the first `validate_tokens` tokens of the validation shard, shared among the ranks."""

    def __init__(self, params: TrainParams, tokens: Path, world: World) -> None:
        self._params, self._shard, self._world = params, tokens / VALIDATION_SHARD, world
        self._compiled: TokenLosses | None = None

    def measure(self, model: Decoder) -> Loss:
        """See `Validation`."""
        params, world = self._params, self._world
        rows = params.micro_batch_rows(1)
        batches = validation_batches(self._shard, params.sequence_length, rows, params.validate_tokens)
        mine = (batch for number, batch in enumerate(batches) if number % world.world_size == world.rank)
        share = summed_loss(model, mine, params.precision, self._token_losses(model))
        nats, count = world.sum_exactly(np.array([share.nats, share.tokens]))
        return Loss(float(nats), int(count))

    def _token_losses(self, model: Decoder) -> TokenLosses:
        """The model's losses, compiled on a GPU if enough validations repay the minute that compiling takes.

        Without a compiler 10 million tokens per 250 steps are 4 to 5 % of a training's time on a GPU (estimated).
        """
        params = self._params
        # wsd always compiles: its length must decide nothing before its cooldown.
        repays = params.schedule == "wsd" or params.max_steps // params.validate_every >= COMPILE_FROM
        if not (params.compile and self._world.runs_ahead and repays):
            return model.token_losses
        self._compiled = self._compiled or torch.compile(model.token_losses, dynamic=False)
        full = params.micro_batch_rows(1), params.sequence_length

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            # Only the shape of whole batches is compiled; the last batch may be shorter.
            compute = self._compiled if inputs.shape == full else model.token_losses
            assert compute is not None
            return compute(inputs, targets)

        return losses


class HellaSwag:
    """Accuracy on HellaSwag's items, which are read from the folder of benchmarks at the first use."""

    event = SCORE

    def __init__(self, params: TrainParams, benchmarks: Path, tokenizer: Tokenizer, world: World) -> None:
        self._params, self._benchmarks, self._tokenizer, self._world = params, benchmarks, tokenizer, world

    @cached_property
    def _items(self) -> list[Item]:
        return read_items(self._benchmarks / HELLASWAG, self._tokenizer)

    def run(self, model: Decoder, state: TrainState, log: TrainingLog) -> None:
        """See `Probe`."""
        with log.pause():
            log.scored(state, self.measure(model))

    def measure(self, model: Decoder) -> Scores:
        """The model's losses on all items, shared among the ranks; the same on every rank."""
        params, world = self._params, self._world
        mine = slice(world.rank, None, world.world_size)
        # Each rank fills in its own items and leaves zeros for the rest, so that the sum over ranks has all of them.
        losses = np.zeros((2, len(self._items), len(self._items[0].endings)))
        if share := self._items[mine]:
            batch_tokens = params.micro_batch_rows(world.world_size) * params.sequence_length
            scores = score(model, share, max(batch_tokens, model.params.context_length), params.precision)
            losses[:, mine] = scores.sums, scores.means
        sums, means = world.sum_exactly(losses)
        return Scores(sums, means, self._items)


class Samples:
    """What the model writes after the prompts. Only rank 0 generates."""

    event = SAMPLE

    def __init__(self, params: TrainParams, tokenizer: Tokenizer, world: World) -> None:
        self._params, self._tokenizer, self._world = params, tokenizer, world

    def run(self, model: Decoder, state: TrainState, log: TrainingLog) -> None:
        """See `Probe`."""
        if self._world.is_main:
            params = self._params
            with log.pause():
                texts = write_samples(model, self._tokenizer, params.sample_prompts, params.precision, params.seed)
                log.sampled(state, texts)
