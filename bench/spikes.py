"""What `train.spike` is worth: small trainings with bad batches in them, without the rule and with it.

    make bench-spikes                                    the model of params.yaml, 220 steps of 512 tokens, one seed
    make bench-spikes ARGS="--damage bytes --rate 1e-2 --seeds 3"

Needs torch, numpy, PyYAML and the tokens of a finished run. The loader gives a few batches other tokens than the shards
have: `uniform`: any of the vocabulary, all as likely; `repeated`: in every row one of them over and over; `bytes`: of the
first 256 alone, as of a binary file that was taken for text. The trainings of a seed begin with the same weights and have
the same order of rows. Where the rule would undo no step of a training, it would change no bit of it, and the training is
not run again with it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.params import Params, load_params
from pipelib.tokens.loader import Loader, training_rows
from pipelib.tokens.shards import read_manifest
from pipelib.tracking.run import NullRun
from pipelib.training.batches import TensorBatch, tensors
from pipelib.training.build import build_trainer
from pipelib.training.hardware import Peak
from pipelib.training.launch.distributed import World, join_world
from pipelib.training.loop import Trainer
from pipelib.training.params import SpikeParams
from pipelib.training.pretraining import Pretraining
from pipelib.training.probes import ShardValidation
from pipelib.training.schedule import Cadence
from pipelib.training.spikes import Spikes
from pipelib.training.training_log import MainLog

RULE = SpikeParams(window=100, deviations=6.0, batches=1, rollbacks=10)
"""What docs/reference.md says."""
ROWS, STEPS, SOUND, RUN = 4, 220, 120, 10
"""Rows of a batch, steps, the sound ones before the first bad batch, and bad batches one after the other."""
VALIDATE_EVERY, FINAL_TOKENS = 10, 65_536
"""Steps between validation losses of 2,048 tokens, and the tokens of the one at the end."""
PLANTED: dict[str, dict[int, int]] = {
    "none": {},
    "one": {SOUND: ROWS},
    f"{RUN} in a row": {SOUND + number: ROWS for number in range(RUN)},
    "as many rows, one a batch": {SOUND + number: 1 for number in range(RUN * ROWS)},
}
"""The numbers of the bad batches, and how many of their rows are bad."""


class BadLoader(Loader[TensorBatch]):
    """A loader some of whose batches are bad, each always in the same way; it counts those it has given."""

    def __init__(self, trainer: Trainer, tokens: Path, damage: str, planted: str) -> None:
        manifest = read_manifest(tokens)
        rows = training_rows(tokens, manifest, trainer.params.sequence_length)
        super().__init__(rows, trainer.plan, ROWS, 0, 1, lambda batch: tensors(batch, trainer.world.device))
        self._damage, self._bad, self._vocabulary = damage, PLANTED[planted], manifest.tokenizer.size
        self.given = 0

    def micro_batches(self, step: int) -> list[TensorBatch]:
        """See `Loader`."""
        self.given += 1
        [(inputs, targets)] = super().micro_batches(step)
        count, length = self._bad.get(step, 0), inputs.shape[1] + 1
        choice = 256 if self._damage == "bytes" else self._vocabulary
        drawn = np.random.default_rng(step).integers(0, choice, (count, 1 if self._damage == "repeated" else length))
        bad = torch.from_numpy(drawn).expand(count, length)
        inputs[:count], targets[:count] = bad[:, :-1], bad[:, 1:]
        return [(inputs, targets)]


@dataclass(frozen=True)
class Outcome:
    """What one training came to."""

    final: float
    """Validation loss after the last step."""
    back: int
    """Steps from the last one before the first bad batch until the validation loss is less than it was then."""
    worst: float
    """Greatest loss of the steps from there on that were not undone."""
    undone: int
    left_out: int
    seconds: float
    spikes: bool
    """Whether the rule would undo, or undid, a step."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    parser.add_argument(
        "--tokens", type=Path, default=Path("data/tokens"), help="folder of shards; default: data/tokens"
    )
    parser.add_argument(
        "--damage",
        choices=("uniform", "repeated", "bytes"),
        default="uniform",
        help="what the tokens of a bad batch become; default: uniform, drawn from the whole vocabulary",
    )
    parser.add_argument("--rate", type=float, help="peak learning rate; default: train.max_lr")
    parser.add_argument("--clip", type=float, help="most norm of a gradient; default: train.grad_clip_norm")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind; default: 1")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    train = replace(
        params.train, micro_batch_size=ROWS, global_batch_tokens=ROWS * params.train.sequence_length,
        max_tokens=STEPS * ROWS * params.train.sequence_length, max_lr=arguments.rate or params.train.max_lr,
        grad_clip_norm=arguments.clip or params.train.grad_clip_norm, validate_every=VALIDATE_EVERY, validate_tokens=2048,
        hellaswag_every=None, sample_prompts=(),
    )  # fmt: skip
    outcomes: dict[tuple[str, str], list[Outcome]] = {(name, rule): [] for name in PLANTED for rule in ("null", "set")}
    for seed in range(1, arguments.seeds + 1):
        for (planted, rule), found in outcomes.items():
            without = outcomes[planted, "null"]
            if rule == "null" or without[-1].spikes:
                params = replace(params, train=replace(train, seed=seed, spike=None if rule == "null" else RULE))
                with tempfile.TemporaryDirectory() as folder, join_world() as world, redirect_stdout(sys.stderr):
                    found.append(measure(params, arguments.tokens, Path(folder), world, arguments.damage, planted))
            else:
                found.append(without[-1])
        report(outcomes)


def measure(params: Params, tokens: Path, work: Path, world: World, damage: str, planted: str) -> Outcome:
    """Train once."""
    train, cadence = params.train, Cadence(params.logging.log_every, params.logging.checkpoint_every)
    log = MainLog(work, NullRun(), train, 1, lambda: Peak(1e12, ""))
    task = Pretraining(params.model, tokens, read_manifest(tokens))
    trainer = build_trainer(task, train, cadence, work, world, log)
    trainer.loader = loader = BadLoader(trainer, tokens, damage, planted)
    started = time.perf_counter()
    model = trainer.run()
    seconds = time.perf_counter() - started
    losses, after = (np.loadtxt(curve.path, delimiter=",", skiprows=1)[:, 2] for curve in (log.train, log.validation))
    after, rule = after[SOUND // VALIDATE_EVERY :], Spikes(RULE)
    return Outcome(
        final=ShardValidation(replace(train, validate_tokens=FINAL_TOKENS), tokens, world).measure(model).mean,
        back=VALIDATE_EVERY * next((number for number, loss in enumerate(after) if loss < after[0]), len(after)),
        worst=losses[SOUND:].max(),
        undone=loader.given - STEPS,
        left_out=sum(len(spike.batches) for spike in trainer.spikes.found),
        seconds=seconds,
        spikes=any(rule.detect(step, float(loss), finite=True) for step, loss in enumerate(losses, start=1)),
    )


def report(outcomes: Mapping[tuple[str, str], list[Outcome]]) -> None:
    """A table of means over the seeds so far, and the range of what bad batches add to the validation loss."""
    columns = ("bad batches", "train.spike", "validation loss", "more than with none", "back after, steps", "worst loss",
               "steps undone", "batches left out", "seconds")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    clean = outcomes["none", "null"]
    for (planted, rule), found in outcomes.items():
        more = [one.final - sound.final for one, sound in zip(found, clean, strict=True)]
        of = {name: statistics.fmean(getattr(one, name) for one in found) for name in Outcome.__annotations__}
        print(
            f"| {planted} | {rule} | {of['final']:.4f} | {statistics.fmean(more):+.4f} ({min(more):+.4f} to {max(more):+.4f}) | "
            f"{of['back']:.0f} | {of['worst']:.2f} | {of['undone']:.0f} | {of['left_out']:.0f} | {of['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
