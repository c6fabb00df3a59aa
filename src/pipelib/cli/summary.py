"""`pipelib summary`: the results of the last run on one screen, and where to look next."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelib.cli.command import Command
from pipelib.errors import UserError, tell, with_venv_paths
from pipelib.files import read_json
from pipelib.workspace.places import HERE, ChatPlaces

EXAMPLES = """examples:
  pipelib summary
"""
SAMPLE_LINES, LINE_LENGTH = 3, 74


@dataclass(frozen=True)
class Summary(Command):
    """Sum up the last run."""

    command = "summary"
    help = "show the results of the last run on one screen"
    description = "Print the model's losses and scores, a sample of its text, and the commands to try next."
    examples = EXAMPLES

    def run(self) -> int:
        """Print the summary of the metrics and the report in the workspace.

        Raises:
            UserError: metrics are missing, or are not those of a complete run.
        """
        tokens, train, evaluate = (read_json(HERE.result(stage)) for stage in ("tokenize", "train", "evaluate"))
        speed_file = HERE.speed("train")
        # the speed file is not in git, so a fresh clone lacks it
        speed = read_json(speed_file) if speed_file.exists() else {}
        try:
            lines = [title(train, tokens), *(f"  {name:<22}{value}" for name, value in rows(evaluate, speed))]
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{HERE.metrics}/ does not have the numbers of a complete run ({error!r}), so there is nothing to sum up; `git "
                f"diff {HERE.metrics}` shows what changed, and `dvc repro --force` makes them again."
            ) from None
        tuned = HERE.result("finetune")
        if tuned.is_file() and "answers" in (found := read_json(tuned)):
            lines.append(f"  {'answers that end':<22}{found['answers']['ended']:.0%} of {found['answers']['count']}")
        if not HERE.model.is_dir():
            tell("These numbers came with the checkout, and nothing ran here yet: make repro.")
        print("", *lines, sep="\n")
        if sample := first_sample(HERE.evaluation):
            print("It writes", *(f"  | {shorten(line)}" for line in sample.splitlines()[:SAMPLE_LINES]), sep="\n")
        for question, answer in first_answers(ChatPlaces(HERE.chat).answers):
            first_line = next(iter(answer.splitlines()), "")
            print(f"It answers the question {shorten(question)!r}", f"  | {shorten(first_line)}", sep="\n")
        print(next_steps(with_chat=ChatPlaces(HERE.chat).model.is_dir()))
        return 0


NEXT = (
    ("Look at", "reports/evaluation.md", "all that was measured, with pictures"),
    ("", "dvc plots show", "the curves, as a page to keep"),
    ("", "mlflow ui", "all runs, side by side, in the browser"),
    ("Try", 'pipelib sample --prompt "Returns the"', ""),
    ("", 'pipelib sample --chat --prompt "What is a sparse array?"', ""),
    ("", "dvc exp run -S train.max_lr=1.8e-3", ""),
    ("", "pipelib compare HEAD workspace", ""),
    ("Then", "docs/tutorial.md", "from here to GPT-2 124M"),
)
"""(what to do, the file or command, what it is)."""


def next_steps(*, with_chat: bool = True) -> str:
    """`NEXT` in columns.

    Args:
        with_chat: whether there is a fine-tuned model.
    """
    steps = [step for step in NEXT if with_chat or "--chat" not in step[1]]
    return "\n".join(
        ["", *(f"{verb:<10}{with_venv_paths(what):<28}{about}".rstrip() for verb, what, about in steps), ""]
    )


def title(train: dict[str, Any], tokens: dict[str, Any]) -> str:
    """The model and its training in one line."""
    return (
        f"{family()}, {train['parameters']:,} parameters, {train['steps']:,} steps on {train['tokens']:,} of "
        f"{tokens['train_tokens']:,} tokens"
    )


def family() -> str:
    """The family of the model, if models/ is in the workspace."""
    from pipelib.model.params import family_params

    config = HERE.model / "config.json"
    return family_params(read_json(config)["model_type"]).title if config.is_file() else "A model"


def rows(evaluate: dict[str, Any], speed: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the summary as (name, value)."""
    size = read_json(HERE.result("vocabulary"))["size"]  # an untrained model guesses uniformly: its loss is ln(size)
    lines = [
        ("validation loss", f"{evaluate['val_loss']:.4f} (it starts near ln {size:,} = {math.log(size):.2f})"),
        ("bits per byte", f"{evaluate['bits_per_byte']:.3f}"),
    ]
    for name in ("completion", "hellaswag"):
        if name in evaluate:
            lines += [
                (f"{name} acc_norm", _accuracy(evaluate[name]["acc_norm"], evaluate[name]["unigram"]["acc_norm"]))
            ]
    if speed:
        mfu = f", {speed['mfu']:.0%} of the peak" if speed["tokens_per_second"] else ""
        lines += [("speed of training", f"{speed['tokens_per_second']:,} tokens/s on {speed['device']}{mfu}")]
    return lines


def _accuracy(model: dict[str, float], unigram: dict[str, float]) -> str:
    return f"{model['value']:.4f} ({model['low']:.4f} to {model['high']:.4f}); unigrams {unigram['value']:.4f}, chance 0.25"


def shorten(line: str) -> str:
    """Cut a line to the width of the screen."""
    return line if len(line) <= LINE_LENGTH else line[: LINE_LENGTH - 1] + "…"


def first_answers(path: Path) -> list[tuple[str, str]]:
    """The first question of fine-tuning and its answer; empty if there was none."""
    if not path.is_file():
        return []
    return [(entry["question"], entry["answer"]) for entry in read_json(path)["questions"][:1]]


def first_sample(report: Path) -> str:
    """The first sample in a report; empty if there is none."""
    try:
        text = report.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fence = "````"
    parts = text.split(fence + "text\n", 1)
    return parts[1].split("\n" + fence, 1)[0] if len(parts) > 1 else ""
