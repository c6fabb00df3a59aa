"""Measure how fast this machine trains a model, with a few seconds of real optimizer steps."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipelib.model.decoder import build
from pipelib.model.device import free_memory, pick_device
from pipelib.params import Params
from pipelib.training.batches import TensorBatch, tensors
from pipelib.training.hardware import peak_of
from pipelib.training.launch.distributed import World
from pipelib.training.memory import Footprint
from pipelib.training.objectives import NextToken
from pipelib.training.optimizer import make_optimizer
from pipelib.training.step import take_step
from pipelib.vocabulary.planned import planned_size

SECONDS = 2.0
"""How long to measure after warming up, about."""
UTILISATION = 0.3
"""The assumed share of the peak: for the guess if nothing can be measured, and to size the measured steps."""
MICRO_STEP_SECONDS = 1.0
"""The time of a measured micro-step at that share of the peak; most take less."""
MIN_TOKENS = 32
"""The shortest row worth measuring."""
LONG_STEP = 3
"""Micro-steps in the longer of the two steps that are measured."""


@dataclass(frozen=True)
class Speed:
    """The speed of one rank."""

    tokens_per_second: float
    how: str


def measure_speed(params: Params, ranks: int) -> Speed:
    """Train this model on random tokens for a few seconds; if it is too big for that, guess from the hardware's peak."""
    model, train, vocab_size = params.model, params.train, planned_size(params.vocabulary)
    device = pick_device(local_world_size=ranks)
    peak = peak_of(device, train.precision).flops
    flops = model.flops_per_token(vocab_size, train.sequence_length)
    guess = UTILISATION * peak / flops
    rows, length = _trial_size(params, guess)
    if length < MIN_TOKENS or Footprint(model, vocab_size, train).memory(rows, length).total > 0.8 * free_memory(
        device
    ):
        why = "would take too long" if length < MIN_TOKENS else "would not fit in the memory that is free"
        how = f"a guess: one short step {why} here, so {UTILISATION:.0%} of a peak of {peak / 1e12:.3g} TFLOP/s is assumed"
        return Speed(guess, how)
    micro_step, rest = _measure(params, vocab_size, device, rows, length)
    micro_step *= flops / model.flops_per_token(
        vocab_size, length
    )  # correct for shorter rows, which spend less on attention
    rank_tokens = train.global_batch_tokens / ranks
    seconds = micro_step * rank_tokens / (rows * length) + rest
    eager = train.compile and not _compiles(params, device)
    how = f"measured: real steps on {rows} x {length} random tokens" + (", not compiled" if eager else "")
    return Speed(rank_tokens / seconds, how + (", without the exchange between ranks" if ranks > 1 else ""))


def _compiles(params: Params, device: torch.device) -> bool:
    """Whether to compile, as the training does: worth its minute on a GPU, where compiled steps take half the time."""
    return params.train.compile and device.type == "cuda"


def _trial_size(params: Params, tokens_per_second: float) -> tuple[int, int]:
    """Rows and tokens per row of a micro-step that is not too long; never more than the real one."""
    budget = int(tokens_per_second * MICRO_STEP_SECONDS)
    length = min(params.train.sequence_length, budget)
    rows = max(1, min(params.train.micro_batch_rows(1), budget // max(1, length)))
    return rows, length


def _measure(params: Params, vocab_size: int, device: torch.device, rows: int, length: int) -> tuple[float, float]:
    """Seconds of one micro-step, and of the rest of an optimizer step, from steps of 1 and of `LONG_STEP` micro-steps."""
    model = build(params.model, vocab_size)
    model.initialise(params.train.seed)
    model.activation_checkpointing = params.train.activation_checkpointing
    model.to(device)
    objective, optimizer = NextToken(model), make_optimizer(model, params.train)
    network: nn.Module = torch.compile(objective) if _compiles(params, device) else objective  # type: ignore[assignment]

    def seconds(micro_steps: int) -> float:
        batches = _random_batches(micro_steps, rows, length, vocab_size, device)
        started = time.perf_counter()
        loss = take_step(network, objective, optimizer, batches, 0.0, params.train, World(0, 1, device)).loss
        loss.item()  # wait for the device
        next(model.parameters())[0, 0].item()  # and for the optimizer
        return time.perf_counter() - started

    seconds(1)
    # The least time of each is the one with the least disturbance. Their difference is LONG_STEP - 1 micro-steps.
    started, one, many = time.perf_counter(), float("inf"), float("inf")
    while many == float("inf") or time.perf_counter() - started < SECONDS:
        one, many = min(one, seconds(1)), min(many, seconds(LONG_STEP))
    micro_step = max((many - one) / (LONG_STEP - 1), many / LONG_STEP / 10)  # the bound guards against noisy clocks
    return micro_step, max(0.0, one - micro_step)


def _random_batches(count: int, rows: int, length: int, vocab_size: int, device: torch.device) -> list[TensorBatch]:
    tokens = np.random.default_rng(0).integers(0, vocab_size, (count, rows, length + 1))
    return [tensors((batch[:, :-1], batch[:, 1:]), device) for batch in tokens]
