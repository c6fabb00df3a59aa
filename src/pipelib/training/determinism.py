"""Fix everything that could make two runs of the same training differ."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelib.training.launch.distributed import World
from pipelib.training.params import TrainParams


def set_determinism(params: TrainParams, world: World) -> None:
    """Fix torch's global seed and the choice of kernels."""
    torch.manual_seed(params.seed)
    on_gpu = world.device.type == "cuda"
    # On a CPU only Inductor's embedding gradient is not deterministic: its threads add to one sum in any order.
    deterministic = params.deterministic if on_gpu else params.compile
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call below imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)
    # Filling new memory costs time, and nothing here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = params.precision != "fp32"
        torch.backends.cudnn.benchmark = False
        if params.compile:
            import torch._inductor.config as inductor

            # Kernels chosen by measured time vary from run to run.
            inductor.deterministic = params.deterministic


@contextmanager
def gc_at_pauses_only() -> Iterator[None]:
    """Disable automatic garbage collection in this block; validations collect instead, on all ranks at once.

    An automatic collection would interrupt a step to scan every object that torch and the compiler made. Those objects are
    frozen, so that no later collection scans them.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
