"""Time one optimizer step of a parameter file: ours, and a plain PyTorch loop with the same model, in the same run.

    make bench-train                                    params.yaml
    make bench-train ARGS="--params presets/gpt2-124m.yaml --rows 2 --length 512"
    make bench-train ARGS="--ladder"                    build-nanogpt's optimizations one at a time, then ours

Needs torch, numpy and PyYAML only. Each variant runs in its own process, since the memory allocator's settings are per process.
They take turns, so that a noisy machine disturbs all of them equally. `--ranks 2` runs ours on two ranks.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from steps import LADDER, NEEDS_CUDA, ON_A_CPU, SMALL, Ours, Step, plain, rung, write_tokens

from pipelib.model.device import pick_device
from pipelib.params import Params, load_params
from pipelib.training.hardware import peak_of
from pipelib.training.launch.distributed import join_world
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

WARMUP, STEPS_OF_DATA = 3, 8
PARTS = ("data", "forward", "backward", "optimizer", "communication")
Result = dict[str, list[float]]
"""The `seconds` of the steps, the peak `memory` in GB, and for ours the seconds of each part."""


def main() -> None:
    """Measure all variants and print; with --only, measure one variant and print it as JSON."""
    arguments = parse_arguments()
    params = load_params(arguments.params)
    params = replace(params, train=replace(params.train, precision=arguments.precision or params.train.precision))
    if arguments.rehearse:
        arguments.rows, arguments.length, arguments.steps = 4, 128, 2
        params = replace(params, model=replace(params.model, **vars(SMALL)))  # type: ignore[type-var]
        params = replace(params, train=replace(params.train, **ON_A_CPU))
    automatic = params.train.micro_batch_size == "auto"
    rows = arguments.rows or (8 if automatic else params.train.micro_batch_rows(1))
    length = arguments.length or params.train.sequence_length
    if arguments.only:
        measure(arguments.only, params, rows, length, arguments)
        return
    names = [*LADDER, "ours"] if arguments.ladder else ["ours"] if arguments.ranks > 1 else ["plain", "ours"]
    if not arguments.ladder and params.train.deterministic is False:
        names.append("deterministic")
    names = [name for name in names if name in (arguments.variants or names)]
    skipped = {name: NEEDS_CUDA[name] for name in names if name in NEEDS_CUDA and not torch.cuda.is_available()}
    results: dict[str, list[Result]] = {name: [] for name in names if name not in skipped}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), STEPS_OF_DATA * arguments.ranks * rows * length + 1)
        for _ in range(arguments.rounds):
            for name, rounds in results.items():
                rounds.append(run_alone(name, Path(folder), arguments.ranks))
                if arguments.json:  # at once: a run that is cut short has lost nothing
                    print(json.dumps(figures(name, rounds[-1], params, arguments.ranks * rows * length)), flush=True)
    if not arguments.json:
        report(params, rows, length, arguments.ranks, results)
    for name, reason in skipped.items():
        print(f"{name:<18} skipped: {reason}")
    if any("failed" in one for rounds in results.values() for one in rounds):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    parser.add_argument("--rows", type=int, help="rows of the only micro-batch; default: train.micro_batch_size")
    parser.add_argument("--length", type=int, help="tokens in a row; default: train.sequence_length")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: train.precision; the rungs of the ladder have their own"
    )
    parser.add_argument("--steps", type=int, default=8, help="measured steps per round; default: 8")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant, in turn; default: 3")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of ours, without the plain loop; default: 1")
    parser.add_argument(
        "--ladder", action="store_true", help="fp32, TF32, ..., each with everything before it, then ours"
    )
    parser.add_argument(
        "--variants", nargs="+", help="only these of plain, ours, deterministic and the ladder; default: all"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a line of JSON for each variant as soon as it is measured"
    )
    parser.add_argument("--rehearse", action="store_true", help="a small model and few steps: does it run?")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_alone(name: str, tokens: Path, ranks: int) -> Result:
    """Measure one variant in its own processes; the seconds are empty if memory ran out or it failed."""
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *runner, __file__, *sys.argv[1:], "--only", name, "--tokens", str(tokens)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if ranks > 1 else os.environ  # ranks set their own
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "OutOfMemoryError" in done.stderr:
        return {"seconds": [], "memory": []}
    if done.returncode:
        print(f"{name} failed:\n{done.stderr}", file=sys.stderr, flush=True)
        return {"seconds": [], "memory": [], "failed": []}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(name: str, params: Params, rows: int, length: int, arguments: argparse.Namespace) -> None:
    """Print as JSON the seconds of steps after warming up, the peak memory, and for ours the parts."""
    if name not in ("ours", "deterministic"):
        step = plain(params, rows, length) if name == "plain" else rung(params, rows, length, name)
        print(json.dumps(timed(step, arguments.steps)))
        return
    if name == "deterministic":
        params = replace(params, train=replace(params.train, deterministic=True))
    with join_world() as world:
        ours = Ours(params, rows, length, arguments.tokens, world)
        result = timed(ours.step, arguments.steps)
        parts = ours.parts(arguments.steps)
        if world.is_main:
            print(json.dumps({**result, **{part: [parts.get(part, 0.0)] for part in PARTS}}))


def timed(step: Step, count: int) -> Result:
    """Seconds of `count` steps after warming up, and the peak memory in GB."""
    seconds = []
    for number in range(WARMUP + count):
        started = time.perf_counter()
        step()
        if number >= WARMUP:
            seconds.append(time.perf_counter() - started)
    if torch.cuda.is_available():
        return {"seconds": seconds, "memory": [torch.cuda.max_memory_allocated() / 1e9]}
    return {"seconds": seconds, "memory": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]}


def figures(name: str, result: Result, params: Params, tokens: int) -> dict[str, object]:
    """One variant's figures, for a line of JSON."""
    if not result["seconds"]:
        return {"variant": name, "problem": "failed" if "failed" in result else "out of memory"}
    median = statistics.median(result["seconds"])
    flops = params.model.flops_per_token(GPT2_TOKENIZER.size, params.train.sequence_length)
    return {
        "variant": name,
        "ms": round(median * 1e3, 2),
        "tokens_per_second": round(tokens / median),
        "teraflops": round(tokens / median * flops / 1e12, 2),
        "memory_gb": round(max(result["memory"]), 3),
        "parts_ms": {part: round(result[part][0] * 1e3, 2) for part in PARTS if part in result},
    }


def report(params: Params, rows: int, length: int, ranks: int, results: dict[str, list[Result]]) -> None:
    """Print what was measured."""
    device, model = pick_device(0, ranks), params.model
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = peak_of(device, params.train.precision).times(ranks)
    palm, nanogpt = (
        model.flops_per_token(GPT2_TOKENIZER.size, length),
        model.nanogpt_flops_per_token(GPT2_TOKENIZER.size, length),
    )
    print(
        f"{model.parameters(GPT2_TOKENIZER.size):,} parameters, {rows} x {length} tokens per rank, {ranks} rank(s), {name}"
    )
    print(f"torch {torch.__version__}, compile: {params.train.compile}, {params.train.precision}")
    print(f"peak {peak.flops / 1e12:.3f} TFLOP/s ({peak.source}), also for rungs of other precision")
    print(
        f"MFU: PaLM counts {palm / 1e6:.1f} MFLOP per token (6 per weight of a matrix product, 12·L·H·Q·T for attention), "
        f"nanoGPT {nanogpt / 1e6:.1f} (6 per parameter without the positions, the same for attention)"
    )
    medians: dict[str, float] = {}
    for what, rounds in results.items():
        seconds = [value for one in rounds for value in one["seconds"]]
        if not seconds:
            print(f"{what:<18} {'failed' if 'failed' in rounds[-1] else 'out of memory'}")
            continue
        before, medians[what] = next(reversed(medians.values()), None), statistics.median(seconds)
        rate = ranks * rows * length / medians[what]
        print(
            f"{what:<18}{medians[what] * 1e3:9.1f} ms per step ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}), "
            f"{rate:,.0f} tokens/s, MFU {rate * palm / peak.flops:.1%} PaLM, {rate * nanogpt / peak.flops:.1%} nanoGPT, "
            f"peak memory {max(value for one in rounds for value in one['memory']):.2f} GB"
            + (f", {before / medians[what]:.2f} times the line above" if before else "")
        )
        if "forward" in rounds[0]:
            parts = {part: statistics.median(one[part][0] for one in rounds) for part in PARTS}
            whole = sum(parts.values())
            print(" " * 18 + ", ".join(f"{part} {value / whole:.1%}" for part, value in parts.items()))
    if medians.keys() >= {"plain", "ours"}:
        print(f"ours is {medians['plain'] / medians['ours']:.2f} times as fast as the plain loop")
    if medians.keys() >= {"deterministic", "ours"}:
        print(f"train.deterministic costs {medians['deterministic'] / medians['ours'] - 1:.1%} of the time")


if __name__ == "__main__":
    main()
