"""Measure one model, ours or a baseline, with the same code on the same data."""

import importlib.metadata
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
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
from pipelib.model.device import gpu_count, pick_device, require_support
from pipelib.model.huggingface import import_model
from pipelib.pool import Pool, worker_number
from pipelib.progress import Progress
from pipelib.tokens.loader import Batch, validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD, count_tokens, open_shard, write_shard
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
    text_bytes: int | None = None
    """Bytes of the validation text; None for those that its tokens stand for, which normalisation may have changed."""

    @property
    def completions(self) -> dict[str, Path]:
        """The files of the four-way benchmarks that were downloaded, by name."""
        paths = {name: self.benchmarks / f"{name}.jsonl" for name in COMPLETIONS}
        return {name: path for name, path in paths.items() if holds_items(path)}


def measure(
    name: str, folder: Path, params: EvaluateParams, data: Data, scratch: Path, tokenizer: Tokenizer | None = None
) -> Measured:
    """Measure a model on all of the data. Several GPUs measure several parts at once, with the results of one GPU.

    Args:
        name: the model's name in progress lines.
        folder: the model in Hugging Face's format.
        scratch: a folder for the harness's copies of the data, removed at the end.
        tokenizer: the model's; None if it is the data's. Another one encodes the text of the validation shard anew.

    Raises:
        UserError: the model cannot be read, its losses are not finite, data is damaged, or a task's data is missing.
    """
    if tokenizer and tokenizer != data.tokenizer:
        with tempfile.TemporaryDirectory(prefix="pipelib-") as folder_of_tokens:
            other = encoded_anew(data, tokenizer, Path(folder_of_tokens))
            return measure(name, folder, params, other, scratch)
    calls = [(part, name, params, data, scratch) for part in parts_of(params, data)]
    processes = min(gpu_count(), len(calls))
    if processes > 1:
        with Pool(processes, _start_worker, folder, data.tokenizer, processes, finish_tasks=False) as pool:
            found = dict(pool.run(_measure_in_worker, calls))
        measured = [found[number] for number in range(len(calls))]
    else:
        model = import_model(folder, data.tokenizer).to(pick_device())
        measured = [measure_part(model, *call) for call in calls]
    result: dict[str, Any] = {}
    items: dict[str, ItemScores] = {}
    seconds: Counter[str] = Counter()
    for part in measured:
        result |= part.result
        items |= part.items
        seconds.update(part.seconds)
    return Measured(result, items, dict(seconds))


def encoded_anew(data: Data, tokenizer: Tokenizer, folder: Path) -> Data:
    """Return the same text in the tokens of another vocabulary.

    A character that is cut by the end of the validation shard is left out, three bytes at most.

    Args:
        folder: for the new validation shard.
    """
    if data.tokens is None:
        return Data(None, data.benchmarks, tokenizer)
    tokens = open_shard(data.tokens / VALIDATION_SHARD)
    starts = np.flatnonzero(tokens == data.tokenizer.end_token_id)
    progress = Progress(f"encoding the validation text with {tokenizer.title}", len(starts), "documents")
    pieces: list[Tokens] = []
    for start, end in pairwise([*starts.tolist(), len(tokens)]):
        text = data.tokenizer.decode_bytes(tokens[start + 1 : end]).decode("utf-8", errors="ignore")
        pieces.append(np.array([tokenizer.end_token_id, *tokenizer.encode(text)], tokenizer.token_type))
        progress.add(1)
    progress.close()
    write_shard(folder / VALIDATION_SHARD, sum(map(len, pieces)), pieces, tokenizer)
    same_text = data.text_bytes or count_text_bytes(tokens, data.tokenizer)
    return Data(folder, data.benchmarks, tokenizer, same_text if tokenizer.normalizer else None)


_model: Decoder | None = None
"""The model of this worker process."""


def _start_worker(folder: Path, tokenizer: Tokenizer, processes: int) -> None:
    global _model
    _model = import_model(folder, tokenizer, quiet=worker_number() > 0).to(pick_device(worker_number(), processes))


def _measure_in_worker(part: str, name: str, params: EvaluateParams, data: Data, scratch: Path) -> Measured:
    assert _model is not None
    return measure_part(_model, part, name, params, data, scratch)


LOSS, HARNESS = "loss", "harness"


def parts_of(params: EvaluateParams, data: Data) -> list[str]:
    """The parts of measuring a model: its loss, each four-way benchmark, the harness. Each is independent of the others."""
    return [LOSS] * (data.tokens is not None) + list(data.completions) + [HARNESS] * bool(params.tasks)


def measure_part(model: Decoder, part: str, name: str, params: EvaluateParams, data: Data, scratch: Path) -> Measured:
    """Measure one part, see `parts_of` and `measure`."""
    require_support(model.device, params.precision)
    torch.backends.cuda.matmul.allow_tf32 = params.precision != "fp32"  # for products that stay in fp32, as in training
    started = time.perf_counter()
    if part == LOSS:
        result, items = _loss_part(name, model, params, data)
    elif part == HARNESS:
        result, items = _harness_part(model, params, data, scratch)
    else:
        result, items = _completion_part(part, name, model, params, data)
    kind = part if part in (LOSS, HARNESS) else "completion"
    return Measured(result, items, {f"{kind}_seconds": time.perf_counter() - started})


Part = tuple[dict[str, Any], dict[str, ItemScores]]
"""A part's result and the scores of its items, as in `Measured`."""


def _loss_part(name: str, model: Decoder, params: EvaluateParams, data: Data) -> Part:
    assert data.tokens is not None
    loss, items = measure_loss(name, model, params, data)
    shard = open_shard(data.tokens / VALIDATION_SHARD)
    text_bytes = data.text_bytes or count_text_bytes(shard[1:], data.tokenizer)
    result = {
        "val_loss": round(loss.mean, 6),
        "perplexity": round(loss.perplexity, 4),
        "bits_per_byte": round(loss.bits_per_byte(text_bytes), 6),
        "val_tokens": loss.tokens,
    }
    return result, {"validation": items}


def _completion_part(benchmark: str, name: str, model: Decoder, params: EvaluateParams, data: Data) -> Part:
    items = read_items(data.completions[benchmark], data.tokenizer)
    scores = measure_completion(f"{name}: {benchmark}", model, params, items)
    result = {
        "acc": accuracy_json(scores.acc),
        "acc_norm": accuracy_json(scores.acc_norm),
        "acc_norm_bytes": accuracy_json(scores.acc_norm_bytes),
        "contexts_cut": contexts_cut(scores.items, model.params.context_length),
    }
    return {benchmark: result}, {benchmark: completion_items(scores)}


def _harness_part(model: Decoder, params: EvaluateParams, data: Data, scratch: Path) -> Part:
    tasks = run_tasks(model, data.tokenizer, params, data.benchmarks, scratch)
    remove(scratch)
    scores = {task: {key: _rounded(value) for key, value in tasks[task].scores.items()} for task in tasks}
    result = {"lm_eval": scores, "lm_eval_version": importlib.metadata.version("lm-eval")}
    return result, {f"lm_eval/{task}": found.items for task, found in tasks.items()}


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
        item_ids(repr((item.texts, item.label)).encode("utf-8", "surrogatepass") for item in scores.items),
        np.array([item.document for item in scores.items], np.int64),
        {
            "acc": scores.sums.argmin(axis=1) == labels,
            "acc_norm": scores.means.argmin(axis=1) == labels,
            "acc_norm_bytes": scores.per_byte.argmin(axis=1) == labels,
        },
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
