"""The evaluation as a person reads it: reports/evaluation.md and its picture, a function of the stage's inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelib.evaluation.hellaswag import Accuracy
from pipelib.evaluation.loss import Loss
from pipelib.evaluation.pictures import CHANCE, draw_pictures


def accuracy_json(accuracy: Accuracy) -> dict[str, float | int]:
    """An accuracy as it stands in metrics/evaluate.json."""
    return {
        "value": round(accuracy.value, 4),
        "low": round(accuracy.low, 4),
        "high": round(accuracy.high, 4),
        "items": accuracy.items,
    }


def interval(accuracy: Accuracy) -> str:
    """An accuracy with its interval, for people."""
    return f"{accuracy.value:.4f} ({accuracy.low:.4f} to {accuracy.high:.4f})"


def verdict(name: str, accuracy: Accuracy, unigram: Accuracy | None) -> str:
    """What an accuracy says, in a sentence."""
    if not accuracy.excludes(CHANCE):
        words = "its 95 % interval includes 0.25: nothing shows that the model knows more than chance"
    elif accuracy.value < CHANCE:
        words = "its 95 % interval lies below 0.25: the model prefers wrong endings"
    else:
        words = "its 95 % interval lies above 0.25, which is chance"
    beside = f"; a unigram model scores {interval(unigram)}" if unigram else ""
    return f"{name}: acc_norm {interval(accuracy)} on {accuracy.items:,} items, {words}{beside}."


def write_report(
    folder: Path,
    loss: Loss,
    text_bytes: int,
    completions: Mapping[str, tuple[Accuracy, Accuracy, Accuracy, Accuracy]],
    harness: Mapping[str, Mapping[str, Any]],
    samples: Sequence[tuple[str, str]],
    facts: Mapping[str, object],
    curves: Path,
) -> None:
    """Write evaluation.md and the pictures of the curves.

    Args:
        completions: for each benchmark: acc and acc_norm of the model, acc and acc_norm of the unigram model.
        harness: what `run_tasks` returned.
        samples: (prompt, continuation).
        facts: what the numbers belong to: fingerprints, sizes.
        curves: the folder of train.csv and validation.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_pictures(curves, folder)
    lines = ["# Evaluation", ""]
    lines += ["| what | value |", "|---|---|"]
    lines += [
        f"| validation loss | {loss.mean:.4f} nats per token |",
        f"| perplexity | {loss.perplexity:,.1f} |",
        f"| bits per byte | {loss.bits_per_byte(text_bytes):.4f} |",
        f"| tokens scored | {loss.tokens:,}, every token of the validation shard but the first |",
    ]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "![Loss of training and validation](loss.png)", "", "## Completion", ""]
    for name, (_, acc_norm, _, unigram_norm) in completions.items():
        lines += [verdict(name, acc_norm, unigram_norm), ""]
    if completions:
        lines += ["| benchmark | scorer | model (95 % interval) | unigram model |", "|---|---|---|---|"]
        for name, (acc, acc_norm, unigram, unigram_norm) in completions.items():
            lines += [
                f"| {name} | acc: smallest summed loss | {interval(acc)} | {interval(unigram)} |",
                f"| {name} | acc_norm: smallest mean loss per token | {interval(acc_norm)} | {interval(unigram_norm)} |",
            ]
        lines += [
            "",
            "Four endings, so chance is 0.25. Intervals treat the texts as independent, not the items made from one text.",
        ]
    if harness:
        lines += [
            "",
            "## lm-eval harness",
            "",
            "| task | version | examples | metric | value |",
            "|---|---|---|---|---|",
        ]
        for task, scores in harness.items():
            for metric, value in scores.items():
                if metric not in ("version", "examples"):
                    lines.append(f"| {task} | {scores['version']} | {scores['examples']} | {metric} | {value:.4f} |")
        lines += [
            "",
            "The harness scores completion by other rules than the section above (per character, not per token).",
        ]
    lines += ["", "## Samples", ""]
    for prompt, text in samples:
        lines += ["````text", prompt + text, "````", ""]
    (folder / "evaluation.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
