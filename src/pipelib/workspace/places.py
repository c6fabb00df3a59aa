"""Where everything is: the files and folders of a checkout, and those of the state beside it.

A stage builds its outs in a folder that mirrors the workspace, so one class serves both: `HERE.tokens` is in the
workspace, `Places(outs).tokens` where a stage builds it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
"""What lists the files of a folder with their SHA-256, so that its own hash stands for all of them."""


@dataclass(frozen=True)
class Places:
    """The files and folders of a checkout, or of a folder that mirrors it."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        """The user's parameters."""
        return self.root / "params.yaml"

    @property
    def lock(self) -> Path:
        """What DVC made of what."""
        return self.root / "dvc.lock"

    @property
    def constraints(self) -> Path:
        """The pinned versions of all packages."""
        return self.root / "constraints.txt"

    # ---- What the stages make ------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        """The parent of what download and tokenize make."""
        return self.root / "data"

    @property
    def raw(self) -> Path:
        """The text, as parquet files with a manifest."""
        return self.data / "raw"

    @property
    def benchmarks(self) -> Path:
        """Evaluation sets, a `.jsonl` each, with a manifest."""
        return self.data / "benchmarks"

    @property
    def published_models(self) -> Path:
        """Published models, a Hugging Face folder each, with a manifest."""
        return self.data / "models"

    @property
    def tokens(self) -> Path:
        """The text as token ids, in shards with a manifest."""
        return self.data / "tokens"

    @property
    def model(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.root / "models"

    @property
    def curves(self) -> Path:
        """What training logs of each step, as CSV; the part that is a function of data and parameters."""
        return self.root / "curves"

    @property
    def reports(self) -> Path:
        """The evaluation, for people."""
        return self.root / "reports"

    @property
    def evaluation(self) -> Path:
        """The page with all that was measured."""
        return self.reports / "evaluation.md"

    @property
    def model_card(self) -> Path:
        """What a stranger must know of the model."""
        return self.reports / "model_card.md"

    @property
    def items(self) -> Path:
        """The score of every item that was evaluated."""
        return self.reports / "items.npz"

    @property
    def metrics(self) -> Path:
        """Small JSON files, which git tracks."""
        return self.root / "metrics"

    def result(self, stage: str) -> Path:
        """What a stage found out: a function of its inputs."""
        return self.metrics / f"{stage}.json"

    def speed(self, stage: str, kind: str = "json") -> Path:
        """What differs between runs of the same inputs: durations, throughput, the commit. `csv`: the same by step."""
        return self.metrics / "speed" / f"{stage}.{kind}"

    # ---- Code ----------------------------------------------------------------------------------------------------

    def stage(self, name: str) -> Path:
        """The file that runs a stage."""
        return self.root / "stages" / f"{name}.py"

    @property
    def source(self) -> Path:
        """The parent of the package `pipelib`."""
        return self.root / "src"


HERE = Places()
"""The workspace, for a process that runs in its root, as stages and commands do."""


def containing_out(path: Path) -> Path | None:
    """The folder that DVC knows as an out for a file of a stage, data/raw or models; None for a metric, an out itself.

    Args:
        path: relative to the workspace.
    """
    if path.parts[0] == "metrics":
        return None
    return Path(*path.parts[:2]) if path.parts[0] == "data" else Path(path.parts[0])


def workspace() -> Path:
    """The workspace that started DVC; a queued experiment runs in a copy of it. Without DVC, where we are."""
    return Path(os.environ.get("DVC_ROOT", "."))


def state_root() -> Path:
    """The folder of all stages' state: `$PIPELIB_STATE_DIR`, else `.pipelib` in the workspace that started DVC."""
    chosen = os.environ.get("PIPELIB_STATE_DIR")
    return Path(chosen) if chosen else workspace() / ".pipelib"


@dataclass(frozen=True)
class StatePlaces:
    """The folders of the state. What has a `lock` in it, a stage works in; see `workdir.py` for a stage's own."""

    root: Path

    @classmethod
    def chosen(cls) -> "StatePlaces":
        """Where the environment says."""
        return cls(state_root())

    @property
    def records(self) -> Path:
        """The runs' own records, RUN/STAGE-FINGERPRINT.jsonl; never deleted."""
        return self.root / "records"

    @property
    def hub(self) -> Path:
        """Files of the Hugging Face hub, OWNER--NAME/REVISION/, and the lists of them in .lists/ below."""
        return self.root / "hub"

    @property
    def units(self) -> Path:
        """Encoded text, by the hash of the code that encoded it."""
        return self.root / "units"

    @property
    def baselines(self) -> Path:
        """What was measured of baselines, by the hash of all that decides it."""
        return self.root / "baselines"

    @property
    def vocabulary(self) -> Path:
        """Vocabularies as the fast engine reads them."""
        return self.root / "vocabulary"

    @property
    def mlflow_lock(self) -> Path:
        """Held while a database, an experiment or a run is made in MLflow."""
        return self.root / "mlflow.lock"


def mlflow_database() -> Path:
    """MLflow's database, where `$MLFLOW_TRACKING_URI` does not name another place."""
    return workspace().absolute() / "mlflow.db"
