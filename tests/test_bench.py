"""The benchmarks start, and time what they say they time."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_project import CHECKOUT, write_params
from small_run import model_params, one_thread  # noqa: F401 (a fixture)

from pipelib.model.attend import causal
from pipelib.model.families.gpt2 import GPT2
from pipelib.params import load_params
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

BENCH = CHECKOUT / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts(name: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCH / name, "--help"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


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
