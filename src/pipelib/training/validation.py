"""What the ranks measure together while a training goes on."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipelib.evaluation.benchmark_items import Item, read_items
from pipelib.evaluation.hellaswag import Scores, score
from pipelib.evaluation.loss import Loss, summed_loss
from pipelib.model.decoder import Decoder
from pipelib.tokens.loader import validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD
from pipelib.training.distributed import World
from pipelib.training.inputs import HELLASWAG
from pipelib.training.params import TrainParams
from pipelib.vocabulary.tokenizer import Tokenizer


def validation_loss(model: Decoder, tokens: Path, params: TrainParams, world: World) -> Loss:
    """The loss on the first `validate_tokens` tokens of the validation shard, shared among the ranks."""
    rows = params.micro_batch_rows(1)
    batches = validation_batches(tokens / VALIDATION_SHARD, params.sequence_length, rows, params.validate_tokens)
    mine = (batch for number, batch in enumerate(batches) if number % world.world_size == world.rank)
    share = summed_loss(model, mine, params.precision)
    whole = world.sum(torch.tensor([share.nats, share.tokens], dtype=torch.float64, device=world.device)).tolist()
    return Loss(whole[0], int(whole[1]))


class HellaSwag:
    """The items of a folder of benchmarks, read when they are first needed."""

    def __init__(self, benchmarks: Path, tokenizer: Tokenizer) -> None:
        self._benchmarks, self._tokenizer = benchmarks, tokenizer

    @cached_property
    def _items(self) -> list[Item]:
        return read_items(self._benchmarks / HELLASWAG, self._tokenizer)

    def score(self, model: Decoder, params: TrainParams, world: World) -> Scores:
        """The model's losses on all items, shared among the ranks; the same on every rank."""
        mine = slice(world.rank, None, world.world_size)
        losses = np.zeros((2, len(self._items), len(self._items[0].endings)))
        if share := self._items[mine]:
            batch_tokens = params.micro_batch_rows(world.world_size) * params.sequence_length
            scores = score(model, share, max(batch_tokens, model.params.context_length), params.precision)
            losses[:, mine] = scores.sums, scores.means
        whole = world.sum(torch.from_numpy(losses).to(world.device)).cpu().numpy()
        return Scores(whole[0], whole[1], self._items)
