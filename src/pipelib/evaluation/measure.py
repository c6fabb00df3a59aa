"""Measure one model, ours or a baseline, with the same code on the same data."""

import importlib.metadata
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelib.errors import UserError
from pipelib.evaluation.benchmark_items import Item, holds_items, read_items
from pipelib.evaluation.harness import run_tasks
from pipelib.evaluation.hellaswag import Accuracy, Scores, score
from pipelib.evaluation.items import ItemScores, Measured, item_ids
from pipelib.evaluation.loss import Loss, losses_of_rows
from pipelib.evaluation.params import EvaluateParams
from pipelib.files import remove
from pipelib.model.decoder import Decoder
from pipelib.model.device import require_support
from pipelib.progress import Progress
from pipelib.tokens.loader import Batch, validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD, count_tokens, open_shard
from pipelib.vocabulary.tokenizer import Tokenizer, Tokens

COMPLETIONS = ("completion", "hellaswag")
"""Benchmarks with four endings, scored in completion style."""


@dataclass(frozen=True)
class Data:
    """The data that models are measured on."""

    tokens: Path | None
    """The folder of shards; None if there is none, and then there is no validation loss."""
    benchmarks: Path
    """The folder of the benchmarks' JSON-lines files."""
    tokenizer: Tokenizer
    """The tokenizer of the shards, which also encodes the benchmarks' text."""

    @property
    def completions(self) -> dict[str, Path]:
        """The files of the four-way benchmarks that were downloaded, by name."""
        paths = {name: self.benchmarks / f"{name}.jsonl" for name in COMPLETIONS}
        return {name: path for name, path in paths.items() if holds_items(path)}


def measure(name: str, model: Decoder, params: EvaluateParams, data: Data, scratch: Path) -> Measured:
    """Measure a model on all of the data.

    Args:
        name: the model's name in progress lines.
        scratch: a folder for the harness's copies of the data, removed at the end.

    Raises:
        UserError: the model's losses are not finite, data is damaged, or a task's data is missing.
    """
    require_support(model.device, params.precision)
    torch.backends.cuda.matmul.allow_tf32 = params.precision != "fp32"  # for products that stay in fp32, as in training
    result: dict[str, Any] = {}
    items: dict[str, ItemScores] = {}
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        seconds[part], clock = time.perf_counter() - clock, time.perf_counter()

    if data.tokens is not None:
        loss, items["validation"] = measure_loss(name, model, params, data)
        text_bytes = count_text_bytes(open_shard(data.tokens / VALIDATION_SHARD)[1:], data.tokenizer)
        result |= {
            "val_loss": round(loss.mean, 6),
            "perplexity": round(loss.perplexity, 4),
            "bits_per_byte": round(loss.bits_per_byte(text_bytes), 6),
            "val_tokens": loss.tokens,
        }
        lap("loss_seconds")
    for benchmark, path in data.completions.items():
        scores = measure_completion(f"{name}: {benchmark}", model, params, read_items(path, data.tokenizer))
        items[benchmark] = completion_items(scores)
        result[benchmark] = {
            "acc": accuracy_json(scores.acc),
            "acc_norm": accuracy_json(scores.acc_norm),
            "contexts_cut": contexts_cut(scores.items, model.params.context_length),
        }
    lap("completion_seconds")
    if params.tasks:
        tasks = run_tasks(model, data.tokenizer, params, data.benchmarks, scratch)
        remove(scratch)
        items |= {f"lm_eval/{task}": found.items for task, found in tasks.items()}
        result["lm_eval"] = {
            task: {key: _rounded(value) for key, value in tasks[task].scores.items()} for task in tasks
        }
        result["lm_eval_version"] = importlib.metadata.version("lm-eval")
    lap("harness_seconds")
    return Measured(result, items, seconds)


def measure_loss(name: str, model: Decoder, params: EvaluateParams, data: Data) -> tuple[Loss, ItemScores]:
    """The loss over every token of the validation shard but the first, in rows of the model's context, and each row's loss.

    Raises:
        UserError: the loss is not finite.
    """
    assert data.tokens is not None
    shard, end = data.tokens / VALIDATION_SHARD, data.tokenizer.end_token_id
    length = model.params.context_length
    rows = max(1, params.batch_tokens // length)
    contents: list[bytes] = []
    documents: list[int] = []  # the document in which each row begins
    started = 0  # documents up to here; each begins with an end token

    def batches() -> Iterator[Batch]:
        """The validation batches; note each row's content and document on the way."""
        nonlocal started
        for inputs, targets in validation_batches(shard, length, rows, None):
            whole = np.concatenate([inputs, targets[:, -1:]], axis=1).astype("<u2")
            contents.extend(row.tobytes() for row in whole)
            # Count the end tokens in reading order: the count at a row's first position is its document's number.
            starts = started + np.cumsum(inputs == end).reshape(inputs.shape)
            documents.extend(starts[:, 0].tolist())
            started = int(starts[-1, -1])
            yield inputs, targets

    progress = Progress(f"{name}: validation loss", len(open_shard(shard)) - 1, "tokens")
    nats, tokens = losses_of_rows(model, batches(), params.precision, progress.add)
    loss = Loss(float(nats.sum()), int(tokens.sum()))
    if not math.isfinite(loss.perplexity):
        raise UserError(
            f"{name} has a loss of {loss.mean}, so nothing about it can be measured; its weights are unusable: train it again."
        )
    progress.close(f"{loss.mean:.4f} on {loss.tokens:,} tokens, perplexity {loss.perplexity:,.1f}")
    return loss, ItemScores(
        item_ids(contents), np.array(documents, np.int64), {"loss": nats / tokens}, {"loss": tokens}
    )


def measure_completion(what: str, model: Decoder, params: EvaluateParams, items: list[Item]) -> Scores:
    """Score a model on a four-way benchmark, with a progress line."""
    progress = Progress(what, sum(len(ending) for item in items for ending in item.endings), "tokens of endings")
    scores = score(model, items, params.batch_tokens, params.precision, progress.add)
    progress.close(f"acc {scores.acc.value:.4f}, acc_norm {scores.acc_norm.value:.4f} on {len(items):,} items")
    return scores


def completion_items(scores: Scores) -> ItemScores:
    """Per item, whether the model is right, by both measures."""
    labels = np.array([item.label for item in scores.items])
    return ItemScores(
        item_ids(repr((item.context, item.endings, item.label)).encode("ascii") for item in scores.items),
        np.array([item.document for item in scores.items], np.int64),
        {"acc": scores.sums.argmin(axis=1) == labels, "acc_norm": scores.means.argmin(axis=1) == labels},
    )


def contexts_cut(items: list[Item] | Any, context_length: int) -> int:
    """The number of items whose context was cut: context and longest ending together do not fit the model's context."""
    return sum(len(item.context) + max(len(ending) for ending in item.endings) - 1 > context_length for item in items)


def accuracy_json(accuracy: Accuracy) -> dict[str, float | int]:
    """An accuracy as metrics/evaluate.json has it."""
    return {
        "value": round(accuracy.value, 4),
        "low": round(accuracy.low, 4),
        "high": round(accuracy.high, 4),
        "items": accuracy.items,
    }


def count_text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Bytes of the text that tokens stand for. The end token stands for none."""
    return int(count_tokens([tokens], tokenizer.size) @ tokenizer.byte_lengths())


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
