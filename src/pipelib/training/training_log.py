"""What rank 0 records and shows of a training: curves, samples, progress lines. Other ranks record nothing.

The curves hold every step, however rarely a line is printed. Losses stay on the device and are fetched together when a
line is due, so the host waits for the device only then. A resumed run first cuts the curves back to its checkpoint, so
that no step appears twice and the curves end up byte-identical to those of an uninterrupted run.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipelib.evaluation.hellaswag import Scores
from pipelib.evaluation.loss import Loss
from pipelib.files import format_bytes, write_text
from pipelib.progress import StatusLine, format_seconds
from pipelib.tracking.run import Run
from pipelib.training.curves import Curve
from pipelib.training.hardware import Peak, peak_gpu_memory
from pipelib.training.params import TrainParams
from pipelib.training.roles import ROLES
from pipelib.training.spikes import Spikes
from pipelib.training.state import TrainState
from pipelib.training.step import StepResult
from pipelib.training.throughput import Throughput


class TrainingLog(Protocol):
    """The events of a training, as methods that record or show them."""

    def begin(self, step: int, spikes: Spikes) -> None:
        """Start, or resume after `step` finished steps.

        Args:
            spikes: those found so far.
        """

    def step(self, state: TrainState, result: StepResult, learning_rate: float, data_wait: float) -> None:
        """Note a finished step and the seconds it waited for its batch, without waiting for the device."""

    def updated(self, state: TrainState, sizes: Mapping[str, float]) -> None:
        """Record how far a step moved the weights of each role, relative to their size."""

    def flush(self) -> None:
        """Write the noted steps; show the last one, and the speed since the previous flush."""

    def pause(self) -> AbstractContextManager[None]:
        """Do not count the time in this block as training time."""
        ...

    def sync(self) -> None:
        """Make everything written so far survive a power cut. Called before a checkpoint that relies on it."""

    def say(self, text: str) -> None:
        """Show a line."""

    def rolled_back(self, step: int, spikes: Spikes) -> None:
        """Drop everything after `step` finished steps, which the last of `spikes` undid."""

    def validated(self, state: TrainState, loss: Loss) -> None:
        """Record a validation loss."""

    def scored(self, state: TrainState, scores: Scores) -> None:
        """Record scores on HellaSwag."""

    def sampled(self, state: TrainState, texts: Sequence[tuple[str, str]]) -> None:
        """Record samples, as (prompt, continuation)."""


class NullLog:
    """The log of every rank but rank 0: it does nothing."""

    def begin(self, step: int, spikes: Spikes) -> None:
        """See `TrainingLog`."""

    def step(self, state: TrainState, result: StepResult, learning_rate: float, data_wait: float) -> None:
        """See `TrainingLog`."""

    def updated(self, state: TrainState, sizes: Mapping[str, float]) -> None:
        """See `TrainingLog`."""

    def flush(self) -> None:
        """See `TrainingLog`."""

    def pause(self) -> AbstractContextManager[None]:
        """See `TrainingLog`."""
        return nullcontext()

    def sync(self) -> None:
        """See `TrainingLog`."""

    def say(self, text: str) -> None:
        """See `TrainingLog`."""

    def rolled_back(self, step: int, spikes: Spikes) -> None:
        """See `TrainingLog`."""

    def validated(self, state: TrainState, loss: Loss) -> None:
        """See `TrainingLog`."""

    def scored(self, state: TrainState, scores: Scores) -> None:
        """See `TrainingLog`."""

    def sampled(self, state: TrainState, texts: Sequence[tuple[str, str]]) -> None:
        """See `TrainingLog`."""


class MainLog:
    """The log of rank 0: curves in a folder, a line on the terminal, numbers in the run's record."""

    def __init__(
        self, folder: Path, run: Run, params: TrainParams, flops_per_token: int, measure_peak: Callable[[], Peak]
    ) -> None:
        """See `Throughput` for the last two arguments."""
        self._run, self._params = run, params
        self.throughput = Throughput(params, flops_per_token, measure_peak)
        self.train = Curve(folder / "train.csv", ("step", "tokens", "loss", "learning_rate", "grad_norm"))
        self.validation = Curve(folder / "validation.csv", ("step", "tokens", "val_loss"))
        self.samples = Curve(folder / "samples.csv", ("step", "prompt", "text"))
        self.hellaswag = Curve(
            folder / "hellaswag.csv", ("step", "tokens", "acc_norm", "low", "high", "acc", "acc_low", "acc_high")
        )
        self.updates = Curve(folder / "update_sizes.csv", ("step", "tokens", *ROLES))
        self.spikes = Curve(folder / "spikes.csv", ("step", "loss", "limit", "batches"))
        self.speed = Curve(folder / "speed.csv", ("step", "tokens_per_second", "mfu", "data_wait_ms"))
        self._noted: list[tuple[int, int, float, Tensor, Tensor]] = []
        """step, tokens, learning rate, loss and gradient norm; the last two are still on the device."""
        self._last = (0, 0, 0.0, 0.0, 0.0)
        """step, tokens, loss, learning rate and gradient norm of the last step that was written."""
        self._line = StatusLine()

    @property
    def curves(self) -> list[Curve]:
        """The reproducible curves. hellaswag.csv exists even if it is unused, because dvc.yaml plots it."""
        every = [self.train, self.validation, self.samples, self.hellaswag, self.updates]
        return every if self._params.spike is None else [*every, self.spikes]

    def export(self, curves: Path, speed: Path) -> None:
        """Copy the curves into a folder, and the speeds to a file."""
        for curve in self.curves:
            write_text(curves / curve.path.name, curve.path.read_text(encoding="utf-8"))
        write_text(speed, self.speed.path.read_text(encoding="utf-8"))

    @property
    def _cut_with_steps(self) -> tuple[Curve, ...]:
        return (self.train, self.validation, self.samples, self.hellaswag, self.updates, self.speed)

    def begin(self, step: int, spikes: Spikes) -> None:
        """See `TrainingLog`."""
        for curve in self._cut_with_steps:
            curve.resume(step)
        self._write_spikes(spikes)
        self.throughput.start()

    def rolled_back(self, step: int, spikes: Spikes) -> None:
        """See `TrainingLog`."""
        self._noted.clear()
        for curve in self._cut_with_steps:
            curve.cut(step)
        self._write_spikes(spikes)
        self.throughput.forget()
        spike = spikes.found[-1]
        text = (
            f"step {spike.step:,} has loss {spike.loss:.4f}, where train.spike allows {spike.limit:.4f}: the training rolls "
            f"back to step {step:,} and skips batch {', '.join(map(str, spike.batches))} (rollback {len(spikes.found)} of at "
            f"most {self._params.spike and self._params.spike.rollbacks})"
        )
        self._run.log_text(f"spikes/step_{spike.step:08d}.txt", text)
        self.say(text)

    def _write_spikes(self, spikes: Spikes) -> None:
        """Write all spikes again: appending would not do, since this curve is not cut back with the steps."""
        if self._params.spike is None:
            return
        self.spikes.cut(-1)
        self.spikes.append(
            [(spike.step, spike.loss, spike.limit, " ".join(map(str, spike.batches))) for spike in spikes.found]
        )

    def step(self, state: TrainState, result: StepResult, learning_rate: float, data_wait: float) -> None:
        """See `TrainingLog`."""
        self.throughput.waited(data_wait)
        self._noted.append((state.step, state.tokens, learning_rate, result.loss, result.grad_norm))

    def updated(self, state: TrainState, sizes: Mapping[str, float]) -> None:
        """See `TrainingLog`. A role without parameters has an empty cell."""
        self.updates.append([(state.step, state.tokens, *(sizes.get(role, "") for role in ROLES))])
        self._log_updated(state.step, sizes)

    def replay(self, log_every: int) -> None:
        """Send the points of the curves to the run, if they are from another one: see `trunk.py`."""
        for row in self.train.rows():
            if row["step"] % log_every == 0:
                self._log_step(**row)
        for row in self.validation.rows():
            self._log_validated(int(row["step"]), Loss(row["val_loss"], 1))
        for row in self.hellaswag.rows():
            self._log_scored(int(row["step"]), row["acc_norm"], row["acc"])
        for row in self.updates.rows():
            self._log_updated(int(row["step"]), {role: row[role] for role in ROLES if role in row})

    def _log_step(self, step: float, tokens: float, loss: float, learning_rate: float, grad_norm: float) -> None:
        point = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm, "tokens": tokens}
        self._run.log({f"train/{name}": value for name, value in point.items()}, int(step))

    def _log_validated(self, step: int, loss: Loss) -> None:
        self._run.log({"val_loss": loss.mean, "val_perplexity": loss.perplexity}, step)

    def _log_scored(self, step: int, acc_norm: float, acc: float) -> None:
        self._run.log({"hellaswag/acc_norm": acc_norm, "hellaswag/acc": acc}, step)

    def _log_updated(self, step: int, sizes: Mapping[str, float]) -> None:
        self._run.log({f"update_size/{role}": size for role, size in sizes.items()}, step)

    def flush(self) -> None:
        """See `TrainingLog`."""
        self._write_noted()
        if self.throughput.shown.steps:
            self._show(*self._last)

    def _write_noted(self) -> None:
        """Fetch the noted steps from the device and write them."""
        if not self._noted:
            return
        values = torch.stack([torch.stack((loss, norm)).float() for *_, loss, norm in self._noted]).tolist()
        self.throughput.count(len(values))  # after the fetch, which waits until the device has finished these steps
        rows = [
            (step, tokens, loss, learning_rate, norm)
            for (step, tokens, learning_rate, _, _), (loss, norm) in zip(self._noted, values, strict=True)
        ]
        self._noted.clear()
        self.train.append(rows)
        self._last = rows[-1]

    def _show(self, step: int, tokens: int, loss: float, learning_rate: float, norm: float) -> None:
        window = self.throughput.take()
        rate, mfu = self.throughput.rate(window), self.throughput.mfu(window)
        if not window.compiles:  # compiling would look like a slow step
            self.speed.append([(step, round(rate), round(mfu, 4), round(window.wait_ms, 3))])
        left, memory = (self._params.max_tokens - tokens) / rate, peak_gpu_memory()
        self._line.show(
            f"step {step:,}/{self._params.max_steps:,} | loss {loss:.4f} | lr {learning_rate:.2e} | norm {norm:.3f} | "
            f"{rate:,.0f} tokens/s | MFU {mfu:.1%} | {format_seconds(left)} left"
            + (f" | {format_bytes(memory)} of GPU memory" if memory else "")
        )
        self._log_step(step, tokens, loss, learning_rate, norm)
        self._run.log(
            {
                "speed/tokens_per_second": rate,
                "speed/mfu": mfu,
                "speed/data_wait_ms": window.wait_ms,
                **({"speed/gpu_memory_gb": memory / 1e9} if memory else {}),
            },
            step,
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See `TrainingLog`."""
        self._write_noted()  # the noted steps are training time
        yield
        self.throughput.start()

    def sync(self) -> None:
        """See `TrainingLog`."""
        for curve in self._cut_with_steps:
            curve.sync()

    def say(self, text: str) -> None:
        """See `TrainingLog`."""
        self._line.print(text)

    def validated(self, state: TrainState, loss: Loss) -> None:
        """See `TrainingLog`."""
        self.validation.append([(state.step, state.tokens, loss.mean)])
        self._log_validated(state.step, loss)
        self.say(f"step {state.step:,}: validation loss {loss.mean:.4f}, perplexity {loss.perplexity:,.1f}")

    def scored(self, state: TrainState, scores: Scores) -> None:
        """See `TrainingLog`."""
        norm, acc = scores.acc_norm, scores.acc
        accuracies = (norm.value, norm.low, norm.high, acc.value, acc.low, acc.high)
        self.hellaswag.append([(state.step, state.tokens, *accuracies)])
        self._log_scored(state.step, norm.value, acc.value)
        self.say(f"step {state.step:,}: HellaSwag acc_norm {norm.value:.4f} ({norm.low:.4f} to {norm.high:.4f})")

    def sampled(self, state: TrainState, texts: Sequence[tuple[str, str]]) -> None:
        """See `TrainingLog`."""
        # JSON keeps a text on one line, so that each line of the file is one row.
        self.samples.append([(state.step, json.dumps(prompt), json.dumps(text)) for prompt, text in texts])
        self._run.log_text(f"samples/step_{state.step:08d}.txt", "\n\n".join(prompt + text for prompt, text in texts))
        if texts:
            self.say(f"step {state.step:,}: {texts[0][0]}{texts[0][1]}".replace("\n", " "))
