"""The benchmarks start, and time what they say they time."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_params import model_params, write_params
from small_project import CHECKOUT
from warm_python import run_python

from pipelib.model.attend import causal
from pipelib.model.families.gpt2 import GPT2
from pipelib.params import load_params
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

BENCH = CHECKOUT / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts(name: str) -> None:
    done = run_python(BENCH / name, "--help", cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_the_memory_arithmetic_is_near_what_a_compiled_step_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import memory

    preset = load_params(CHECKOUT / "presets/gpt2-124m.yaml")
    params = replace(preset, model=replace(preset.model, n_layer=2))  # type: ignore[type-var]
    kept = memory.kept_bytes(params, 64)
    assert memory.estimated_bytes(params, 64) == pytest.approx(sum(kept.values()), rel=0.1)
    assert max(kept, key=lambda name: kept[name]).startswith("mm"), "the product is kept, not the masked copy"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_red_fused__log_softmax__to_copy_mm_2", "fused"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_3", "fused"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_a_kernel_belongs_to_one_class(monkeypatch: pytest.MonkeyPatch, kernel: str, kind: str) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_part

    assert gpu_part.class_of(kernel) == kind


def test_the_rungs_of_the_ladder_compute_one_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rung is faster arithmetic for the same thing: the plain attention is `causal`."""
    monkeypatch.syspath_prepend(str(BENCH))
    import steps

    model = GPT2(model_params(), GPT2_TOKENIZER.size)
    model.initialise(1)
    tokens = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = model.token_losses(inputs, targets).mean().item()
    for attend in (causal, steps.naive):
        assert steps.MeanLoss(model, attend)(inputs, targets).item() == pytest.approx(expected, abs=1e-5)
    write_params(tmp_path)
    params = load_params(tmp_path / "params.yaml")
    for on in ("fp32", "flash attention", "padded vocabulary", "fused AdamW"):
        step = steps.loop_step(params, 2, 16, {on})
        first, second = step(), step()
        assert math.isfinite(second), on
        assert first != second, f"{on} changes no weight"
