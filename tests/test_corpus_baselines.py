"""Published models: what is put into data/models, and that the model code takes it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pipelib.corpus.baselines import BASELINES, Baseline, write_baselines
from pipelib.corpus.hub_lists import HubPin
from pipelib.corpus.params import Baseline as BaselineName
from pipelib.model.huggingface import import_model
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


@contextmanager
def no_hub(pin: HubPin) -> Iterator[Path]:
    raise AssertionError(f"{pin} was asked for")
    yield Path()


def test_the_manifest_is_there_even_if_no_model_is_named(tmp_path: Path) -> None:
    assert write_baselines([], tmp_path / "models", no_hub) == {}
    assert (tmp_path / "models/manifest.json").read_text() == "{}\n"


def test_every_name_of_the_parameter_is_a_pinned_repository() -> None:
    assert set(BASELINES) == set(get_args(BaselineName))
    for name, baseline in BASELINES.items():
        assert baseline.pin.repo.name == f"openai-community/{name}"
        assert len(baseline.pin.repo.revision) == 40
        assert baseline.pin.sha256 is None or len(baseline.pin.sha256) == 64
        width = baseline.n_embd
        parameters = (50257 + 1024) * width + baseline.n_layer * (12 * width**2 + 13 * width) + 2 * width
        assert parameters == {768: 124439808, 1024: 354823168, 1280: 774030080, 1600: 1557611200}[width]


def test_weights_are_linked_and_the_model_code_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32))
    stored = tmp_path / "model.safetensors"
    # as Hugging Face published them: without the prefix and the tied head
    save_file(published.transformer.state_dict(), stored, metadata={"format": "pt"})
    pin = HubPin(BASELINES["gpt2"].pin.repo, "model.safetensors", None)
    monkeypatch.setitem(BASELINES, "gpt2", Baseline(pin, n_layer=2, n_head=2, n_embd=32))

    @contextmanager
    def fetch(wanted: HubPin) -> Iterator[Path]:
        assert wanted is pin
        yield stored

    manifest = write_baselines(["gpt2"], tmp_path / "models", fetch)
    assert manifest == json.loads((tmp_path / "models/manifest.json").read_text())
    assert manifest["gpt2"]["sha256"] == hashlib.sha256(stored.read_bytes()).hexdigest()
    assert stored.samefile(tmp_path / "models/gpt2/model.safetensors")
    ours = import_model(tmp_path / "models/gpt2", GPT2_TOKENIZER)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "models/gpt2")
    token_ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = ours.logits(ours.eval().hidden(token_ids))
        expected = theirs.eval()(token_ids).logits
        torch.testing.assert_close(published.eval()(token_ids).logits, expected)
    torch.testing.assert_close(logits[..., :50257], expected, atol=1e-4, rtol=1e-4)
