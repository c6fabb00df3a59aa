"""The parameters of the evaluate stage."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelib.config import PositiveInt

TASKS = Path(__file__).parent / "tasks"
"""The tasks of the lm-eval harness that need no network, one YAML file each."""


@dataclass(frozen=True)
class EvaluateParams:
    """Section `evaluate` of params.yaml."""

    precision: Literal["fp32", "bf16"]
    """Arithmetic of matrix products."""
    batch_tokens: PositiveInt
    """Tokens of one forward pass, padding included: what bounds the memory."""
    tasks: tuple[str, ...]
    """Tasks of the lm-eval harness to run."""
    task_limit: PositiveInt | None
    """Examples of each of these tasks, from its start; null for all."""
    sample_prompts: tuple[str, ...]
    """What the report's samples go on from."""

    def problems(self) -> Iterator[str]:
        """Tasks that nobody knows."""
        known = sorted(path.stem for path in TASKS.glob("*.yaml"))
        for task in self.tasks:
            if task not in known:
                near = difflib.get_close_matches(task, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
                yield f"tasks: {task!r} is not a task that runs offline, so it could not be scored; {hint}"
