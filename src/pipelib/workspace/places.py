"""All paths: the files and folders of a checkout, and those of the state folder.

A stage builds its outs in a folder with the same layout as the workspace, so one class describes both: `HERE.tokens` is in
the workspace, and `Places(outs).tokens` is where the stage builds it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
"""Lists the files of a folder with their SHA-256, so that the manifest's own hash identifies all of them."""


@dataclass(frozen=True)
class Places:
    """The files and folders of a checkout, or of a folder with the same layout."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        """The user's parameters."""
        return self.root / "params.yaml"

    @property
    def lock(self) -> Path:
        """DVC's record of the inputs and outputs of each stage."""
        return self.root / "dvc.lock"

    @property
    def constraints(self) -> Path:
        """The pinned versions of all packages."""
        return self.root / "constraints.txt"

    # ---- What the stages make ------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        """The parent of the outs of download, vocabulary and tokenize."""
        return self.root / "data"

    @property
    def raw(self) -> Path:
        """The text, as parquet files with a manifest."""
        return self.data / "raw"

    @property
    def benchmarks(self) -> Path:
        """The evaluation sets, one `.jsonl` file each, with a manifest."""
        return self.data / "benchmarks"

    @property
    def published_models(self) -> Path:
        """The published models, one Hugging Face folder each, with a manifest."""
        return self.data / "models"

    @property
    def conversations(self) -> Path:
        """Conversations from the hub, with a manifest, which is alone if there are none."""
        return self.data / "conversations"

    @property
    def vocabulary(self) -> Path:
        """The vocabulary: tokenizer.json and a manifest, which is alone for GPT-2's."""
        return self.data / "vocabulary"

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
        """The training curves by step, as CSV: the reproducible part, a function of data and parameters."""
        return self.root / "curves"

    @property
    def chat(self) -> Path:
        """What fine-tuning makes; see `ChatPlaces`."""
        return self.root / "chat"

    @property
    def reports(self) -> Path:
        """The evaluation reports, for people to read."""
        return self.root / "reports"

    @property
    def evaluation(self) -> Path:
        """The page with all measurements."""
        return self.reports / "evaluation.md"

    @property
    def model_card(self) -> Path:
        """What a user of the published model must know."""
        return self.reports / "model_card.md"

    @property
    def chat_card(self) -> Path:
        """The same for the fine-tuned model; it is there if there is one."""
        return self.reports / "chat_card.md"

    @property
    def items(self) -> Path:
        """The score of every evaluated item."""
        return self.reports / "items.npz"

    @property
    def metrics(self) -> Path:
        """Small JSON files, which git tracks."""
        return self.root / "metrics"

    def result(self, stage: str) -> Path:
        """Return the file with a stage's reproducible results, a function of its inputs."""
        return self.metrics / f"{stage}.json"

    def speed(self, stage: str, kind: str = "json") -> Path:
        """Return the file with what differs between runs of the same inputs: durations, throughput, the commit.

        Args:
            kind: `csv` for the values by step.
        """
        return self.metrics / "speed" / f"{stage}.{kind}"

    # ---- Code ----------------------------------------------------------------------------------------------------

    def stage(self, name: str) -> Path:
        """Return the file that runs a stage."""
        return self.root / "stages" / f"{name}.py"

    @property
    def source(self) -> Path:
        """The parent of the package `pipelib`."""
        return self.root / "src"


HERE = Places()
"""The workspace. It is the current folder: stages and commands run in the workspace's root."""


@dataclass(frozen=True)
class ChatPlaces:
    """The files of the out of fine-tuning. Only the manifest is there if `finetune.source` is none."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What identifies the conversations and the base."""
        return self.root / MANIFEST

    @property
    def model(self) -> Path:
        """The model that answers, a Hugging Face folder."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The adapter, as PEFT writes it; it is there if one was trained."""
        return self.root / "adapter"

    @property
    def curves(self) -> Path:
        """The curves of the training, as CSV."""
        return self.root / "curves"

    @property
    def masks(self) -> Path:
        """A page that shows which tokens were trained."""
        return self.root / "masks.html"

    @property
    def answers(self) -> Path:
        """Questions and the model's answers, as JSON."""
        return self.root / "answers.json"


def containing_out(path: Path) -> Path | None:
    """Return the out that contains a file of a stage: a folder such as data/raw or models. None for a metric, itself an out.

    Args:
        path: relative to the workspace.
    """
    if path.parts[0] == "metrics":  # git tracks each metrics file, so each is an out of its own
        return None
    return Path(*path.parts[:2]) if path.parts[0] == "data" else Path(path.parts[0])


def workspace() -> Path:
    """Return the workspace in which DVC was started (a queued experiment runs in a copy of it), else the current folder."""
    return Path(os.environ.get("DVC_ROOT", "."))


def state_root() -> Path:
    """Return the state folder of all stages: `$PIPELIB_STATE_DIR`, else `.pipelib` in the workspace that started DVC."""
    chosen = os.environ.get("PIPELIB_STATE_DIR")
    return Path(chosen) if chosen else workspace() / ".pipelib"


@dataclass(frozen=True)
class StatePlaces:
    """The folders of the state. A stage works in every folder that has a `lock`; `workdir.py` describes a stage's own."""

    root: Path

    @classmethod
    def chosen(cls) -> "StatePlaces":
        """Return the places under `state_root`."""
        return cls(state_root())

    @property
    def records(self) -> Path:
        """The records of all runs, RUN/STAGE-FINGERPRINT.jsonl; never deleted."""
        return self.root / "records"

    @property
    def hub(self) -> Path:
        """Files of the Hugging Face hub, in OWNER--NAME/REVISION/, with the lists of them in its .lists/."""
        return self.root / "hub"

    @property
    def units(self) -> Path:
        """Encoded text, by the hash of the code that encoded it."""
        return self.root / "units"

    @property
    def baselines(self) -> Path:
        """The results of baselines, by the hash of everything that decides them."""
        return self.root / "baselines"

    @property
    def trunks(self) -> Path:
        """States of trainings before their cooldown, by the hash of what decides them."""
        return self.root / "trunks"

    @property
    def slurm(self) -> Path:
        """The logs of the last jobs of tokenize."""
        return self.root / "slurm"

    @property
    def verified(self) -> Path:
        """Which shards were found right, and their times then, by the hash of their manifest."""
        return self.root / "verified"

    @property
    def vocabulary(self) -> Path:
        """Vocabularies in the format of the fast engine."""
        return self.root / "vocabulary"

    @property
    def mlflow_lock(self) -> Path:
        """The lock held while a database, an experiment or a run is created in MLflow."""
        return self.root / "mlflow.lock"


def mlflow_database() -> Path:
    """Return MLflow's database file, which is used unless `$MLFLOW_TRACKING_URI` is set."""
    return workspace().absolute() / "mlflow.db"
