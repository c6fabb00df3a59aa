"""The evaluate stage: everything that is said about a trained model, measured on the exported folder."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError
from pipelib.evaluation.harness import run_tasks
from pipelib.evaluation.hellaswag import Accuracy, read_items, score, score_unigram
from pipelib.evaluation.loss import summed_loss
from pipelib.evaluation.model_card import write_model_card
from pipelib.evaluation.params import TASKS, EvaluateParams
from pipelib.evaluation.report import accuracy_json, verdict, write_report
from pipelib.evaluation.samples import write_samples
from pipelib.files import files_under, remove, sha256_file
from pipelib.model.device import pick_device
from pipelib.model.gpt import GPT
from pipelib.model.huggingface import CONFIG, import_model
from pipelib.model.vocabulary import EOT_TOKEN_ID, VOCAB_SIZE
from pipelib.stage import Build
from pipelib.tokens.encoding import tiktoken_encoding
from pipelib.tokens.loader import validation_batches
from pipelib.tokens.shards import (
    UNIGRAM_COUNTS,
    VALIDATION_SHARD,
    Manifest,
    Tokens,
    count_tokens,
    open_shard,
    read_manifest,
    shard_problems,
)  # fmt: skip

COMPLETIONS = ("completion", "hellaswag")


def evaluation_inputs(
    params: EvaluateParams, models: Path, tokens: Path, benchmarks: Path, curves: Path
) -> dict[str, object]:
    """Everything that decides an evaluation: the parameters, and the hash of every file it reads.

    Raises:
        UserError: there is no model or no data.
    """
    files = [
        *files_under(models), *files_under(benchmarks), *files_under(curves),
        tokens / VALIDATION_SHARD, tokens / UNIGRAM_COUNTS, tokens / "manifest.json",
    ]  # fmt: skip
    for path in (*files, models / CONFIG):
        if not path.is_file():
            raise UserError(f"{path} does not exist, so there is nothing to evaluate; run dvc repro.")
    hashes = {path.as_posix(): sha256_file(path) for path in files}
    hashes |= {f"task {task}": sha256_file(TASKS / f"{task}.yaml") for task in params.tasks}
    return {"evaluate": asdict(params), "files": hashes}


def evaluate(
    build: Build, params: EvaluateParams, models: Path, tokens: Path, benchmarks: Path, curves: Path
) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Evaluate the model in `models` and build `reports/`; the stage's result and speed."""
    device = pick_device()
    model = import_model(models).to(device)
    manifest = read_manifest(tokens)
    problems = [problem for shard in manifest.split("val") for problem in shard_problems(tokens, shard)]
    if problems:
        raise UserError("\n".join(problems))
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    rows = max(1, params.batch_tokens // model.params.context_length)
    loss = summed_loss(
        model, validation_batches(tokens / VALIDATION_SHARD, model.params.context_length, rows, None), params.precision
    )
    if not math.isfinite(loss.nats):
        raise UserError(
            f"{models} gives a loss of {loss.mean}: its weights are lost, and nothing about it can be measured; train anew."
        )
    text_bytes = count_text_bytes(open_shard(tokens / VALIDATION_SHARD)[1:])
    seconds["loss_seconds"], clock = _lap(clock)
    print(
        f"evaluate: validation loss {loss.mean:.4f} on {loss.tokens:,} tokens, perplexity {loss.perplexity:,.1f}",
        flush=True,
    )

    completions = {
        name: score_completion(model, benchmarks / f"{name}.jsonl", params, np.load(tokens / UNIGRAM_COUNTS))
        for name in COMPLETIONS
        if (benchmarks / f"{name}.jsonl").exists()
    }
    seconds["completion_seconds"], clock = _lap(clock)
    for name, (_, acc_norm, _, unigram_norm) in completions.items():
        print(f"evaluate: {verdict(name, acc_norm, unigram_norm)}", flush=True)

    harness = run_tasks(model, params, build.work / "harness")
    remove(build.work / "harness")
    seconds["harness_seconds"], clock = _lap(clock)

    samples = write_samples(model, params.sample_prompts, params.precision, seed=0)
    facts = _facts(manifest, model)
    write_report(build.outs / "reports", loss, text_bytes, completions, harness, samples, facts, curves)
    build.run.log_text("samples.txt", "\n\n".join(prompt + text for prompt, text in samples))
    result = {
        "val_loss": round(loss.mean, 6),
        "perplexity": round(loss.perplexity, 4),
        "bits_per_byte": round(loss.bits_per_byte(text_bytes), 6),
        "val_tokens": loss.tokens,
        **{
            name: {
                "acc": accuracy_json(acc),
                "acc_norm": accuracy_json(acc_norm),
                "unigram": {"acc": accuracy_json(unigram), "acc_norm": accuracy_json(unigram_norm)},
            }
            for name, (acc, acc_norm, unigram, unigram_norm) in completions.items()
        },
        "lm_eval": {
            task: {name: _rounded(value) for name, value in scores.items()} for task, scores in harness.items()
        },
    }
    write_model_card(build.outs / "reports/model_card.md", models, curves, manifest, result)
    return result, {name: round(value, 2) for name, value in seconds.items()} | {"device": device.type}


def score_completion(
    model: GPT, path: Path, params: EvaluateParams, counts: npt.NDArray[np.int64]
) -> tuple[Accuracy, Accuracy, Accuracy, Accuracy]:
    """acc and acc_norm of the model, and of a unigram model, on a file of items."""
    items = read_items(path, tiktoken_encoding())
    scores, unigram = score(model, items, params.batch_tokens, params.precision), score_unigram(counts, items)
    return scores.acc, scores.acc_norm, unigram.acc, unigram.acc_norm


def count_text_bytes(tokens: Tokens) -> int:
    """Bytes of the text that tokens stand for; `<|endoftext|>` stands for none."""
    encoding = tiktoken_encoding()
    lengths = np.array([len(encoding.decode_single_token_bytes(token)) for token in range(VOCAB_SIZE)])
    lengths[EOT_TOKEN_ID] = 0
    return int(count_tokens([tokens]) @ lengths)


def _facts(manifest: Manifest, model: GPT) -> dict[str, object]:
    return {
        "parameters": f"{model.params.parameters:,}",
        "training tokens in the data": f"{manifest.tokens('train'):,}",
        "data fingerprint": f"`{manifest.fingerprint[:16]}`",
        "data source": describe_source(manifest.source),
    }


def describe_source(source: Mapping[str, Any]) -> str:
    """Where a corpus comes from, for people: `docs: packages numpy 2.4.6, scipy 1.17.1; seed 1337`."""

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {words(item)}" for key, item in value.items())
        return ", ".join(map(words, value)) if isinstance(value, list) else str(value)

    rest = "; ".join(f"{key} {words(value)}" for key, value in source.items() if key != "kind")
    return f"{source.get('kind', 'unknown')}: {rest}"


def _lap(start: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - start, now


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
