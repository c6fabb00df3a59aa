"""Parameters small enough for a test: a model of 15 thousand numbers."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from pipelib.evaluation.params import EvaluateParams
from pipelib.finetuning.params import AdapterParams, FinetuneParams
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.training.params import MuonParams, TrainParams

PARAMS: dict[str, dict[str, Any]] = {
    "download": {
        "source": "local", "path": "texts", "pattern": "**/*", "text_column": "text",
        "bad_rows": "refuse", "encoding": "utf-8", "stray_bytes": "refuse", "split": "whole", "separator": "<|endoftext|>",
        "shuffle": False, "validation": None, "repo": "a/b", "revision": "a" * 40, "folder": "c",
        "max_tokens": None, "benchmarks": ["completion"], "benchmark_documents": 8, "models": [], "conversations": None,
        "seed": 1,
    },
    "vocabulary": {
        "source": "train", "vocab_size": 300, "pre_tokenizer": "gpt2", "special_tokens": ["<|im_start|>", "<|im_end|>"],
        "max_bytes": 100000,
        "validation_documents": "auto",
    },
    "tokenize": {"shard_tokens": 8192, "dedup": "none"},
    "model": {"architecture": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16, "init_from": "scratch"},
    "train": {
        "seed": 7, "max_tokens": 2560, "max_epochs": 1.0, "global_batch_tokens": 64, "sequence_length": 16,
        "micro_batch_size": 2, "optimizer": "adamw", "muon": None, "schedule": "cosine", "cooldown": None,
        "max_lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 4, "weight_decay": 0.1, "beta1": 0.9,
        "beta2": 0.95, "eps": 1e-8, "grad_clip_norm": 1.0, "precision": "fp32", "compile": False, "deterministic": True,
        "activation_checkpointing": False, "spike": None, "experiments": None, "hellaswag_every": None,
        "validate_every": 10, "validate_tokens": 64, "sample_every": 20, "sample_prompts": ["The"],
    },
    "finetune": {
        "source": "none", "path": "conversations", "pattern": "**/*", "format": "auto", "bad_rows": "refuse",
        "max_conversations": None, "validation": 0.1, "init_from": "models", "adapter": None, "train_on": "assistant",
        "packing": True, "seed": 7, "epochs": 2.0, "global_batch_tokens": 64, "sequence_length": 16,
        "micro_batch_size": 2, "schedule": "linear", "max_lr": 2e-2, "min_lr": 0.0, "warmup": 0.1, "weight_decay": 0.0,
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "grad_clip_norm": 1.0, "precision": "fp32", "compile": False,
        "activation_checkpointing": False, "deterministic": True, "validate_every": 5, "answers": 4, "answer_tokens": 8,
        "questions": ["Who is it?"],
    },
    "evaluate": {
        "precision": "fp32", "batch_tokens": 512, "tasks": [], "task_limit": None, "baselines": [],
        "sample_prompts": ["The"],
    },
    "logging": {"log_every": 1, "checkpoint_every": 5, "mlflow": False},
}  # fmt: skip
"""params.yaml: 40 steps of 4 rows of 16 tokens, in 2 micro-steps; a second or two."""

MUON = {"momentum": 0.9, "weight_decay": 0.1, "embedding_lr": 0.02, "head_lr": 0.02, "vector_lr": 0.02}
"""Section `train.muon`, for `optimizer: muon` with `max_lr: 0.02`."""
ROTARY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "context_length": 16, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "init_from": "scratch",
}  # fmt: skip
"""Section `model` of a family of rotary positions, without `architecture`."""

for _section, _kind in (("train", TrainParams), ("finetune", FinetuneParams)):
    assert {entry.name for entry in fields(_kind)} == PARAMS[_section].keys(), f"PARAMS has to name all of {_section}"


def write_params(folder: Path, **changes: object) -> None:
    """params.yaml, with `section__key=value` changed, or `section=values` replaced."""
    values = copy.deepcopy(PARAMS)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if not key:
            assert isinstance(value, dict)
            values[section] = value
            continue
        assert key in values[section], f"{section}.{key} is not a parameter"
        values[section][key] = value
    (folder / "conversations").mkdir(exist_ok=True)  # DVC wants what `finetune.path` names, for every source
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def model_params(**changes: int) -> GPT2Params:
    """The section `model`: the shape alone."""
    shape = {name: value for name, value in PARAMS["model"].items() if name not in ("architecture", "init_from")}
    return GPT2Params(**{**shape, **changes})


def train_params(**changes: Any) -> TrainParams:
    """The section `train`."""
    values = {**PARAMS["train"], **changes}
    if isinstance(values["muon"], dict):
        values["muon"] = MuonParams(**values["muon"])
    return TrainParams(**{**values, "sample_prompts": tuple(values["sample_prompts"])})


def finetune_params(**changes: Any) -> FinetuneParams:
    """The section `finetune`."""
    values = {**PARAMS["finetune"], **changes}
    if isinstance(values["adapter"], dict):
        values["adapter"] = AdapterParams(**values["adapter"])
    return FinetuneParams(**{**values, "questions": tuple(values["questions"])})


def evaluate_params(**changes: Any) -> EvaluateParams:
    """The section `evaluate`."""
    values = {**PARAMS["evaluate"], **changes}
    return EvaluateParams(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
