"""Time one optimizer step of a params file: ours, and a plain PyTorch loop of the same model in the same run.

    make bench-train                                    params.yaml
    make bench-train ARGS="--params presets/gpt2-124m.yaml --rows 2 --length 512"

Needs torch, numpy and PyYAML only. The two run in processes of their own, since settings of the memory allocator hold for
a process, and take turns, so that a noisy machine disturbs both alike.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.model.device import autocast, pick_device
from pipelib.model.gpt import GPT, initialise
from pipelib.model.vocabulary import VOCAB_SIZE
from pipelib.params import Params, load_params
from pipelib.processes import available_cores
from pipelib.tokens.loader import Batch
from pipelib.training.distributed import World
from pipelib.training.hardware import peak_of
from pipelib.training.loop import take_step
from pipelib.training.optim import make_optimizer

ROUNDS, WARMUP = 3, 3
Step = Callable[[], float]
"""Runs one optimizer step and returns its loss, which waits for the device."""


def main() -> None:
    """Measure and print, or, as a process of one of the two, measure and hand over."""
    arguments = parse_arguments()
    params = load_params(arguments.params)
    params = replace(params, train=replace(params.train, precision=arguments.precision or params.train.precision))
    rows = arguments.rows or params.train.micro_batch_size
    length = arguments.length or params.train.sequence_length
    if arguments.only:
        print(json.dumps(measure(arguments.only, params, rows, length, arguments.steps)))
        return
    results: dict[str, list[dict[str, list[float]]]] = {"plain": [], "ours": []}
    for _ in range(ROUNDS):
        for what, rounds in results.items():
            command = [sys.executable, __file__, "--only", what, *sys.argv[1:]]
            rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    report(params, rows, length, results)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--rows", type=int, help="rows of the one micro-batch; default: train.micro_batch_size")
    parser.add_argument("--length", type=int, help="tokens in a row; default: train.sequence_length")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: train.precision")
    parser.add_argument("--steps", type=int, default=8, help="measured steps in each of the rounds")
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(what: str, params: Params, rows: int, length: int, count: int) -> dict[str, list[float]]:
    """Seconds of `count` steps after warming up, and the peak memory in GB."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (rows, length + 1))
    batch = tokens[:, :-1], tokens[:, 1:]
    step = (ours if what == "ours" else plain)(params, batch)
    seconds = []
    for number in range(WARMUP + count):
        started = time.perf_counter()
        step()
        if number >= WARMUP:
            seconds.append(time.perf_counter() - started)
    if torch.cuda.is_available():
        return {"seconds": seconds, "memory": [torch.cuda.max_memory_allocated() / 1e9]}
    return {"seconds": seconds, "memory": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]}


def ours(params: Params, batch: Batch) -> Step:
    """The trainer's own step."""
    device = pick_device()
    model = GPT(params.model)
    initialise(model, 0)
    model.activation_checkpointing = params.train.activation_checkpointing
    model.to(device)
    network = torch.compile(model) if params.train.compile else model
    optimizer = make_optimizer(model, params.train)

    def step() -> float:
        result = take_step(network, optimizer, [batch], 1e-4, params.train, World(0, 1, device))  # type: ignore[arg-type]
        return float(result.loss + result.grad_norm)

    return step


def plain(params: Params, batch: Batch) -> Step:
    """What one writes first: the same model in a loop, torch's default AdamW, nothing compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(available_cores())
    model = GPT(params.model)
    initialise(model, 0)
    model.activation_checkpointing = params.train.activation_checkpointing
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs, targets = (torch.from_numpy(array.copy()).to(device) for array in batch)

    def step() -> float:
        optimizer.zero_grad()
        with autocast(device, params.train.precision):
            loss = model(inputs, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach() + norm)

    return step


def report(params: Params, rows: int, length: int, results: dict[str, list[dict[str, list[float]]]]) -> None:
    """Print what was measured."""
    device = pick_device()
    peak = peak_of(device, params.train.precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{params.model.parameters:,} parameters, {rows} x {length} tokens, {params.train.precision}, {name}")
    print(f"torch {torch.__version__}, peak {peak.flops / 1e12:.3f} TFLOP/s ({peak.source})")
    medians = {}
    for what, rounds in results.items():
        seconds = [value for one in rounds for value in one["seconds"]]
        memory = max(value for one in rounds for value in one["memory"])
        medians[what] = statistics.median(seconds)
        rate = rows * length / medians[what]
        mfu = rate * params.model.flops_per_token(length) / peak.flops
        print(
            f"{what:<6}{medians[what] * 1e3:9.1f} ms a step ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}), "
            f"{rate:,.0f} tokens/s, MFU {mfu:.1%}, peak memory {memory:.2f} GB"
        )
    print(f"ours is {medians['plain'] / medians['ours']:.2f} times as fast as the plain loop")


if __name__ == "__main__":
    main()
