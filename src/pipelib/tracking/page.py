"""The page of a run in MLflow: what it is, its results, how to reproduce it, and how to get its model."""

import json
from collections.abc import Mapping

from pipelib.workspace.stages import STAGES

HEADLINES = (
    ("evaluate.bits_per_byte", "bits per byte", ".3f"),
    ("evaluate.val_loss", "validation loss", ".4f"),
    ("evaluate.perplexity", "perplexity", ",.1f"),
    ("evaluate.hellaswag.acc_norm.value", "HellaSwag acc_norm", ".4f"),
    ("evaluate.completion.acc_norm.value", "completion acc_norm", ".4f"),
    ("train.parameters", "parameters", ",.0f"),
    ("train.tokens", "tokens trained on", ",.0f"),
    ("train.steps", "steps", ",.0f"),
    ("speed.train.tokens_per_second", "tokens/s", ",.0f"),
    ("speed.train.device_hours", "device hours of training", ",.3f"),
)
"""The metrics on a parent's page: key, name, format."""
DIFF = "git apply uncommitted.diff"


def reproduce(lineage: Mapping[str, str]) -> str:
    """The commands that reproduce a run.

    Args:
        lineage: `git.commit`, `git.dirty`, `dvc.exp_name` and `dvc.exp_baseline_rev`; an unknown one is an empty text.
    """
    commands = [*_checkout(lineage), "dvc repro"]
    text = "Reproduce with\n\n" + "".join(f"    {command}\n" for command in commands)
    if DIFF in commands:
        text += (
            "\nThe working tree had uncommitted changes: `uncommitted.diff` is among the artifacts of each stage. It only names "
            "new files.\n"
        )
    return text


def _checkout(lineage: Mapping[str, str]) -> list[str]:
    """The commands that check out a run's code and parameters, and with an experiment's name its dvc.lock."""
    name, commit = lineage["dvc.exp_name"], lineage["dvc.exp_baseline_rev"] or lineage["git.commit"]
    changes = f"dvc exp apply {name}" if name else DIFF if lineage["git.dirty"] == "true" else ""
    return [command for command in (f"git checkout {commit}" if commit else "", changes) if command]


def stage_page(stage: str, lineage: Mapping[str, str]) -> str:
    """The page of a stage's run in MLflow."""
    return f"{STAGES[stage].makes}.\n\n{reproduce(lineage)}"


def pipeline_page(
    metrics: Mapping[str, float],
    lineage: Mapping[str, str],
    model_md5: str,
    fingerprint: str,
    params: Mapping[str, object],
) -> str:
    """The page of a run of the whole pipeline, once it is evaluated.

    Args:
        metrics: of all stages.
        model_md5: DVC's MD5 of the folder `models`; empty if unknown.
        fingerprint: of the tokens.
        params: all parameters, flat.
    """
    architecture = params.get("model.architecture", "gpt2")  # earlier runs do not name it
    shape = ", ".join(
        f"{key.removeprefix('model.')} {value}"
        for key, value in params.items()
        if key.startswith("model.") and key not in ("model.architecture", "model.context_length", "model.init_from")
    )
    rows = [f"| {name} | {metrics[key]:{form}} |" for key, name, form in HEADLINES if key in metrics]
    parts = [f"A pass through the whole pipeline{f': {architecture} with {shape}' if shape else ''}."]
    if rows:
        parts.append("\n".join(("| what | value |", "|---|---|", *rows)))
    parts.append(
        "To read the evaluation, open `reports/evaluation.md` among the artifacts. The curves are in the run `train` below."
    )
    parts.append(reproduce(lineage).rstrip("\n"))
    if model_md5:
        ways = "`dvc repro` links it from DVC's cache, or trains it again if the cache no longer has it."
        if lineage["dvc.exp_name"]:
            ways = (
                "after `dvc exp apply`, `dvc checkout models` links it from DVC's cache, and `dvc pull models` gets it from a "
                "remote; `dvc repro` trains it again if neither has it."
            )
        parts.append(f"Get the model (DVC md5 `{model_md5}`) with the same checkout: {ways}")
    if fingerprint:
        parts.append(f"Its data: fingerprint `{fingerprint}`, the SHA-256 of `data/tokens/manifest.json`.")
    return "\n\n".join(parts) + "\n"


def model_reference(md5: str, lineage: Mapping[str, str]) -> str:
    """A JSON artifact that names the model, by DVC's MD5, and how to get it; DVC keeps the weights themselves.

    Without an experiment's name, no commit is known that has the run's dvc.lock, so `dvc checkout` could link another model.
    `dvc repro` finds the right one in the run cache.
    """
    ways = ["dvc checkout models", "dvc pull models"] if lineage["dvc.exp_name"] else ["dvc repro"]
    reference = {"path": "models", "dvc_md5": md5, "get_it": [*_checkout(lineage), *ways]}
    return json.dumps(reference, indent=2) + "\n"
