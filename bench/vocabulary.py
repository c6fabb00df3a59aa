"""Bits per byte of the benchmark's documents for vocabularies of several sizes, with the model and the time of params.yaml.

    python bench/vocabulary.py                                  GPT-2's, and 1,024 to 16,384 tokens trained on the corpus
    python bench/vocabulary.py --sizes 4096 8192 --seeds 3

Needs data/raw and data/benchmarks of this checkout. Each vocabulary is trained, the corpus tokenized, and the model trained by
the stages themselves, in a copy of the checkout. GPT-2's comes first: its training with params.yaml gives the seconds. Then
`max_tokens` of the others is set to what their model reads in these seconds, measured in a short run; `--same-tokens` leaves
it. The text that is scored is the same for all: the documents that the completion benchmark is made of.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelib.corpus.parquet import iterate_raw
from pipelib.corpus.raw import benchmark_documents
from pipelib.evaluation.measure import Data, measure_loss
from pipelib.model.huggingface import import_model
from pipelib.params import load_params
from pipelib.tokens.shards import VALIDATION_SHARD, write_shard
from pipelib.vocabulary.choice import tokenizer_of_model
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.workspace.places import HERE

CHECKOUT = Path(__file__).resolve().parents[1]
TRIAL_STEPS = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="tokens")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each vocabulary; default: 1")
    parser.add_argument("--same-tokens", action="store_true", help="train on as many tokens as params.yaml says")
    arguments = parser.parse_args()
    texts = benchmark_texts()
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes")
    print(
        f"{'vocabulary':<12}{'seed':>5}{'bytes/token':>12}{'parameters':>12}{'tokens':>10}{'seconds':>9}{'bits/byte':>10}"
    )
    seconds: list[float] = []
    for size in (None, *arguments.sizes):
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory(prefix="bench-vocabulary-") as folder:
                run = Run(Path(folder), size, 1337 + seed)
                tokens = None if size is None or arguments.same_tokens else run.tokens_in(np.mean(seconds).item())
                run.train(tokens)
                if size is None:
                    seconds.append(run.seconds)
                print(run.line(texts), flush=True)


def benchmark_texts() -> list[str]:
    """The documents of the benchmark."""
    count = benchmark_documents(CHECKOUT / HERE.benchmarks)
    return [row["text"] for row in islice(iterate_raw(CHECKOUT / HERE.raw), count) if row["text"]]


class Run:
    """A copy of the checkout with a vocabulary."""

    def __init__(self, root: Path, size: int | None, seed: int) -> None:
        self.root, self.size, self.seed = root, size, seed
        for name in ("src", "stages"):
            shutil.copytree(CHECKOUT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for out in (HERE.raw, HERE.benchmarks, HERE.published_models):
            shutil.copytree(CHECKOUT / out, root / out, copy_function=os.link)
        shutil.copytree(CHECKOUT / "corpus", root / "corpus")
        self.params: dict[str, Any] = yaml.safe_load((CHECKOUT / HERE.params).read_text(encoding="utf-8"))
        self.params["vocabulary"] |= {"source": "train", "size": size} if size else {"source": "gpt2"}
        self.params["train"] |= {"seed": seed, "max_epochs": 1000.0}
        self.params["logging"]["mlflow"] = False
        self._write()
        for stage in ("vocabulary", "tokenize"):
            self._stage(stage)

    def tokens_in(self, seconds: float) -> int:
        """Return how many tokens the model reads in a time, from a short run."""
        kept, step = self.params["train"]["max_tokens"], self.params["train"]["global_batch_tokens"]
        self.train(TRIAL_STEPS * step)
        with (self.root / HERE.speed("train", "csv")).open(newline="") as file:
            speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file)]
        self.params["train"]["max_tokens"] = kept
        warm = speeds[len(speeds) // 2 :]  # the first steps are slower
        return int(seconds * np.mean(warm)) // step * step

    def train(self, max_tokens: int | None) -> None:
        """Train; None for the tokens of params.yaml."""
        self.params["train"]["max_tokens"] = max_tokens or self.params["train"]["max_tokens"]
        self._write()
        self._stage("train")

    @property
    def seconds(self) -> float:
        """The seconds of the steps alone."""
        speed = json.loads((self.root / HERE.speed("train")).read_text())
        return float(self.params["train"]["max_tokens"] / speed["tokens_per_second"])

    def line(self, texts: list[str]) -> str:
        """Return the figures of this run."""
        folder = self.root / HERE.model
        tokenizer = tokenizer_of_model(folder, GPT2_TOKENIZER)
        model = import_model(folder, tokenizer)
        pieces = [np.array([tokenizer.end_token_id, *tokenizer.encode(text)], np.uint16) for text in texts]
        total = sum(map(len, pieces))
        write_shard(self.root / VALIDATION_SHARD, total, pieces, tokenizer)
        size = sum(len(text.encode()) for text in texts)
        params = load_params(CHECKOUT / HERE.params).evaluate
        loss, _ = measure_loss("", model, params, Data(self.root, self.root, tokenizer))
        return (
            f"{self.size or 'gpt2':<12}{self.seed:>5}{size / (total - len(texts)):>12.3f}"
            f"{model.params.parameters(tokenizer.size):>12,}{self.params['train']['max_tokens']:>10,}{self.seconds:>9.0f}"
            f"{loss.bits_per_byte(size):>10.3f}"
        )

    def _write(self) -> None:
        (self.root / HERE.params).write_text(yaml.safe_dump(self.params, sort_keys=False), encoding="utf-8")

    def _stage(self, name: str) -> None:
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


if __name__ == "__main__":
    main()
