"""Published models: what is put into data/models, and that the model code takes it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pipelib.corpus.baselines import write_baselines
from pipelib.corpus.hub_lists import HubPin
from pipelib.corpus.hub_transfer import HubRepo
from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.model.huggingface import import_model
from pipelib.model.params import published_params
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


@contextmanager
def no_hub(pin: HubPin) -> Iterator[Path]:
    raise AssertionError(f"{pin} was asked for")
    yield Path()


def test_the_manifest_is_there_even_if_no_model_is_named(tmp_path: Path) -> None:
    assert write_baselines([], tmp_path / "models", no_hub) == {}
    assert (tmp_path / "models/manifest.json").read_text() == "{}\n"


def test_every_published_model_is_pinned_and_as_large_as_its_title_says() -> None:
    sizes = {"GPT-2 124M": 124439808, "GPT-2 350M": 354823168, "GPT-2 774M": 774030080, "GPT-2 1558M": 1557611200}
    assert {model.title for model in PUBLISHED_MODELS.values()} == set(sizes)
    for name, model in PUBLISHED_MODELS.items():
        assert model.repo == f"openai-community/{name}"
        assert len(model.revision) == 40
        assert model.sha256 is None or len(model.sha256) == 64
        assert published_params(name).parameters(model.vocab_size) == sizes[model.title]


def test_weights_are_linked_and_the_model_code_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32))
    stored = tmp_path / "model.safetensors"
    # as Hugging Face published them: without the prefix and the tied head
    save_file(published.transformer.state_dict(), stored, metadata={"format": "pt"})
    shape = {**PUBLISHED_MODELS["gpt2"].shape, "n_layer": 2, "n_head": 2, "n_embd": 32}
    monkeypatch.setitem(PUBLISHED_MODELS, "gpt2", replace(PUBLISHED_MODELS["gpt2"], shape=shape))

    @contextmanager
    def fetch(wanted: HubPin) -> Iterator[Path]:
        gpt2 = PUBLISHED_MODELS["gpt2"]
        assert wanted == HubPin(HubRepo(gpt2.repo, gpt2.revision, "model"), "model.safetensors", gpt2.sha256)
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
