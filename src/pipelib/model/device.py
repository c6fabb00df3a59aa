"""The device that a model runs on: which one, what it supports, its precision and its memory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelib.errors import UserError
from pipelib.processes import available_cores, control_groups, keep_freed_memory, positive_int_from_env, system_file

DEVICE = "PIPELIB_DEVICE"
"""The environment variable that chooses the kind of device: cuda, mps or cpu."""


def choose_device(requested: str, *, cuda: bool, mps: bool) -> str:
    """Choose the kind of device: the requested one, else an NVIDIA GPU if torch can use one, else the CPU.

    Apple's GPU (mps) is used on request only, because its results have not been compared with a CPU's.

    Args:
        requested: `$PIPELIB_DEVICE`, maybe empty.

    Raises:
        UserError: the requested kind is unknown, or torch cannot use it here.
    """
    usable = {"cuda": cuda, "mps": mps, "cpu": True}
    if requested and requested not in usable:
        raise UserError(
            f"{DEVICE}={requested} is not cuda, mps or cpu, so no device can be chosen; set one of them, or unset it."
        )
    if requested and not usable[requested]:
        raise UserError(
            f"{DEVICE}={requested}, but torch {torch.__version__} cannot use such a device here, so no model can run; unset "
            "it, or run pipelib doctor, which says what is missing."
        )
    return requested or ("cuda" if cuda else "cpu")


def device_type() -> str:
    """The kind of device that models run on here: see `choose_device`."""
    mps = torch.backends.mps.is_available()
    return choose_device(os.environ.get(DEVICE, ""), cuda=torch.cuda.is_available(), mps=mps)


def gpu_count() -> int:
    """How many NVIDIA GPUs models may run on here, see `choose_device`; `$CUDA_VISIBLE_DEVICES` limits them."""
    return torch.cuda.device_count() if device_type() == "cuda" else 0


def gpu_in_use() -> bool:
    """Whether this process has used an NVIDIA GPU: not if `$PIPELIB_DEVICE` chose another device."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def pick_device(local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """Choose this rank's GPU, or the CPU with this rank's share of the cores as threads.

    The number of threads is fixed, because the last bits of sums on a CPU depend on it; `$PIPELIB_THREADS` sets it.
    """
    cores = max(1, available_cores() // local_world_size)
    # By default each rank's torch.compile starts one worker per core of the machine, more than a container's quota.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, cores)))
    torch.set_num_threads(positive_int_from_env("PIPELIB_THREADS") or cores)
    kind = device_type()
    if kind == "cuda":
        # Both are read once, when CUDA starts. Deterministic cuBLAS needs the first.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Training, validation and scoring allocate blocks of other sizes in turn, which would fragment the memory.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if kind == "cpu":
        keep_freed_memory()
    return torch.device(kind)


def require_support(device: torch.device, precision: str) -> None:
    """Refuse a device on which the first product would fail, or a precision that it only emulates.

    Raises:
        UserError: torch has no code for this GPU, or the GPU has no bf16.
    """
    if device.type == "mps" and precision != "fp32":
        raise UserError(
            f"precision {precision} has not been tried on Apple's GPU, so its results may be wrong; set precision: fp32, or "
            f"{DEVICE}=cpu."
        )
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if not has_code_for(capability, torch.cuda.get_arch_list()):
        raise UserError(
            f"torch {torch.__version__} has no code for {name} (sm_{capability[0]}{capability[1]}), so its first kernel would "
            f"fail; install a torch that was built for it, or set {DEVICE}=cpu."
        )
    if precision == "bf16" and capability < (8, 0):
        raise UserError(
            f"{name} has no bf16 and would emulate it, slowly and without torch.compile; set precision: fp16, or fp32."
        )


def has_code_for(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a GPU of this compute capability can run code that was built for these architectures.

    Args:
        built: torch's list: `sm_80` is machine code, for 8.0 and later 8.x; `compute_90` is compiled at run time, for 9.0 and
            everything later.
    """
    for name in built:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")  # sm_90a: with features of 9.0 alone
        version = int(digits[:-1]), int(digits[-1])
        same_major = version[0] == capability[0] and version <= capability
        if same_major or (kind == "compute" and version <= capability):
            return True
    return False


def unused_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU that torch cannot use although the user has not chosen the CPU.

    Args:
        root: the folder that holds /dev.
    """
    on_purpose = os.environ.get(DEVICE) == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not on_purpose and not torch.cuda.is_available() and (root / "dev/nvidia0").exists()


def device_title(device: torch.device) -> str:
    """The name of a device, for messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions in which matrix products are computed by autocast."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute matrix products in bf16 or fp16 if `precision` says so; change nothing for "fp32". Weights stay fp32."""
    return torch.autocast(device.type, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


@contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """`autocast` without gradients, for evaluation and generation, where shapes change from batch to batch.

    Apple's allocator keeps a block for every shape; they are released at the end.
    """
    with torch.no_grad(), autocast(device, precision), attention_of_any_shape(device):
        yield
    if device.type == "mps":
        torch.mps.empty_cache()


def attention_of_any_shape(device: torch.device) -> AbstractContextManager[object]:
    """On a GPU, leave out cuDNN's attention, which builds a plan for every new shape: in generation, for every token."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(backends, set_priority=True) if device.type == "cuda" else nullcontext()


def exactly(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in 64 bits; on the CPU if its device has no such numbers, as Apple's GPUs."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Free bytes on a GPU; on a CPU, those that the system and this process's control groups allow.

    Args:
        root: where /proc and /sys are.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_meminfo("MemAvailable"), *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group with a limit still allows. Cached files count as free, since the kernel drops them."""
    for group in control_groups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
        ):
            stat = dict(line.split(" ", 1) for line in system_file(group / "memory.stat").splitlines() if " " in line)
            numbers = system_file(group / limit), system_file(group / used), stat.get(cached, "0")
            if all(number.isdecimal() for number in numbers):
                allowed, taken, droppable = map(int, numbers)
                yield max(0, allowed - taken + droppable)


def total_memory(device: torch.device) -> int:
    """Total bytes of a device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo(key: str) -> int:
    """A line of Linux's /proc/meminfo in bytes; on another system, half of all memory."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines[key].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
