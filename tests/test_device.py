"""Which device a model runs on, what it supports, and what is said where it cannot be used."""

import itertools
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_params import model_params
from small_project import CHECKOUT
from small_run import differing, new_model
from small_vocabulary import TOKENIZER
from warm_python import run_python

from pipelib.errors import UserError
from pipelib.model import device as module
from pipelib.model.device import (
    attention_of_any_shape,
    choose_device,
    exactly,
    has_code_for,
    inference,
    pick_device,
    require_support,
    unused_gpu,
)
from pipelib.training import hardware
from pipelib.training.hardware import peak_of
from pipelib.training.initial_weights import initial_model
from pipelib.training.inputs import RANDOM_WEIGHTS
from pipelib.training.launch.distributed import join_world
from pipelib.training.launch.machines import process_count, require_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that torch believes in; change its properties before they are asked for."""
    properties: dict[str, Any] = {"name": "NVIDIA H100 80GB HBM3", "capability": (9, 0), "built": ["sm_80", "sm_90"]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: properties["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: properties["capability"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: properties["built"])
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return properties


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("requested", "cuda", "mps"),
    list(itertools.product(["", "cuda", "mps", "cpu", "gpu"], [False, True], [False, True])),
)
def test_the_choice_of_the_device(requested: str, cuda: bool, mps: bool) -> None:
    expected = {
        "": "cuda" if cuda else "cpu",
        "cuda": "cuda" if cuda else None,
        "mps": "mps" if mps else None,
        "cpu": "cpu",
    }
    kind = expected.get(requested)
    if kind:
        assert choose_device(requested, cuda=cuda, mps=mps) == kind
        return
    words = "is not cuda, mps or cpu" if requested == "gpu" else "torch .* cannot use such a device here"
    with pytest.raises(UserError, match=f"PIPELIB_DEVICE={requested}.*{words}"):
        choose_device(requested, cuda=cuda, mps=mps)


def test_a_gpu_is_set_up_before_cuda_starts(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(module, "available_cores", lambda: 16)
    monkeypatch.delenv("PIPELIB_THREADS")
    before = torch.get_num_threads()
    assert pick_device(3, 4) == torch.device("cuda", 3)
    assert torch.get_num_threads() == 4, "else each rank would draw the initial weights on one thread"
    torch.set_num_threads(before)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "4"


def test_the_cpu_can_be_chosen_beside_gpus(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    assert process_count() == 4
    monkeypatch.setenv("PIPELIB_DEVICE", "cpu")
    assert process_count() == 1
    before = torch.get_num_threads()
    assert pick_device() == torch.device("cpu")
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_75", "sm_80"], True),  # an 8.0 binary runs on 8.9
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_120"], False),  # V100 and torch for CUDA 13
        ((12, 0), ["sm_80", "compute_90"], True),  # compiled at run time
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100", "sm_120"], True),
        ((8, 0), [], False),
    ],
)
def test_which_gpus_a_build_runs_on(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert has_code_for(capability, built) == runs


def test_a_gpu_without_code_is_refused_before_its_first_kernel(gpu: dict[str, Any]) -> None:
    require_support(CUDA, "bf16")
    gpu |= {"name": "Tesla V100-SXM2-16GB", "capability": (7, 0)}
    with pytest.raises(
        UserError, match=r"has no code for Tesla V100-SXM2-16GB \(sm_70\), so its first kernel would fail"
    ):
        require_support(CUDA, "fp32")


def test_bf16_is_refused_where_it_is_emulated(gpu: dict[str, Any]) -> None:
    gpu |= {"name": "Tesla T4", "capability": (7, 5), "built": ["sm_75"]}
    with pytest.raises(UserError, match=r"Tesla T4 has no bf16 and would emulate it, .* precision: fp16, or fp32"):
        require_support(CUDA, "bf16")
    require_support(CUDA, "fp16")
    require_support(CUDA, "fp32")


def test_apples_gpu_takes_fp32_alone() -> None:
    mps = torch.device("mps")
    require_support(mps, "fp32")
    with pytest.raises(UserError, match=r"precision bf16 has not been tried on Apple's GPU"):
        require_support(mps, "bf16")


class OnMps:
    """A tensor of Apple's GPU, which has no 64-bit numbers."""

    device = torch.device("mps")

    def cpu(self) -> torch.Tensor:
        return torch.ones(2)

    def double(self) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_64_bit_sums_are_made_on_the_cpu_for_apples_gpu() -> None:
    assert exactly(OnMps()).dtype == torch.float64  # type: ignore[arg-type]
    assert exactly(torch.ones(2)).dtype == torch.float64


def test_apples_memory_is_released_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append(torch.is_grad_enabled()))
    with inference(torch.device("mps"), "fp32"):
        assert not torch.is_grad_enabled()
    assert released == [True]


def test_inference_leaves_cudnns_attention_to_training(gpu: dict[str, Any]) -> None:  # noqa: ARG001
    def allowed() -> tuple[bool, bool, bool]:
        backends = torch.backends.cuda
        return backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled()

    before = allowed()
    with inference(CUDA, "fp32"):
        assert allowed() == (True, True, False)
    assert allowed() == before
    with attention_of_any_shape(CUDA):
        assert allowed() == (True, True, False)
    assert allowed() == before


# ---- A GPU that torch cannot use -------------------------------------------------------------------------------------


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with a driver that is too old."""
    monkeypatch.setattr("pipelib.training.launch.machines.unused_gpu", lambda: True)


@pytest.mark.usefixtures("unusable")
def test_a_training_for_a_gpu_is_not_begun_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"torch .* cannot use it, so training with precision bf16 .*; run pipelib doctor"
    ):
        require_gpu("bf16")
    require_gpu("fp32")
    assert "warning: there is an NVIDIA GPU, but torch" in capsys.readouterr().err


def test_a_gpu_is_unused_only_against_the_users_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not unused_gpu(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert unused_gpu(tmp_path)
    for name, value in (("PIPELIB_DEVICE", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not unused_gpu(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not unused_gpu(tmp_path)


# ---- Peaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A40", 149.7),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None
) -> None:
    gpu["name"] = name
    monkeypatch.setattr("pipelib.training.hardware._measured_matmul", lambda *_: 1e12)
    peak = peak_of(CUDA, "bf16")
    assert peak.flops == (teraflops or 1) * 1e12
    assert peak.source.startswith("data sheet" if teraflops else "measured")


def test_an_unknown_device_is_measured_on_random_numbers_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(step=3.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    products: list[torch.Tensor] = []
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a) or multiply(a, b))
    monkeypatch.setattr("pipelib.training.hardware.MEASURE_SECONDS", 7.0)
    monkeypatch.setattr("pipelib.training.hardware._measured_matmul", hardware._measured_matmul.__wrapped__)
    assert peak_of(torch.device("cpu"), "fp32").flops == pytest.approx(2 * 1024**3 / 3)
    assert len(products) == 2
    assert products[0].std() == pytest.approx(1, abs=0.01)


# ---- Windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry", ["stages.download", "stages.tokenize", "stages.train", "stages.evaluate", "pipelib.cli.main", "pipelib"]
)
def test_on_windows_every_entry_point_names_wsl2(entry: str) -> None:
    done = run_python("-c", f"import sys; sys.platform = 'win32'; import {entry}", cwd=CHECKOUT)
    assert done.returncode == 1
    assert done.stderr.startswith("pipelib does not run on Windows itself")
    assert "WSL2" in done.stderr
    assert "Traceback" not in done.stderr


# ---- Ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "minutes"), [(None, 30), ("7", 7)])
def test_ranks_on_gpus_connect_first_and_wait_as_long_as_is_set(
    gpu: dict[str, Any],  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    setting: str | None,
    minutes: int,
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    if setting:
        monkeypatch.setenv("PIPELIB_TIMEOUT", setting)
    with join_world() as world:
        assert (world.rank, world.world_size, world.device) == (3, 4, torch.device("cuda", 1))
    assert asked == {
        "backend": "nccl", "timeout": timedelta(minutes=minutes), "device_id": torch.device("cuda", 1),
    }  # fmt: skip
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor"), "the temporary folder may be lost"


def test_initial_weights_are_drawn_once_and_by_one_rank() -> None:
    """torch's layers would draw weights that nothing uses, and every rank would draw what the first one sends them."""
    before = torch.get_rng_state()
    drawn, zero = (initial_model(model_params(), TOKENIZER, 7, RANDOM_WEIGHTS, draw=draw) for draw in (True, False))
    assert torch.equal(torch.get_rng_state(), before)
    assert differing(drawn, new_model(7)) == []
    assert not any(tensor.any() for tensor in zero.state_dict().values())
