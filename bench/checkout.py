"""A copy of the checkout with other parameters, for benchmarks that train. It has the checkout's data/raw and data/benchmarks."""

import csv
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelib.corpus.parquet import iterate_raw
from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.corpus.raw import benchmark_documents
from pipelib.evaluation.measure import Data, measure_loss
from pipelib.model.decoder import Decoder, build
from pipelib.model.huggingface import export_model, import_model
from pipelib.model.params import published_params
from pipelib.params import load_params
from pipelib.tokens.shards import VALIDATION_SHARD, write_shard
from pipelib.vocabulary.choice import tokenizer_of_model
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import HERE

CHECKOUT = Path(__file__).resolve().parents[1]


def benchmark_texts() -> list[str]:
    """The documents that the completion benchmark is made of: the same for every vocabulary, and in no training."""
    count = benchmark_documents(CHECKOUT / HERE.benchmarks)
    return [row["text"] for row in islice(iterate_raw(CHECKOUT / HERE.raw), count) if row["text"]]


def model_folder(name: str, scratch: Path) -> Path:
    """The folder of a model: that of this name, or in `scratch` a published model's shape with random weights."""
    if name not in PUBLISHED_MODELS:
        return Path(name)
    model = build(published_params(name), GPT2_TOKENIZER.size)
    model.initialise(0)
    export_model(model, GPT2_TOKENIZER, scratch / "model", {})
    return scratch / "model"


class Checkout:
    """A copy of the checkout, with its corpus, in which the stages themselves run."""

    def __init__(self, root: Path, params: dict[str, Any]) -> None:
        """Args:
        root: an empty folder.
        params: the content of params.yaml. Without MLflow, and with as many passes over the corpus as the tokens need.
        """
        self.root, self.params = root, params
        for name in ("src", "stages"):
            shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for out in (HERE.raw, HERE.benchmarks, HERE.published_models):
            shutil.copytree(CHECKOUT / out, root / out, copy_function=os.link)
        shutil.copytree(CHECKOUT / "corpus", root / "corpus")
        self.params["train"]["max_epochs"] = 1000.0
        self.params["logging"]["mlflow"] = False

    def stage(self, name: str) -> None:
        """Run a stage with the parameters as they are now."""
        (self.root / HERE.params).write_text(yaml.safe_dump(self.params, sort_keys=False), encoding="utf-8")
        environment = {**os.environ, "PIPELIB_STATE_DIR": str(self.root / "state")}
        done = subprocess.run(
            [sys.executable, "-m", f"stages.{name}"],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)

    def tokenize(self) -> None:
        """Make the vocabulary and the shards."""
        for stage in ("vocabulary", "tokenize"):
            self.stage(stage)

    def train(self, **changes: object) -> None:
        """Train from the start, with parameters of section `train` changed from here on."""
        self.params["train"] |= changes
        for kept in ("train", "trunks"):
            shutil.rmtree(self.root / "state" / kept, ignore_errors=True)
        self.stage("train")

    @property
    def speeds(self) -> list[float]:
        """Tokens per second, in the intervals of `logging.log_every`."""
        with (self.root / HERE.speed("train", "csv")).open(newline="") as file:
            return [float(row["tokens_per_second"]) for row in csv.DictReader(file)]

    @property
    def seconds(self) -> float:
        """The seconds of the steps alone."""
        speed = json.loads((self.root / HERE.speed("train")).read_text())
        return float(self.params["train"]["max_tokens"] / speed["tokens_per_second"])

    @property
    def validation(self) -> list[tuple[int, float]]:
        """The validation losses, as (tokens, loss)."""
        with (self.root / HERE.curves / "validation.csv").open(newline="") as file:
            return [(int(row["tokens"]), float(row["val_loss"])) for row in csv.DictReader(file)]

    @property
    def model(self) -> tuple[Decoder, Tokenizer]:
        """The trained model."""
        folder = self.root / HERE.model
        tokenizer = tokenizer_of_model(folder, GPT2_TOKENIZER)
        return import_model(folder, tokenizer, quiet=True), tokenizer

    def bits_per_byte(self, texts: list[str]) -> tuple[float, float]:
        """Bits per byte of the model on texts, and bytes per token."""
        model, tokenizer = self.model
        pieces = [np.array([tokenizer.end_token_id, *tokenizer.encode(text)], np.uint16) for text in texts]
        total, size = sum(map(len, pieces)), sum(len(text.encode()) for text in texts)
        write_shard(self.root / VALIDATION_SHARD, total, pieces, tokenizer)
        params = load_params(CHECKOUT / HERE.params).evaluate
        loss, _ = measure_loss("", model, params, Data(self.root, self.root, tokenizer))
        return loss.bits_per_byte(size), size / (total - len(texts))
