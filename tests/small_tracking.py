"""Runs that are tracked, in this process, and what MLflow has of them. A plugin of pytest, for its fixtures."""

import fcntl
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelib.tracking.mlflow_store import prepare_mlflow
from pipelib.tracking.record import read_events
from pipelib.tracking.run import Run, open_run

CODE = {"stages/train.py": "aa"}
FINGERPRINT = "f" * 64
SEARCHED = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path)
"""PYTHONPATH for other processes; taken before any test changes the folder."""


@dataclass(frozen=True)
class Logging:
    log_every: int = 10
    mlflow: bool = True


@dataclass(frozen=True)
class FakeParams:
    download: dict[str, Any] = field(default_factory=lambda: {"source": "docs"})
    tokenize: dict[str, Any] = field(default_factory=lambda: {"shard_tokens": 4096, "dedup": "none"})
    model: dict[str, Any] = field(default_factory=lambda: {"n_layer": 2})
    train: dict[str, Any] = field(default_factory=lambda: {"max_lr": 0.0018, "compile": False})
    evaluate: dict[str, Any] = field(default_factory=lambda: {"tasks": ("a", "b")})
    logging: Logging = Logging()


def start(stage: str = "train", *, mlflow: bool = True, code: dict[str, str] = CODE, **options: Any) -> Run:
    return open_run(stage, FakeParams(logging=Logging(mlflow=mlflow)), FINGERPRINT, code, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without a run, to copy; made once, by our own code, since it takes seconds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "empty_database"
    folder.mkdir(exist_ok=True)
    database = folder / "mlflow.db"
    prepare_mlflow()
    from mlflow import MlflowClient

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            MlflowClient(f"sqlite:///{database}.new")
            Path(f"{database}.new").rename(database)
    return database


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Where mlflow.db lies, shared by the tests of a file. Each test has its own key in it."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copy(empty_database, folder)
    return folder


@pytest.fixture
def workspace(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty folder as the working directory, with the state in it, and a key of the test's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "PIPELIB_RESUME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("PIPELIB_TRACKING_WAIT", "120")  # a machine that is busy with other tests may be slow
    monkeypatch.setenv("DVC_EXP_NAME", re.sub(r"\W", "_", request.node.name))
    return tmp_path


@pytest.fixture
def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def record_path(stage: str = "train") -> Path:
    return Path("state/records") / os.environ["DVC_EXP_NAME"] / f"{stage}-{FINGERPRINT[:16]}.jsonl"


def points(path: Path) -> list[tuple[str, int | None]]:
    return [(key, e["step"]) for e in read_events(path)[0] if e["event"] == "metrics" for key in e["metrics"]]


def runs(client: Any, stage: str) -> list[Any]:
    experiment = client.get_experiment_by_name("pipelib").experiment_id
    key = os.environ["DVC_EXP_NAME"]
    (parent,) = client.search_runs([experiment], f"tags.`pipelib.key` = '{key}' and tags.`pipelib.stage` = 'pipeline'")
    if stage == "pipeline":
        return [parent]
    family = f"tags.mlflow.parentRunId = '{parent.info.run_id}' and tags.`pipelib.stage` = '{stage}'"
    return list(client.search_runs([experiment], family))


def steps(client: Any, run: Any, key: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, key)]


def write(name: str, content: object) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
