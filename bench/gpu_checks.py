"""Is training correct on this GPU? The checks of `bench/gpu.py`, which also run on a CPU where they make sense there.

    python bench/gpu_checks.py                 all checks, about five minutes with the compiler's cache empty
    python bench/gpu_checks.py --rehearse      on a CPU: the checks that make sense there

Needs torch, numpy and PyYAML only. Exit status 1 if a check failed.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from steps import ON_A_CPU, PRESETS, SMALL, Ours, write_tokens

from pipelib.errors import UserError
from pipelib.model.device import autocast, pick_device
from pipelib.model.families.gpt2 import GPT2
from pipelib.params import Params, load_params
from pipelib.tokens.shards import read_manifest
from pipelib.tracking.run import NullRun
from pipelib.training.build import build_trainer
from pipelib.training.checkpoint import Checkpoints
from pipelib.training.hardware import Peak
from pipelib.training.launch.distributed import World, join_world
from pipelib.training.objectives import NextToken
from pipelib.training.optimizer import make_optimizer
from pipelib.training.params import TrainParams
from pipelib.training.pretraining import Pretraining
from pipelib.training.schedule import Cadence
from pipelib.training.training_log import MainLog
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

PRESET = PRESETS / "gpt2-124m.yaml"


def main() -> None:
    """Run the checks, and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="only the checks that make sense on a CPU")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train_in(arguments.train, training())
        return
    checks = [resume_is_exact, not_finite_changes_nothing, too_large_a_micro_batch_is_named]
    if not arguments.rehearse:
        checks += [attention_is_fused, steps_do_not_wait, a_micro_batch_is_found, checkpoints_stay_out_of_the_way]
    failed = [check.__name__ for check in checks if not passes(check)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def passes(check: Callable[[Path], str]) -> bool:
    """Run a check in a folder with tokens, and print the result."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "tokens", 200_000)
        try:
            said = check(Path(folder))
        except Exception:
            traceback.print_exc()
            print(f"FAILED  {check.__name__}", flush=True)
            return False
    print(f"ok      {check.__name__.replace('_', ' ')}: {said}", flush=True)
    return True


def training(**changes: object) -> TrainParams:
    """The preset's training made small: twenty steps, deterministic, compiled if there is a GPU."""
    small = {
        "max_tokens": 20 * 1024, "global_batch_tokens": 1024, "sequence_length": 128, "micro_batch_size": 4,
        "warmup_steps": 4, "max_epochs": 10.0, "deterministic": True, "validate_every": 10, "validate_tokens": 1024,
        "hellaswag_every": None, "sample_prompts": (), **ON_A_CPU,
    }  # fmt: skip
    return replace(load_params(PRESET).train, **{**small, **changes})  # type: ignore[arg-type]


def train_in(folder: Path, params: TrainParams) -> GPT2:
    """Train on `folder/tokens`, with a checkpoint every ten steps."""
    with join_world() as world:
        log = MainLog(folder, NullRun(), params, 1, lambda: Peak(1e12, ""))
        tokens = folder / "tokens"
        task = Pretraining(SMALL, tokens, read_manifest(tokens))
        return build_trainer(task, params, Cadence(5, 10), folder, world, log).run()


def resume_is_exact(folder: Path) -> str:
    """A run of twenty steps, and a new process that resumes at step 10, end with the same bits."""
    last, states = folder / "checkpoints/step_00000020", []
    for _ in range(2):
        done = subprocess.run([sys.executable, __file__, "--train", str(folder)], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        states.append(torch.load(last / "state.pt", weights_only=True)["model"])
        shutil.rmtree(last)
    differing = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not differing, f"different bits in {differing}"
    return f"{len(states[0])} tensors after 10 steps, compile: {training().compile}"


def not_finite_changes_nothing(folder: Path) -> str:
    """A step with a NaN loss leaves weights and moments unchanged."""
    ours = ours_in(folder)
    ours.step()
    before = [tensor.clone() for tensor in weights_and_moments(ours)]
    poisoned = ours.loader.micro_batches(9)
    forward = NextToken.forward
    NextToken.forward = lambda self, *batch: forward(self, *batch) * float("nan")  # type: ignore[method-assign]
    try:
        torch._dynamo.reset()
        result = ours.step_on(poisoned, 1e-2)
    finally:
        NextToken.forward = forward  # type: ignore[method-assign]
        torch._dynamo.reset()
    assert not result.loss.isfinite(), "the step was not poisoned"
    after = weights_and_moments(ours)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    return f"{len(before)} tensors"


def weights_and_moments(ours: Ours) -> list[torch.Tensor]:
    """All tensors that a step changes."""
    moments = [entry for state in ours.optimizer.state_dict()["state"].values() for entry in state.values()]
    return [*ours.network.state_dict().values(), *moments]


def too_large_a_micro_batch_is_named(folder: Path) -> str:
    """The message for running out of memory names a micro-batch that would fit."""
    hidden = GPT2.hidden

    def too_much(self: GPT2, inputs: torch.Tensor, *others: Any) -> torch.Tensor:
        torch.empty(2**50, device=inputs.device)
        return hidden(self, inputs, *others)

    GPT2.hidden = too_much  # type: ignore[method-assign]
    said = "no error"
    try:
        train_in(folder, training(compile=False))
    except UserError as error:
        said = str(error)
    finally:
        GPT2.hidden = hidden  # type: ignore[method-assign]
    assert "train.micro_batch_size: 2 would fit" in said, said
    return said


def attention_is_fused(_: Path) -> str:
    """Attention runs in a fused kernel, which does not store the matrix of scores."""
    torch.use_deterministic_algorithms(False)  # as the presets train
    device = pick_device()
    model, tokens = GPT2(SMALL, GPT2_TOKENIZER.size).to(device), torch.zeros(8, 128, dtype=torch.long, device=device)
    with torch.profiler.profile() as profile, autocast(device, "bf16"):
        NextToken(model)(tokens, tokens).backward()
    used = {event.key for event in profile.key_averages() if event.key.startswith("aten::_scaled_dot_product")}
    assert any("flash" in name or "cudnn" in name for name in used), used
    return ", ".join(sorted(used))


def steps_do_not_wait(folder: Path) -> str:
    """A step never waits for the device, with deterministic kernels or without; torch raises if it does."""
    for deterministic in (True, False):
        steps_of(ours_in(folder, deterministic=deterministic))
    return "5 steps, with deterministic kernels and without"


def steps_of(ours: Ours) -> None:
    """Take five steps; torch raises if one waits for the device."""
    for _ in range(3):
        ours.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 8):
            batches = ours.loader.micro_batches(number)
            result = ours.step_on(batches)
            torch.cat((result.rank_losses, torch.stack((result.grad_norm, result.stop))))  # the same as Guards.note
    finally:
        torch.cuda.set_sync_debug_mode("default")


def a_micro_batch_is_found(folder: Path) -> str:
    """`micro_batch_size: auto` finds a size and trains."""
    train_in(folder, training(micro_batch_size="auto"))
    return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB taken"


def checkpoints_stay_out_of_the_way(folder: Path) -> str:
    """The time that a checkpoint of the 124M model stops training, once its host memory is allocated."""
    model = GPT2(load_params(PRESET).model, GPT2_TOKENIZER.size).to(pick_device())
    optimizer = make_optimizer(model, training())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1e-4, torch.tensor(True, device=next(model.parameters()).device))
    seconds = []
    with Checkpoints(folder / "stall", {}) as checkpoints:
        for step in range(1, 5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            checkpoints.save(step, {"model": model, "optimizer": optimizer}, {})
            seconds.append(time.perf_counter() - started)
            checkpoints.wait()
    return f"{seconds[0] * 1e3:.0f} ms the first time, then {statistics.median(seconds[1:]) * 1e3:.0f} ms (goal: 50)"


def ours_in(folder: Path, **changes: object) -> Ours:
    """The trainer's step on the small model."""
    params: Params = load_params(PRESET)
    params = replace(params, model=replace(params.model, **vars(SMALL)), train=training(**changes))
    return Ours(params, 4, 128, folder / "tokens", World(0, 1, pick_device()))


if __name__ == "__main__":
    main()
