"""A checkout with small parameters and small data, in which stages run as processes of their own."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelib.workspace.locks import LOCK, locked

CHECKOUT = Path(__file__).absolute().parents[1]

PARAMS: dict[str, dict[str, Any]] = {
    "download": {
        "source": "local", "path": "texts", "pattern": "**/*", "repo": "a/b", "revision": "a" * 40, "folder": "c",
        "max_tokens": None, "benchmarks": ["completion"], "benchmark_documents": 8, "models": [], "seed": 1,
    },
    "tokenize": {"shard_tokens": 4096, "dedup": "none"},
    "model": {"architecture": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 32, "init_from": "scratch"},
    "train": {
        "seed": 1, "max_tokens": 2048, "max_epochs": 1.0, "global_batch_tokens": 256, "sequence_length": 32,
        "micro_batch_size": 4, "optimizer": "adamw",
        "max_lr": 3e-3, "min_lr": 1e-6, "warmup_steps": 2, "weight_decay": 0.1, "beta1": 0.9,
        "beta2": 0.95, "eps": 1e-8, "grad_clip_norm": 1.0, "precision": "fp32", "compile": False,
        "activation_checkpointing": False, "deterministic": True, "spike": None, "hellaswag_every": None,
        "validate_every": 4, "validate_tokens": 512, "sample_every": 8, "sample_prompts": ["The"],
    },
    "evaluate": {
        "precision": "fp32", "batch_tokens": 512, "tasks": [], "task_limit": None, "baselines": [],
        "sample_prompts": ["The"],
    },
    "logging": {"log_every": 4, "checkpoint_every": 4, "mlflow": False},
}  # fmt: skip
"""8 steps of 256 tokens; a second or two."""


def write_params(folder: Path, **changes: object) -> None:
    """params.yaml, with `section__key=value` changed."""
    values = copy.deepcopy(PARAMS)
    for path, value in changes.items():
        section, key = path.split("__")
        values[section][key] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class Project:
    """A copy of the code of this checkout."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "Project":
        """`stages/`, `src/` and params.yaml."""
        for name in ("src", "stages"):
            shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        write_params(root)
        return cls(root)

    def python(
        self, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's python, by default in the project's root."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd or self.root,
            env={**inherited, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )

    def stage(self, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a stage as dvc.yaml does."""
        return self.python("-m", f"stages.{name}", environment=environment)

    def refuses(self, name: str, *words: str, **environment: str) -> str:
        """Run a stage that must end with one message which has these words in it, no traceback, and status 1."""
        done = self.stage(name, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        message = done.stderr[done.stderr.index(f"{name}: ") :]
        for word in words:
            assert word in message, message
        return message

    def runs(self, name: str, **environment: str) -> None:
        """Run a stage that must end well."""
        done = self.stage(name, **environment)
        assert done.returncode == 0, done.stdout + done.stderr

    def files(self) -> set[str]:
        """What the stages made, outside of their state."""
        made = (self.root / top for top in ("data", "models", "curves", "reports", "metrics"))
        return {path.relative_to(self.root).as_posix() for top in made for path in top.rglob("*") if path.is_file()}


def hold(folder: Path, name: str = LOCK) -> ExitStack:
    """A lock of a state folder, held until it is closed."""
    stack = ExitStack()
    stack.enter_context(locked(folder / name))
    return stack
