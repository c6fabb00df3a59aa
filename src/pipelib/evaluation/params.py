"""The evaluate stage's parameters."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelib.corpus.published_models import PUBLISHED_MODELS, is_downloaded, is_model_folder
from pipelib.schema import PositiveInt

TASKS = Path(__file__).parent / "tasks"
"""The tasks of the lm-eval harness that need no network, one YAML file each."""


@dataclass(frozen=True)
class EvaluateParams:
    """Section `evaluate` of params.yaml."""

    precision: Literal["fp32", "bf16", "fp16"]
    """Arithmetic of matrix products."""
    batch_tokens: PositiveInt
    """Tokens of one forward pass, padding included. This limits the memory."""
    tasks: tuple[str, ...]
    """Tasks of the lm-eval harness to run."""
    task_limit: PositiveInt | None
    """Examples of each of these tasks, from its start; null for all."""
    baselines: tuple[str, ...]
    """Models to measure beside ours: names in `download.models`, or Hugging Face folders, which have a slash in them and no
    commit."""
    sample_prompts: tuple[str, ...]
    """The prompts that the report's samples continue."""

    def problems(self) -> Iterator[str]:
        """Unknown or repeated tasks and baselines."""
        for task in self.tasks:
            if task not in known_tasks():
                hint = suggest(task, known_tasks())
                yield f"tasks: {task!r} is not a task that runs offline, so it could not be scored; {hint}"
        for name in self.baselines:
            if not is_model_folder(name) and not is_downloaded(name):
                hint = suggest(name, list(PUBLISHED_MODELS))
                yield f"baselines: {name!r} is neither a published model nor a folder (./{name}); {hint}"
        for key, names in (("tasks", self.tasks), ("baselines", self.baselines)):
            if len(set(names)) < len(names):
                yield f"{key}: {list(names)} has one name twice; list each name once."


def known_tasks() -> list[str]:
    """The names that `evaluate.tasks` accepts."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def benchmark_of(task: str) -> str:
    """The name in `download.benchmarks` that a task's data comes with."""
    return "completion" if task == "heldout" else task


def suggest(name: str, known: list[str]) -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
