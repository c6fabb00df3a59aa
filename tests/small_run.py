"""Trainings small enough for a test: in this process, and as the real command in processes of their own."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_corpus import write_shards
from small_params import model_params, write_params
from small_project import copy_code
from small_vocabulary import TOKENIZER, write_small_vocabulary
from warm_python import run_python

from pipelib.files import files_under
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.tokens.shards import UNIGRAM_COUNTS, Manifest, count_tokens, open_shard, read_manifest
from pipelib.tracking.run import NullRun
from pipelib.training.build import build_trainer
from pipelib.training.hardware import Peak
from pipelib.training.inputs import RANDOM_WEIGHTS, InitialWeights
from pipelib.training.launch.distributed import World
from pipelib.training.loop import Trainer
from pipelib.training.objectives import NextToken, Objective
from pipelib.training.params import TrainParams
from pipelib.training.pretraining import Pretraining
from pipelib.training.schedule import Cadence
from pipelib.training.training_log import MainLog
from pipelib.vocabulary.tokenizer import Tokenizer

DIFFERENT = 60
ROLES = {"stages.train": "launcher", "stages.finetune": "launcher", "pipelib.training.launch.job": "rank"}


def write_tokens(
    folder: Path, count: int = 8192, tokenizer: Tokenizer = TOKENIZER, different: int = DIFFERENT
) -> Manifest:
    """Shards of `count` tokens, a quarter of them the validation split, in documents of 40; always the same.

    `TOKENIZER` is written to the folder `vocabulary` beside them.

    Args:
        different: the tokens that occur, besides the end token. What there is to learn is that the others do not.
    """
    tokens = np.random.default_rng(0).integers(0, different, count).astype(np.uint16)
    tokens[::40] = tokenizer.end_token_id
    shards = write_shards(folder, [tokens], count // 4, tokenizer)
    manifest = Manifest(tokenizer.encoding, {"kind": "test"}, tuple(shards))
    opened = (open_shard(folder / shard.name) for shard in manifest.split("train"))
    np.save(folder / UNIGRAM_COUNTS, count_tokens(opened, tokenizer.size))
    if tokenizer == TOKENIZER:
        write_small_vocabulary(folder.with_name("vocabulary"))
    manifest.write(folder)
    return read_manifest(folder)


def random_model(params: GPT2Params, seed: int = 1, tokenizer: Tokenizer = TOKENIZER) -> GPT2:
    """A model in which no bias is zero and no LayerNorm the identity, so that each tensor changes the logits."""
    model = GPT2(params, tokenizer.size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.5 * (parameter.dim() == 1))
    return model.eval()


def export_random(
    folder: Path,
    shape: GPT2Params,
    seed: int = 1,
    recipe: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer = TOKENIZER,
) -> None:
    """A folder with such a model."""
    export_model(random_model(shape, seed, tokenizer), tokenizer, folder, recipe or {})


CURVES = ("train.csv", "validation.csv", "samples.csv")


ALONE = World(0, 1, torch.device("cpu"))


def small_trainer(
    folder: Path,
    params: TrainParams,
    *,
    shape: GPT2Params | None = None,
    checkpoint_every: int = 10**6,
    log_every: int = 10**6,
    initial: InitialWeights = RANDOM_WEIGHTS,
    objective_of: type[Objective] = NextToken,
) -> Trainer:
    """A training in this process, on `folder/tokens` and in `folder/work`; curves and checkpoints are in the latter."""
    manifest = read_manifest(folder / "tokens")
    work = folder / "work"
    work.mkdir(exist_ok=True)
    log = MainLog(work, NullRun(), params, 1, lambda: Peak(1e12, "made up"))
    cadence = Cadence(log_every, checkpoint_every)
    task = Pretraining(shape or model_params(), folder / "tokens", manifest, initial, folder, objective_of)
    return build_trainer(task, params, cadence, work, ALONE, log)


def train_small(folder: Path, params: TrainParams, **options: Any) -> GPT2:
    """Run `small_trainer` to its end."""
    return small_trainer(folder, params, **options).run()


def curve(folder: Path, name: str = "train") -> list[dict[str, float]]:
    """A curve of a training in this process, a row a step."""
    with (folder / "work" / f"{name}.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def new_model(seed: int = 7, **shape: int) -> GPT2:
    model = GPT2(model_params(**shape), TOKENIZER.size)
    model.initialise(seed)
    return model


def differing(first: torch.nn.Module, second: torch.nn.Module) -> list[str]:
    """Tensors that are not equal bit for bit."""
    other = second.state_dict()
    return [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])]


@dataclass
class Training:
    """`python -m stages.train`, running or ended, and every process it started."""

    tag: str
    process: subprocess.Popen[bytes]
    log: Path
    others: set[int] = field(default_factory=set)
    """Processes that are not of it, so that another look need not read what they are."""

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def step(self) -> int:
        """The last step that it has said to be done; 0 before the first."""
        steps = re.findall(r"^step (\d+)/", self.output(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def processes(self) -> dict[int, str]:
        """Its processes by id, each as `launcher` or `rank`; also those that lost their parent."""
        found = {}
        for pid in {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()} - self.others:
            try:
                if f"SMALL_RUN={self.tag}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                    found[pid] = ROLES[words[words.index("-m") + 1]]
                else:
                    self.others.add(pid)
            except (OSError, ValueError, KeyError):  # one that has just ended, or another program (git, sh)
                continue
        return found

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> bool:
        """Wait for a condition, or for the end, which makes it false."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return condition()
            assert time.monotonic() < deadline, f"nothing happened in {seconds} s:\n{self.output()}"
            time.sleep(0.01)
        return True

    def end(self, seconds: float = 90) -> int:
        """Wait for its end and for that of every process it started; its exit status."""
        status = self.process.wait(seconds)
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"the training has ended with {status}, and {left} run on"
            time.sleep(0.05)  # each look reads what /proc has of all processes
        return status


OUTS = {"train": ("models", "curves"), "finetune": ("chat",)}
"""The folders that a stage publishes."""


@dataclass
class SmallProject:
    """A checkout with its own code, shards and params.yaml, for the real command in processes of their own."""

    folder: Path
    state: Path
    stage: str = "train"
    references: dict[int, dict[str, bytes]] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, **changes: object) -> "SmallProject":
        """Copy the code of this checkout and write shards beside it, and params.yaml with `section__key=value` changed."""
        copy_code(folder)
        write_tokens(folder / "data/tokens")
        write_params(folder, **changes)
        return cls(folder, folder / "state")

    def begin_anew(self) -> None:
        """Forget everything that was trained."""
        for name in ("state", "metrics", *OUTS[self.stage], *(f".{out}.new" for out in OUTS[self.stage])):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def start(
        self,
        ranks: int = 1,
        command: list[str] | None = None,
        log: str = "log.txt",
        pass_fds: tuple[int, ...] = (),
        **environment: str,
    ) -> Training:
        """Start `python -m stages.STAGE`, or another command that ends up there."""
        tag = uuid.uuid4().hex
        said = self.folder / log
        with said.open("wb") as file:
            process = subprocess.Popen(
                command or [sys.executable, "-m", f"stages.{self.stage}"],
                cwd=self.folder, env=self._variables(ranks, SMALL_RUN=tag, **environment),
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=pass_fds,
            )  # fmt: skip
        return Training(tag, process, said)

    def complete(self, *arguments: str, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it, or Python with other arguments, to whatever end, in a fork that need not import torch: nobody kills it."""
        command = arguments or ("-m", f"stages.{self.stage}")
        return run_python(*command, cwd=self.folder, env=self._variables(ranks, **environment))

    def run(self, ranks: int = 1, **environment: str) -> dict[str, bytes]:
        """Run it to its end, as `complete` does, which must be a success; the outs."""
        done = self.complete(ranks=ranks, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.outs()

    def _variables(self, ranks: int, **environment: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PIPELIB_", "DVC_", "MLFLOW_", "PYTEST_")) and name != "PYTHONPATH"
        }
        return {
            **kept, "PIPELIB_STATE_DIR": str(self.state), "PIPELIB_THREADS": "1", "PIPELIB_NPROC": str(ranks),
            "CUDA_VISIBLE_DEVICES": "", **environment,
        }  # fmt: skip

    def outs(self) -> dict[str, bytes]:
        """Every byte of what the stage publishes, less its speed."""
        names = [path for out in OUTS[self.stage] for path in files_under(self.folder / out)]
        names.append(self.folder / f"metrics/{self.stage}.json")
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in names}

    def uninterrupted(self, ranks: int) -> dict[str, bytes]:
        """The outs of a run that nothing disturbs; trained once, and the project is left as if it never was."""
        if ranks not in self.references:
            self.begin_anew()
            self.references[ranks] = self.run(ranks)
            made = {name.rsplit("/", 1)[-1] for name in self.references[ranks]}
            assert {"model.safetensors", "train.csv"} <= made
        self.begin_anew()
        return self.references[ranks]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; false where the process has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def same(outs: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """The files in which two results differ, or that one of them lacks; short to read where bytes are not."""
    return sorted(name for name in outs.keys() | expected.keys() if outs.get(name) != expected.get(name))
