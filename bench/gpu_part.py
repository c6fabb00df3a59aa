"""One measurement of `bench/gpu.py`, in a process of its own; see there. It prints lines of JSON.

python bench/gpu_part.py ab base
python bench/gpu_part.py run --rehearse
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from steps import ON_A_CPU, PRESETS, SMALL, Ours, write_tokens

from pipelib.errors import UserError
from pipelib.evaluation.loss import summed_loss
from pipelib.model.decoder import Decoder
from pipelib.model.device import autocast, inference, pick_device
from pipelib.model.generate import generate
from pipelib.params import Params, load_params
from pipelib.tokens.loader import validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD, read_manifest
from pipelib.tracking.run import NullRun
from pipelib.training.build import build_trainer
from pipelib.training.hardware import peak_gpu_memory, peak_of
from pipelib.training.launch.distributed import World, join_world
from pipelib.training.memory import Footprint
from pipelib.training.params import ExperimentParams
from pipelib.training.pretraining import Pretraining
from pipelib.training.schedule import Cadence
from pipelib.training.training_log import MainLog
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

NONE = ExperimentParams(bf16_residual=False, separate_qkv=False, max_autotune=False)


@dataclass(frozen=True)
class Variant:
    """What differs from the preset."""

    environment: dict[str, str]
    train: dict[str, Any]
    rows: int = 64


AB = {
    "base": Variant({}, {}),
    "mask_in_place": Variant({}, {}),
    "flash": Variant({"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}, {}),
    "bf16_residual": Variant({}, {"precision": "bf16", "experiments": replace(NONE, bf16_residual=True)}),
    "separate_qkv": Variant({}, {"experiments": replace(NONE, separate_qkv=True)}),
    "no_expandable_segments": Variant({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, {}),
    "rows_32": Variant({}, {}, rows=32),
    "rows_128": Variant({}, {}, rows=128),
    "deterministic": Variant({}, {"deterministic": True}),
    "coordinate_descent": Variant({"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"}, {}),
    "max_autotune": Variant({}, {"experiments": replace(NONE, max_autotune=True)}),
}
"""Steps of 124M. `mask_in_place` writes the logits once more, as versions before November 2026 did."""
DDP = ("ddp_optimizer", "no_optimization")
CAPPED = ("gpt2-124m", "gpt2-350m", "gpt2-1558m")
CAP = 24 * 10**9
"""Bytes of the cards that the part `memory` stands for."""
KERNELS = {
    "communication": ("nccl",), "fused": ("triton",), "attention": ("flash", "cudnn", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "mm"), "copies": ("memcpy", "memset", "copy"),
}  # fmt: skip
"""Words in the names of kernels. The first class counts: a fused kernel's name lists what it fuses, `mm` and `copy` too."""


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("profile", "ab", "ddp", "run", "memory"))
    parser.add_argument("variant", nargs="?", default="base", help="of `ab`, `ddp` or `memory`")
    parser.add_argument("--rehearse", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.rehearse)
        return
    os.environ.update(AB[arguments.variant].environment if arguments.part == "ab" else {})
    with tempfile.TemporaryDirectory() as folder:
        measure: Callable[[str, Path, bool], Iterator[dict[str, Any]]] = globals()[f"measure_{arguments.part}"]
        for figures in measure(arguments.variant, Path(folder), arguments.rehearse):
            print(json.dumps({"part": arguments.part, "variant": arguments.variant, **figures}), flush=True)


# ---- Steps -----------------------------------------------------------------------------------------------------------


def small_if(rehearse: bool, preset: str = "gpt2-124m", **changes: Any) -> Params:
    """A preset; in a rehearsal with a small model that compiles only on a GPU."""
    params = load_params(PRESETS / f"{preset}.yaml")
    if rehearse:
        params = replace(params, model=replace(params.model, **vars(SMALL)))  # type: ignore[arg-type]
        changes = {**ON_A_CPU, **changes}
    return replace(params, train=replace(params.train, **changes))


def ours(params: Params, rows: int, folder: Path, world: World, rehearse: bool, micro_steps: int = 1) -> Ours:
    """The trainer's step on random tokens."""
    rows, length = (min(rows, 4), 128) if rehearse else (rows, 1024)
    if not (folder / "manifest.json").exists():
        write_tokens(folder, 16 * rows * length * micro_steps + 1)
    return Ours(params, rows, length, folder, world, micro_steps)


def milliseconds(step: Callable[[], float], count: int) -> dict[str, Any]:
    """Times of steps after three warm-up steps, and the memory."""
    seconds = []
    for number in range(3 + count):
        started = time.perf_counter()
        step()  # returns a number from the device, so it waits
        if number >= 3:
            seconds.append(time.perf_counter() - started)
    memory = {}
    if torch.cuda.is_available():
        memory = {
            "allocated_gb": gb(torch.cuda.max_memory_allocated()),
            "reserved_gb": gb(torch.cuda.max_memory_reserved()),
        }
    return {"ms": round(statistics.median(seconds) * 1e3, 2), "ms_min": round(min(seconds) * 1e3, 2), **memory}


def gb(count: int) -> float:
    """Bytes in units of 10^9."""
    return round(count / 1e9, 3)


def measure_ab(variant: str, folder: Path, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Time of a step with one setting changed; for `base` also what is outside of a step."""
    params = small_if(rehearse, **AB[variant].train)
    masked = mock.patch.object(Decoder, "logits", masked_in_place) if variant == "mask_in_place" else nullcontext()
    with masked, join_world() as world:
        steps = ours(params, AB[variant].rows, folder, world, rehearse)
        found = milliseconds(steps.step, 2 if rehearse else 6)
        yield {**found, "tokens_per_second": round(steps.params.global_batch_tokens / found["ms"] * 1e3)}
        if variant == "base":
            yield from outside_of_a_step(steps, folder)


def masked_in_place(self: Decoder, hidden: Tensor) -> Tensor:
    """`Decoder.logits` as it was."""
    logits = F.linear(hidden, self.head)
    logits[..., self.vocab_size :] = -float("inf")
    return logits


def outside_of_a_step(steps: Ours, folder: Path) -> Iterator[dict[str, Any]]:
    """One validation batch, compiled or not, and 64 tokens of text, with cuDNN's attention or without."""
    model, params = steps.objective.model, steps.params
    batch = next(
        iter(validation_batches(folder / VALIDATION_SHARD, params.sequence_length, params.micro_batch_rows(1), None))
    )
    for name, losses in (("eager", model.token_losses), ("compiled", torch.compile(model.token_losses, dynamic=False))):
        if name == "compiled" and not params.compile:
            continue
        summed_loss(model, [batch], params.precision, losses)
        started = time.perf_counter()
        summed_loss(model, [batch], params.precision, losses)
        yield {"validation_batch": name, "ms": round((time.perf_counter() - started) * 1e3, 1)}
    for name, kernels in (("cudnn first", autocast), ("as in samples", inference)):
        for number in ("cold", "warm"):
            started = time.perf_counter()
            with kernels(model.device, params.precision):
                generate(model, [[GPT2_TOKENIZER.end_token_id]], 64, seed=number == "warm")
            yield {"generate_64_tokens": name, "run": number, "ms": round((time.perf_counter() - started) * 1e3, 1)}


def measure_profile(variant: str, folder: Path, rehearse: bool) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """The time of three steps by class of kernel, and how long the device was idle."""
    with join_world() as world:
        steps = ours(small_if(rehearse), 64, folder, world, rehearse)
        for _ in range(3):
            steps.step()
        started = time.perf_counter()
        with torch.profiler.profile() as profile:
            for _ in range(3):
                steps.step()
        wall = time.perf_counter() - started
    on_gpu = world.device.type == "cuda"
    # On a GPU kernels alone count: the operations that launched them have the same time once more.
    events = [event for event in profile.key_averages() if (event.device_type == DeviceType.CUDA) == on_gpu]
    seconds = {event: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 for event in events}
    classes: Counter[str] = Counter()
    for event, value in seconds.items():
        classes[class_of(event.key)] += value
    for name, value in classes.most_common():
        yield {"class": name, "ms_per_step": round(value / 3 * 1e3, 2)}
    idle = round(1 - sum(seconds.values()) / wall, 4) if on_gpu else None
    yield {"idle_share": idle, "ms_per_step": round(wall / 3 * 1e3, 2)}
    for event in sorted(events, key=lambda event: -seconds[event])[:25]:
        yield {"kernel": event.key[:100], "calls": event.count, "ms_per_step": round(seconds[event] / 3 * 1e3, 3)}


def class_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "other")


# ---- Several ranks ---------------------------------------------------------------------------------------------------


class OneOfOne(World):
    """One rank that is wrapped as one of several would be."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """See `World`."""
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def measure_ddp(variant: str, folder: Path, rehearse: bool) -> Iterator[dict[str, Any]]:
    """What each of several GPUs runs: DDP around the compiled network, with 1 and 4 micro-steps."""
    if variant == "no_optimization":
        torch._dynamo.config.optimize_ddp = "no_optimization"  # type: ignore[assignment]
    with one_of_one(folder) as world:
        for micro_steps in (1, 4):
            torch._dynamo.reset()
            steps = ours(small_if(rehearse), 64, folder / str(micro_steps), world, rehearse, micro_steps)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            found = milliseconds(steps.step, 2 if rehearse else 6)
            yield {
                "micro_steps": micro_steps,
                **found,
                "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
            }


@contextmanager
def one_of_one(folder: Path) -> Iterator[World]:
    """A process group of this process alone."""
    device = pick_device()
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1,
        device_id=device if on_gpu else None,
    )  # fmt: skip
    yield OneOfOne(0, 1, device)
    dist.destroy_process_group()


# ---- A training ------------------------------------------------------------------------------------------------------


def training(rehearse: bool) -> tuple[Params, Cadence, int]:
    """A short training, its cadence, and the step at which it is stopped."""
    if rehearse:
        small = {
            "max_tokens": 12 * 1024, "global_batch_tokens": 1024, "sequence_length": 128, "micro_batch_size": 4,
            "warmup_steps": 2, "validate_every": 6, "validate_tokens": 1024, "max_epochs": 10.0, "sample_prompts": (),
            "deterministic": True, "hellaswag_every": None,
        }  # fmt: skip
        return small_if(True, **small), Cadence(1, 4), 7
    real = {
        "max_tokens": 120 * 524_288, "warmup_steps": 20, "validate_every": 60, "max_epochs": 10.0, "sample_prompts": (),
        "hellaswag_every": None, "deterministic": True,
    }  # fmt: skip
    return small_if(False, **real), Cadence(10, 40), 90


def train(folder: Path, rehearse: bool) -> None:
    """Train in `folder`, and say what it took; a signal stops it."""
    params, cadence, _ = training(rehearse)
    tokens, train_params = folder.parent / "tokens", params.train
    with join_world() as world:
        flops = params.model.flops_per_token(GPT2_TOKENIZER.size, train_params.sequence_length)
        log = MainLog(folder, NullRun(), train_params, flops, lambda: peak_of(world.device, train_params.precision))
        manifest = read_manifest(tokens)
        started = time.perf_counter()
        trainer = build_trainer(Pretraining(params.model, tokens, manifest), train_params, cadence, folder, world, log)
        built = time.perf_counter() - started
        validation = 0.0
        measure = trainer.validation.measure

        def timed(model: Decoder) -> Any:
            nonlocal validation
            began = time.perf_counter()
            loss = measure(model)
            validation += time.perf_counter() - began
            return loss

        trainer.validation.measure = timed  # type: ignore[method-assign]
        steps = train_params.max_steps - trainer.state.step
        try:
            trainer.run()
        except UserError as stopped:
            print(json.dumps({"stopped": str(stopped)[:60]}), flush=True)
            return
        whole = time.perf_counter() - started
    estimate = Footprint(params.model, GPT2_TOKENIZER.size, train_params).memory(train_params.micro_batch_rows(1)).total
    figures = {
        "steps": steps,
        "tokens_per_second_of_steps": round(log.throughput.rate(log.throughput.whole)),
        "tokens_per_second_of_all": round(steps * train_params.global_batch_tokens / whole),
        "build_seconds": round(built, 1),
        "validation_seconds": round(validation, 2),
        "data_wait_ms": round(log.throughput.whole.wait_ms, 3),
        "peak_gb": gb(peak_gpu_memory()),
        "estimated_gb": gb(estimate),
    }
    print(json.dumps(figures), flush=True)


def measure_run(variant: str, folder: Path, rehearse: bool) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """Train; train again, stopped by SIGTERM and resumed; the curves must have the same bytes."""
    params, _, stop_at = training(rehearse)
    write_tokens(folder / "tokens", max(params.train.max_tokens // 2, params.train.validate_tokens) + 1)
    for name in ("whole", "stopped", "stopped"):
        (folder / name).mkdir(exist_ok=True)
        first = name == "stopped" and not (folder / name / "checkpoints").exists()
        small = ["--rehearse"] if rehearse else []
        command = [sys.executable, "-u", __file__, "run", "--train", str(folder / name), *small]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while first and process.poll() is None:
            curve = folder / name / "train.csv"
            if curve.exists() and curve.read_text().count("\n") > stop_at:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        said, _ = process.communicate()
        assert first or process.returncode == 0, f"{name}: {said}"
        yield {"run": name, "stopped_at": stop_at if first else None, "status": process.returncode}
        for line in said.splitlines():
            if line.startswith("{"):
                yield {"run": name, **json.loads(line)}
    whole, resumed = ((folder / name / "train.csv").read_bytes() for name in ("whole", "stopped"))
    assert whole == resumed, "the resumed training has other losses than the whole one"
    yield {"resumed_curve_equals_the_whole_one": True}


def measure_memory(variant: str, folder: Path, rehearse: bool) -> Iterator[dict[str, Any]]:
    """The rows that `micro_batch_size: auto` finds under a cap, and whether two micro-steps of them fit."""
    params, device = (
        small_if(rehearse, preset=variant, micro_batch_size="auto", sample_prompts=(), hellaswag_every=None),
        pick_device(),
    )
    cap = 2 * 10**9 if rehearse else CAP
    length = 128 if rehearse else params.train.sequence_length
    rows = 16 if rehearse else 64
    batch = {
        "sequence_length": length,
        "global_batch_tokens": rows * length,
        "max_tokens": 2 * rows * length,
        "warmup_steps": 0,
    }
    params = replace(params, train=replace(params.train, **batch, validate_tokens=length, max_epochs=10.0))
    write_tokens(folder / "tokens", 2 * rows * length + 1)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, cap / torch.cuda.get_device_properties(device).total_memory)
        )
    with mock.patch("pipelib.training.memory.free_memory", return_value=cap), join_world() as world:
        log = MainLog(folder, NullRun(), params.train, 1, lambda: peak_of(world.device, "fp32"))
        manifest = read_manifest(folder / "tokens")
        task = Pretraining(params.model, folder / "tokens", manifest)
        trainer = build_trainer(task, params.train, Cadence(10**6, 10**6), folder, world, log)
        found = trainer.params.micro_batch_rows(1)
        estimate = Footprint(params.model, GPT2_TOKENIZER.size, params.train).memory(found).total
        yield {"rows": found, "estimated_gb": gb(estimate), "cap_gb": gb(cap)}
        trainer.run()
        yield {"rows": found, "peak_gb": gb(peak_gpu_memory()), "steps": trainer.state.step}


if __name__ == "__main__":
    main()
