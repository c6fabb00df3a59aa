"""The evaluate stage: measure the exported model and the baselines, and write the reports."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelib.errors import UserError, tell
from pipelib.evaluation.baselines import Baseline, find_baselines, measure_once, of_folder
from pipelib.evaluation.benchmark_items import read_items
from pipelib.evaluation.curves import read_curve
from pipelib.evaluation.hellaswag import score_unigram
from pipelib.evaluation.inputs import task_hashes
from pipelib.evaluation.items import Measured, write_items
from pipelib.evaluation.measure import Data, accuracy_json, measure
from pipelib.evaluation.model_card import write_chat_card, write_model_card
from pipelib.evaluation.params import EvaluateParams
from pipelib.evaluation.report import Subject, completions_of, verdict, write_report
from pipelib.evaluation.samples import write_samples
from pipelib.files import sha256_file, sha256_json
from pipelib.model.decoder import Decoder
from pipelib.model.device import pick_device
from pipelib.model.huggingface import import_model
from pipelib.model.weights import weights_sha256
from pipelib.stage import Build
from pipelib.tokens.shards import UNIGRAM_COUNTS, VALIDATION_SHARD, Manifest, read_manifest, shard_problems
from pipelib.vocabulary.choice import published_tokenizer
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import ChatPlaces, Places
from pipelib.workspace.provenance import chosen_files, code_hash, import_closure

CHECKOUT = Path(__file__).absolute().parents[3]
MEASURE = Path("src/pipelib/evaluation/measure.py")


def require_validation(tokens: Path) -> Manifest:
    """Check the validation shard in a folder of shards, and return the folder's manifest.

    Raises:
        UserError: the shard does not match the manifest.
    """
    manifest = read_manifest(tokens)
    problems = [
        problem for shard in manifest.split("val") for problem in shard_problems(tokens, shard, manifest.tokenizer)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return manifest


def evaluate(
    build: Build, params: EvaluateParams, models: Path, tokens: Path, benchmarks: Path, curves: Path, chat: Path
) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Evaluate the model in `models`, and that in `chat` if there is one.

    Returns:
        The stage's result and speed. `reports/` is built.
    """
    # Our model, and a unigram model beside it on the four-way benchmarks.
    device = pick_device()
    manifest = require_validation(tokens)
    tokenizer = manifest.tokenizer
    data = Data(tokens, benchmarks, tokenizer, manifest.validation_bytes)
    # What was measured of a model is kept: a change of `finetune` measures the chat model alone.
    chat_model = ChatPlaces(chat).model
    ours = [of_folder(str(path), path, tokenizer) for path in (models, chat_model) if path.is_dir()]
    baselines = find_baselines(params.baselines, tokenizer)
    others = measure_all([*ours, *baselines], params, data, build.code, device, build.work / "harness")
    measured = others.pop(str(models))
    result, seconds = dict(measured.result), dict(measured.seconds)
    for name, path in data.completions.items():
        unigram = score_unigram(np.load(tokens / UNIGRAM_COUNTS), read_items(path, tokenizer))
        measures = {"acc": unigram.acc, "acc_norm": unigram.acc_norm, "acc_norm_bytes": unigram.acc_norm_bytes}
        result[name] |= {"unigram": {key: accuracy_json(value) for key, value in measures.items()}}
    for name in completions_of(result):
        tell(f"evaluate: {verdict(name, result[name]['acc_norm'], result[name]['unigram']['acc_norm'])}")

    seconds |= {f"{name}_seconds": sum(other.seconds.values()) for name, other in others.items()}
    if answering := others.get(str(chat_model)):
        result["chat"] = answering.result
        made_of = ours[-1]
        write_chat_card(
            Places(build.outs).chat_card,
            ChatPlaces(chat),
            made_of.params,
            made_of.tokenizer,
            manifest,
            answering.result,
        )
    if baselines:
        result["baselines"] = {baseline.name: others[baseline.name].result for baseline in baselines}

    # Read only now: `measure` has released its own copy, and two would not fit a small GPU.
    model = import_model(models, tokenizer, quiet=True).to(device)
    # Everything in `reports/` is a function of the inputs, so that equal inputs give equal bytes.
    samples = write_samples(model, tokenizer, params.sample_prompts, params.precision, seed=0)
    subject = Subject(
        result, {name: other.result for name, other in others.items()}, model.params.parameters(model.vocab_size),
        model.vocab_size, manifest.source,
        facts(models, model, manifest, build.code, curves), samples, curves, tokenizer != published_tokenizer(),
    )  # fmt: skip
    made = Places(build.outs)
    write_report(made.reports, subject)
    write_items(made.items, measured.items)
    write_model_card(
        made.model_card, models, curves, manifest, {key: value for key, value in result.items() if key != "chat"}
    )
    build.run.log_text("samples.txt", "\n\n".join(prompt + text for prompt, text in samples))
    return result, {name: round(value, 2) for name, value in seconds.items()} | {"device": device.type}


def measure_all(
    models: Sequence[Baseline],
    params: EvaluateParams,
    data: Data,
    code: Mapping[str, str],
    device: torch.device,
    scratch: Path,
) -> dict[str, Measured]:
    """Measure each model, or read its kept result; by name.

    Args:
        code: the hashes of the stage's code, see `provenance.code_hashes`. Files that measuring does not need do not count.
    """
    names = sorted({*data.completions, *params.tasks})
    decides: dict[str, object] = {
        "params": asdict(replace(params, baselines=(), sample_prompts=())),
        "device": device.type,
        "validation": sha256_file(data.tokens / VALIDATION_SHARD) if data.tokens else None,
        "benchmarks": {name: sha256_file(data.benchmarks / f"{name}.jsonl") for name in names},
        "tasks": task_hashes(params),
    }

    def measure_baseline(baseline: Baseline) -> Measured:
        measured = measure(baseline.name, baseline.folder, params, data, scratch, baseline.tokenizer)
        own = {} if baseline.tokenizer == data.tokenizer else {"vocabulary": baseline.tokenizer.name}
        return replace(measured, result=measured.result | own)

    found = {}
    for baseline in models:
        inputs = {**decides, "code": code_that_measures(baseline, code)}
        if not baseline.is_published:  # theirs are kept for all machines with a device of this kind
            inputs["device"] = describe_device(device)
        if baseline.tokenizer != data.tokenizer:
            inputs |= {"vocabulary": baseline.tokenizer.fingerprint, "data's": data.tokenizer.fingerprint}
        found[baseline.name] = measure_once(baseline, inputs, partial(measure_baseline, baseline))
    return found


def code_that_measures(baseline: Baseline, code: Mapping[str, str]) -> dict[str, str]:
    """The hashes of the code that a baseline's scores depend on. It includes the baseline's own family, not our model's.

    Args:
        code: the hashes of the stage's code, see `provenance.code_hashes`.
    """
    family = chosen_files("evaluate", {"model.architecture": baseline.params.architecture})
    measuring = {path.as_posix() for path in import_closure(CHECKOUT, MEASURE, *family)}
    others = {name: code_hash((CHECKOUT / name).read_text(encoding="utf-8")) for name in measuring - code.keys()}
    return others | {name: value for name, value in code.items() if name.startswith("package ") or name in measuring}


def facts(models: Path, model: Decoder, manifest: Manifest, code: Mapping[str, str], curves: Path) -> dict[str, str]:
    """Facts about the model, the data and the code that the numbers belong to.

    They are equal for two runs of the same code on one machine: no date, no duration, and no commit, since several commits
    have the same code.
    """
    seen = tokens_seen(curves / "train.csv")
    flops = model.params.flops_per_token(model.vocab_size, model.params.context_length)
    return {
        **describe_model(model),
        "weights": f"SHA-256 `{weights_sha256(models)}`",
        "tokens trained on": f"{seen:,} of {manifest.tokens('train'):,} in the data",
        "training compute": f"{seen * flops / 1e15:,.3f} PFLOP, by the "
        "formula of `ModelParams.flops_per_token`; `device_hours` are in `metrics/speed/train.json`",
        "data fingerprint": f"`{manifest.fingerprint[:16]}`",
        "data source": describe_source(manifest.source),
        "vocabulary": describe_vocabulary(manifest.tokenizer),
        "code of this stage": f"`{sha256_json(dict(code))[:16]}`; the commit is in `metrics/speed/evaluate.json`",
        **describe_environment(model, code),
    }


def describe_vocabulary(tokenizer: Tokenizer) -> str:
    """A vocabulary's name, size and fingerprint."""
    return f"{tokenizer.title}: {tokenizer.size:,} tokens, `{tokenizer.fingerprint[:16]}`"


def describe_model(model: Decoder) -> dict[str, str]:
    """Facts about the model's size."""
    parameters = f"{model.params.parameters(model.vocab_size):,}"
    return {"parameters": parameters, "shape": f"{model.params.title}: {model.params.description}"}


def describe_device(device: torch.device) -> str:
    """A device as its results may depend on it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def describe_environment(model: Decoder, code: Mapping[str, str]) -> dict[str, str]:
    """Facts about the device and the package versions."""
    packages = {name.removeprefix("package "): value for name, value in code.items() if name.startswith("package ")}
    versions = ", ".join(f"{package} {version}" for package, version in sorted(packages.items()))
    facts = (describe_device(model.device), f"Python {platform.python_version()}", versions)
    return {"environment": ", ".join(filter(None, facts))}


def tokens_seen(curve: Path) -> int:
    """The tokens that a training had seen at its end; 0 if its curve is empty."""
    return int(max(read_curve(curve)["tokens"], default=0))


def describe_source(source: Mapping[str, Any]) -> str:
    """A corpus's source in words: `docs: packages numpy 2.4.6, scipy 1.17.1; seed 1337`."""

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {words(item)}" for key, item in value.items())
        return ", ".join(map(words, value)) if isinstance(value, list) else str(value)

    rest = "; ".join(f"{key} {words(value)}" for key, value in source.items() if key != "kind")
    return f"{source.get('kind', 'unknown')}: {rest}"
