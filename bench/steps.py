"""The steps that `train_step.py` times: a plain loop, build-nanogpt's optimizations one at a time, and the trainer's step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelib.model.attend import Attend, causal
from pipelib.model.device import autocast
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.params import Params
from pipelib.processes import available_cores
from pipelib.tokens.shards import Manifest, read_manifest, write_shard
from pipelib.training.batches import TensorBatch, make_loader
from pipelib.training.build import compiled, set_arithmetic
from pipelib.training.determinism import set_determinism
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import NextToken
from pipelib.training.optimizer import make_optimizer
from pipelib.training.step import StepResult, take_step
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

Step = Callable[[], float]
"""Runs one optimizer step. It returns a number computed from the loss, so it waits for the device."""

PRESETS = Path(__file__).resolve().parents[1] / "presets"
SMALL = GPT2Params(n_layer=4, n_head=2, n_embd=128, context_length=128)
"""The model of checks and rehearsals."""
ON_A_CPU = {} if torch.cuda.is_available() else {"compile": False, "precision": "fp32"}
"""What a rehearsal changes where there is no GPU: compiling takes long, and many CPUs emulate bf16, slowly."""
LADDER = ("fp32", "TF32", "bf16", "compile", "flash attention", "padded vocabulary", "fused AdamW")
"""build-nanogpt's optimizations; each rung includes all before it."""
NEEDS_CUDA = {"TF32": "a format of NVIDIA's GPUs", "deterministic": "on a CPU the trainer is always deterministic"}


def write_tokens(folder: Path, count: int) -> None:
    """Shards of random tokens for the loader."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    shards = [
        write_shard(
            folder / f"{split}_00000{number}.bin",
            count,
            [rng.integers(0, GPT2_TOKENIZER.size, count, np.uint16)],
            GPT2_TOKENIZER,
        )[0]
        for number, split in enumerate(("val", "train"))
    ]
    Manifest(GPT2_TOKENIZER.encoding, {"kind": "random"}, tuple(shards)).write(folder)


def plain(params: Params, rows: int, length: int) -> Step:
    """The obvious loop: the same model, torch's default AdamW, nothing compiled."""
    on = {"bf16"} if params.train.precision == "bf16" else set()
    return loop_step(params, rows, length, {"flash attention", "padded vocabulary", *on})


def rung(params: Params, rows: int, length: int, name: str) -> Step:
    """A rung of the ladder, with all rungs before it."""
    return loop_step(params, rows, length, set(LADDER[: LADDER.index(name) + 1]))


def naive(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
    """Attend as `causal` does, by the whole matrix of scores: (B, n_head, T, head_size) each -> the same."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B, n_head, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value


class MeanLoss(nn.Module):
    """What a plain loop minimises: the mean loss of a batch."""

    def __init__(self, model: GPT2, attend: Attend) -> None:
        super().__init__()
        self.model, self.attend = model, attend

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(B, T) twice -> a scalar."""
        logits = self.model.logits(self.model.hidden(inputs, attend=self.attend).flatten(0, 1))
        return F.cross_entropy(logits.float(), targets.flatten())


def loop_step(params: Params, rows: int, length: int, on: set[str]) -> Step:
    """A step of a plain loop with the optimizations in `on`; every step uses the same batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(available_cores())
    torch.set_float32_matmul_precision("high" if "TF32" in on else "highest")
    model = GPT2(params.model, GPT2_TOKENIZER.size)
    model.initialise(0)
    model.activation_checkpointing = params.train.activation_checkpointing
    if "padded vocabulary" not in on:
        model.wte = nn.Embedding(GPT2_TOKENIZER.size, params.model.n_embd)
        nn.init.normal_(model.wte.weight, std=0.02)
    model.to(device)
    loss_of = MeanLoss(model, causal if "flash attention" in on else naive)
    network = torch.compile(loss_of) if "compile" in on else loss_of
    fused = True if "fused AdamW" in on else None  # torch's default
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    tokens = torch.randint(GPT2_TOKENIZER.size, (rows, length + 1), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad()
        with autocast(device, "bf16" if "bf16" in on else "fp32"):
            loss = network(inputs, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach() + norm)

    return step


@dataclass
class Clock:
    """Times the parts of a step: with CUDA events on a GPU, which measure its own time, and the wall clock on a CPU."""

    device: torch.device
    marks: list[tuple[str, Any]] = field(default_factory=list)

    def end_of(self, part: str) -> None:
        """Mark the end of a part; it began at the previous mark."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every part since the first mark, and reset."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            taken = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            found[part] = found.get(part, 0.0) + taken
        self.marks.clear()
        return found


@dataclass(frozen=True)
class TimedWorld(World):
    """A world that times the exchange of losses, and can skip the exchange of gradients."""

    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))
    exchanging: bool = True

    def all_gather(self, value: Tensor) -> Tensor:
        """See `World`."""
        self.clock.end_of("optimizer")
        gathered = super().all_gather(value)
        self.clock.end_of("communication")
        return gathered

    def sync_when(self, wanted: bool, model: nn.Module) -> AbstractContextManager[object]:
        """See `World`."""
        return super().sync_when(wanted and self.exchanging, getattr(model, "network", model))


class Timed(nn.Module):
    """A network that marks its forward pass; the time before it counts as data."""

    def __init__(self, network: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.network, self.clock = network, clock

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """See `NextToken`."""
        self.clock.end_of("data")
        loss: Tensor = self.network(inputs, targets)
        self.clock.end_of("forward")
        return loss


class Ours:
    """The trainer's step with its loader, on this rank."""

    def __init__(
        self, params: Params, rows: int, length: int, tokens: Path, world: World, micro_steps: int = 1
    ) -> None:
        step_tokens = micro_steps * rows * length * world.world_size
        self.params = replace(
            params.train, micro_batch_size=rows, sequence_length=length, global_batch_tokens=step_tokens
        )
        self.world = world
        set_determinism(self.params, world)
        model = GPT2(params.model, GPT2_TOKENIZER.size)
        model.initialise(0)
        set_arithmetic(model, self.params)
        model.to(world.device)
        self.objective = NextToken(model)
        self.network = world.wrap(compiled(self.objective, self.params))
        self.optimizer = make_optimizer(model, self.params)
        self.loader, _ = make_loader(self.params, tokens, read_manifest(tokens), world)
        self.number = -1

    def step(self) -> float:
        """Take one step."""
        self.number += 1
        result = self.step_on(self.loader.micro_batches(self.number))
        return float(result.loss + result.grad_norm)

    def step_on(self, batches: Sequence[TensorBatch], rate: float = 1e-4) -> StepResult:
        """Take one step on these micro-batches; the device may still be computing when this returns."""
        return take_step(self.network, self.objective, self.optimizer, batches, rate, self.params, self.world)

    def parts(self, count: int) -> dict[str, float]:
        """Seconds of each part of a step, on average over `count` steps.

        Communication is the time that it adds to a step: the exchange of losses, and the part of the exchange of gradients
        that does not overlap with the backward pass.
        """
        found = self._parts(count, exchanging=True)
        if self.world.world_size > 1:
            alone = self._parts(count, exchanging=False)["backward"]
            found["communication"] += max(0.0, found["backward"] - alone)
            found["backward"] = min(found["backward"], alone)
        return found

    def _parts(self, count: int, *, exchanging: bool) -> dict[str, float]:
        clock, world = Clock(self.world.device), self.world
        timed_world = TimedWorld(
            world.rank, world.world_size, world.device, world.local_ranks, clock=clock, exchanging=exchanging
        )
        network = Timed(self.network, clock)
        total: dict[str, float] = {}
        with _backward_ends_at_clipping(clock):
            for _ in range(count):
                self.number += 1
                clock.end_of("start")
                batches = self.loader.micro_batches(self.number)
                take_step(network, self.objective, self.optimizer, batches, 1e-4, self.params, timed_world)
                clock.end_of("optimizer")
                for part, seconds in clock.seconds().items():
                    total[part] = total.get(part, 0.0) + seconds / count
        return total


@contextmanager
def _backward_ends_at_clipping(clock: Clock) -> Iterator[None]:
    """Mark the end of the backward pass when `take_step` starts to clip."""
    clip = nn.utils.clip_grad_norm_

    def clipping(*arguments: object, **options: object) -> Tensor:
        clock.end_of("backward")
        return clip(*arguments, **options)  # type: ignore[arg-type]

    with mock.patch.object(nn.utils, "clip_grad_norm_", clipping):
        yield
