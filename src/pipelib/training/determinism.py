"""What could make two runs of the same training differ, fixed."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelib.training.launch.distributed import World
from pipelib.training.params import TrainParams


def set_determinism(params: TrainParams, world: World) -> None:
    """Fix what could make two runs differ: torch's own seed, and the choice of kernels."""
    torch.manual_seed(params.seed)
    on_gpu = world.device.type == "cuda"
    # On a CPU only what Inductor makes of the embedding's gradient is not: threads add to one sum in any order.
    torch.use_deterministic_algorithms(params.deterministic if on_gpu else params.compile)
    # It would fill memory that nothing here reads before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = params.precision == "bf16"
        torch.backends.cudnn.benchmark = False
        if params.compile and params.deterministic:
            import torch._inductor.config as inductor

            inductor.deterministic = True  # no choice of kernels by their time, which differs from run to run


@contextmanager
def gc_at_pauses_only() -> Iterator[None]:
    """Disable automatic garbage collection in this block: it would stop a step to look at every object that torch and the
    compiler made. Those are left out of later searches; validations collect what came since, on all ranks at once.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
