"""What rank 0 keeps and shows of a training: curves, samples, speed, the line of progress.

The curves hold every step, whatever the cadence of logging: losses stay on the device and are fetched together when a
line is due, so the host waits for the device only then. A resumed run first cuts the curves back to its checkpoint, so
that no step is in them twice and they end up equal to an uninterrupted run's, byte for byte.
"""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelib.evaluation.hellaswag import Scores
from pipelib.evaluation.loss import Loss
from pipelib.files import format_bytes, write_text
from pipelib.progress import StatusLine, format_seconds
from pipelib.tracking.run import Run
from pipelib.training.checkpoint import Counters
from pipelib.training.hardware import Peak, most_gpu_memory
from pipelib.training.params import TrainParams
from pipelib.training.spikes import Spikes


class Curve:
    """Rows of numbers in a CSV file; the first column is the step."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)

    def resume(self, step: int) -> None:
        """Keep what was written up to `step`, and go on after it; before the first step, begin anew. A torn line goes."""
        self.cut(step or -1)

    def cut(self, step: int) -> None:
        """Keep the rows up to `step` alone."""
        rows = [",".join(self.columns)]
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")
            rows += [line for line in lines[1:-1] if int(line.split(",", 1)[0]) <= step]
        write_text(self.path, "\n".join(rows) + "\n")

    def append(self, rows: Sequence[Sequence[float | int | str]]) -> None:
        """Add rows; they survive this process."""
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())

    def sync(self) -> None:
        """Have the rows survive a power cut too."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def last(self) -> dict[str, float]:
        """The last row, by column; empty where there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return dict(zip(self.columns, map(float, lines[-1].split(",")), strict=True)) if len(lines) > 1 else {}


Row = tuple[int, int, float, float, float]
"""step, tokens, loss, learning rate, gradient norm."""


@dataclass
class Window:
    """The steps since progress was shown last, without what was done between them."""

    compiles: bool = False
    """Whether the first steps of the process are in it, so that its speed says nothing."""
    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0
    """Seconds that steps waited for data."""
    last: Row = (0, 0, 0.0, 0.0, 0.0)

    def add(self, rows: Sequence[Row], seconds: float, wait: float) -> None:
        """Count more steps."""
        self.steps, self.last = self.steps + len(rows), rows[-1]
        self.seconds, self.wait = self.seconds + seconds, self.wait + wait


class Recorder:
    """Rank 0's record of one run."""

    def __init__(
        self, folder: Path, run: Run, params: TrainParams, flops_per_token: int, measure_peak: Callable[[], Peak]
    ) -> None:
        """Args:
        flops_per_token: of training, forward and backward.
        measure_peak: the peak of all devices together. It is asked when the first steps are done, since a peak may have
            to be measured, and at the start other threads of this process are still importing.
        """
        self._run, self._params = run, params
        self._flops_per_token, self._measure_peak = flops_per_token, measure_peak
        self.peak: Peak | None = None
        self.train = Curve(folder / "train.csv", ("step", "tokens", "loss", "lr", "grad_norm"))
        self.validation = Curve(folder / "validation.csv", ("step", "tokens", "loss"))
        self.samples = Curve(folder / "samples.csv", ("step", "prompt", "text"))
        self.hellaswag = Curve(
            folder / "hellaswag.csv", ("step", "tokens", "acc_norm", "low", "high", "acc", "acc_low", "acc_high")
        )
        self.spikes = Curve(folder / "spikes.csv", ("step", "loss", "limit", "batches"))
        self.speed = Curve(folder / "speed.csv", ("step", "tokens_per_second", "mfu", "data_wait_ms"))
        self._waiting: list[tuple[int, int, float, Tensor, Tensor]] = []
        self._line = StatusLine()
        self._mark = time.perf_counter()
        self._window = Window(compiles=True)
        self.micro_batch_size = 0
        """Rows that each rank runs at a time."""
        self.train_seconds, self.trained_tokens = 0.0, 0
        """Time and tokens of training alone: without evaluation, checkpoints, and the first steps, which compile."""
        self._wait, self._data_wait, self._steps = 0.0, 0.0, 0  # for data: since the last fetch, and as above

    @property
    def curves(self) -> list[Curve]:
        """What is a function of the data and parameters. HellaSwag's has no rows where nobody asked for it: DVC plots need it."""
        every = [self.train, self.validation, self.samples, self.hellaswag]
        return every if self._params.spike is None else [*every, self.spikes]

    @property
    def _all_curves(self) -> tuple[Curve, ...]:
        """All that are cut back with the steps."""
        return (self.train, self.validation, self.samples, self.hellaswag, self.speed)

    def begin(self, step: int, micro_batch_size: int, spikes: Spikes) -> None:
        """Go on after `step` finished steps.

        Args:
            micro_batch_size: the rows that each rank runs at a time.
            spikes: what was left out until now.
        """
        self.micro_batch_size = micro_batch_size
        for curve in self._all_curves:
            curve.resume(step)
        self._list(spikes)
        self._mark = time.perf_counter()

    def went_back(self, step: int, spikes: Spikes) -> None:
        """Forget what came after `step` finished steps: the last of `spikes` undid it."""
        self._waiting.clear()
        self._window = Window(self._window.compiles)
        for curve in self._all_curves:
            curve.cut(step)
        self._list(spikes)
        self._mark = time.perf_counter()
        spike = spikes.found[-1]
        text = (
            f"step {spike.step:,} has loss {spike.loss:.4f}, where train.spike allows {spike.limit:.4f}: the training goes "
            f"back to step {step:,} and leaves out batch {', '.join(map(str, spike.batches))} ({len(spikes.found)} of at "
            f"most {self._params.spike and self._params.spike.rollbacks})"
        )
        self._run.log_text(f"spikes/step_{spike.step:08d}.txt", text)
        self.say(text)

    def _list(self, spikes: Spikes) -> None:
        """Write all that was left out: not appended, since it is not cut back with the steps."""
        if self._params.spike is None:
            return
        self.spikes.cut(-1)
        self.spikes.append(
            [(spike.step, spike.loss, spike.limit, " ".join(map(str, spike.batches))) for spike in spikes.found]
        )

    def step(self, counters: Counters, loss: Tensor, grad_norm: Tensor, learning_rate: float, data_wait: float) -> None:
        """Note a finished step, and the seconds it waited for its batch, without waiting for the device."""
        self._wait += data_wait
        self._waiting.append((counters.step, counters.tokens, learning_rate, loss, grad_norm))

    def flush(self) -> None:
        """Fetch and write the noted steps; show the last one, and the speed since this was called last."""
        self._fetch()
        if self._window.steps:
            self._show(self._window)
            self._window = Window()

    def _fetch(self) -> None:
        """Fetch and write the noted steps."""
        if not self._waiting:
            return
        values = torch.stack([torch.stack((loss, norm)).float() for *_, loss, norm in self._waiting]).tolist()
        seconds = time.perf_counter() - self._mark  # the line above waited for the device
        rows = [
            (step, tokens, loss, learning_rate, norm)
            for (step, tokens, learning_rate, _, _), (loss, norm) in zip(self._waiting, values, strict=True)
        ]
        self._waiting.clear()
        self.train.append(rows)
        if self._window.steps or not self._window.compiles:
            self.train_seconds += seconds
            self.trained_tokens += len(rows) * self._params.global_batch_tokens
            self._data_wait += self._wait
            self._steps += len(rows)
        self._window.add(rows, seconds, self._wait)
        self._wait, self._mark = 0.0, time.perf_counter()

    def _show(self, window: "Window") -> None:
        step, tokens, loss, learning_rate, norm = window.last
        rate = window.steps * self._params.global_batch_tokens / window.seconds
        wait_ms = 1000 * window.wait / window.steps
        self.peak = self.peak or self._measure_peak()
        mfu = rate * self._flops_per_token / self.peak.flops
        if not window.compiles:
            self.speed.append([(step, round(rate), round(mfu, 4), round(wait_ms, 3))])
        left = (self._params.max_tokens - tokens) / rate
        memory = most_gpu_memory()
        self._line.show(
            f"step {step:,}/{self._params.max_steps:,} | loss {loss:.4f} | lr {learning_rate:.2e} | norm {norm:.3f} | "
            f"{rate:,.0f} tokens/s | MFU {mfu:.1%} | {format_seconds(left)} left"
            + (f" | {format_bytes(memory)} of GPU memory" if memory else "")
        )
        self._run.log(
            {
                "train/loss": loss,
                "train/lr": learning_rate,
                "train/grad_norm": norm,
                "train/tokens": tokens,
                "speed/tokens_per_second": rate,
                "speed/mfu": mfu,
                "speed/data_wait_ms": wait_ms,
                **({"speed/gpu_memory_gb": memory / 1e9} if memory else {}),
            },
            step,
        )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do something else than train in this block: its time is not training time."""
        self._fetch()
        yield
        self._mark = time.perf_counter()

    def sync(self) -> None:
        """Have everything noted so far survive a power cut; comes before a checkpoint that relies on it."""
        for curve in self._all_curves:
            curve.sync()

    def say(self, text: str) -> None:
        """Print a line."""
        self._line.print(text)

    def validated(self, counters: Counters, loss: Loss) -> None:
        """Note a validation loss."""
        self.validation.append([(counters.step, counters.tokens, loss.mean)])
        self._run.log({"val/loss": loss.mean, "val/perplexity": loss.perplexity}, counters.step)
        self._line.print(f"step {counters.step:,}: validation loss {loss.mean:.4f}, perplexity {loss.perplexity:,.1f}")

    def scored(self, counters: Counters, scores: Scores) -> None:
        """Note scores on HellaSwag."""
        norm, acc = scores.acc_norm, scores.acc
        accuracies = (norm.value, norm.low, norm.high, acc.value, acc.low, acc.high)
        self.hellaswag.append([(counters.step, counters.tokens, *accuracies)])
        self._run.log({"hellaswag/acc_norm": norm.value, "hellaswag/acc": acc.value}, counters.step)
        self._line.print(
            f"step {counters.step:,}: HellaSwag acc_norm {norm.value:.4f} ({norm.low:.4f} to {norm.high:.4f})"
        )

    def sampled(self, counters: Counters, texts: Sequence[tuple[str, str]]) -> None:
        """Note samples, as (prompt, continuation)."""
        # JSON keeps a text on one line, so that a line is a row
        self.samples.append([(counters.step, json.dumps(prompt), json.dumps(text)) for prompt, text in texts])
        self._run.log_text(
            f"samples/step_{counters.step:08d}.txt", "\n\n".join(prompt + text for prompt, text in texts)
        )
        if texts:
            self._line.print(f"step {counters.step:,}: {texts[0][0]}{texts[0][1]}".replace("\n", " "))

    @property
    def tokens_per_second(self) -> float:
        """Throughput of training alone, over the whole of this process."""
        return self.trained_tokens / self.train_seconds if self.train_seconds else 0.0

    @property
    def data_wait_ms(self) -> float:
        """Milliseconds that a step waited for its batch, on average."""
        return 1000 * self._data_wait / self._steps if self._steps else 0.0

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation of training alone."""
        return self.tokens_per_second * self._flops_per_token / self.peak.flops if self.peak else 0.0


class NullRecorder(Recorder):
    """Keeps nothing: what every other rank has."""

    def __init__(self) -> None:
        pass

    def begin(self, step: int, micro_batch_size: int, spikes: Spikes) -> None:
        """Nothing to go on with."""

    def went_back(self, step: int, spikes: Spikes) -> None:
        """Nothing to forget."""

    def step(self, counters: Counters, loss: Tensor, grad_norm: Tensor, learning_rate: float, data_wait: float) -> None:
        """Not kept."""

    def flush(self) -> None:
        """Nothing to write."""

    def say(self, text: str) -> None:
        """Not printed."""

    def validated(self, counters: Counters, loss: Loss) -> None:
        """Not kept."""

    def scored(self, counters: Counters, scores: Scores) -> None:
        """Not kept."""

    def sampled(self, counters: Counters, texts: Sequence[tuple[str, str]]) -> None:
        """Not kept."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """No time is counted."""
        yield
