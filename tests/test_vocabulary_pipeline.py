"""A vocabulary of our own and a Llama through the pipeline: shards, model, evaluation, and models that have others."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpus import make_texts, write_jsonl
from small_params import PARAMS, model_params, write_params
from small_project import Project
from small_run import random_model

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.evaluation.measure import Data, count_text_bytes, encoded_anew
from pipelib.evaluation.report import Subject, _levels
from pipelib.files import read_json, sha256_file
from pipelib.inspection.disk import corpus_of
from pipelib.model.decoder import Decoder
from pipelib.model.huggingface import export_model, find_model, import_model
from pipelib.params import load_params
from pipelib.tokens.shards import open_shard, read_manifest
from pipelib.vocabulary.choice import find_tokenizer, tokenizer_of_model
from pipelib.vocabulary.folder import read_tokenizer
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

LLAMA = {
    "architecture": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "context_length": 16, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_scaling": None, "init_from": "scratch",
}  # fmt: skip
STAGES = ("download", "vocabulary", "tokenize", "train", "evaluate")
TEXTS = make_texts(200, words=60)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """All stages with 400 tokens of our own and a Llama, beside a baseline that is a GPT-2 with GPT-2's tokens."""
    other = random_model(model_params(), tokenizer=GPT2_TOKENIZER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PARAMS, "model", LLAMA)
        return make_project(tmp_path_factory.mktemp("own"), other)


def make_project(root: Path, other: Decoder) -> Project:
    project = Project.make(root)
    write_jsonl(project.root / "texts/a.jsonl", TEXTS)
    export_model(other, GPT2_TOKENIZER, project.root / "other", {})
    write_params(
        project.root, vocabulary__source="train", vocabulary__vocab_size=400, evaluate__baselines=["./other"],
        evaluate__tasks=["heldout"], evaluate__task_limit=4,
    )  # fmt: skip
    for stage in STAGES:
        project.runs(stage, PIPELIB_THREADS="1")
    return project


def test_the_first_documents_are_the_validation_shard(project: Project) -> None:
    manifest = read_json(project.root / "data/tokens/manifest.json")
    tokenizer = read_tokenizer(project.root / "data/vocabulary")
    assert manifest["encoding"] == tokenizer.encoding == {"name": "bpe-400", "vocabulary_sha256": tokenizer.fingerprint}
    count = read_json(project.root / "data/vocabulary/manifest.json")["validation_documents"]
    shard = open_shard(project.root / "data/tokens/val_000000.bin")
    starts = [*np.flatnonzero(shard == tokenizer.end_token_id).tolist(), len(shard)]
    assert [tokenizer.decode(shard[a + 1 : b].tolist()) for a, b in pairwise(starts)] == TEXTS[:count]
    assert count >= 8  # the benchmark's documents


def test_the_model_and_its_tokenizer_load_in_transformers(project: Project) -> None:
    import transformers

    folder = project.root / "models"
    tokenizer = read_tokenizer(project.root / "data/vocabulary")
    assert tokenizer_of_model(folder, GPT2_TOKENIZER) == tokenizer
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    ids = auto("The gradient of document 7")["input_ids"][:16]
    assert ids == tokenizer.encode("The gradient of document 7")[:16]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert theirs.config.vocab_size == 400
    assert theirs.config.eos_token_id == auto.eos_token_id == tokenizer.end_token_id
    ours = import_model(folder, tokenizer)
    with torch.no_grad():
        logits = ours.logits(ours.hidden(torch.tensor([ids])))[..., :400]
        torch.testing.assert_close(logits, theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-5)


def test_a_baseline_of_another_vocabulary_is_measured_on_the_same_bytes(project: Project) -> None:
    result = read_json(project.root / "metrics/evaluate.json")
    other = result["baselines"]["./other"]
    assert "vocabulary" not in result
    assert other["vocabulary"] == "gpt2"
    count = read_json(project.root / "data/vocabulary/manifest.json")["validation_documents"]
    tokens = sum(1 + len(GPT2_TOKENIZER.encode(text)) for text in TEXTS[:count])
    assert other["val_tokens"] == tokens - 1
    size = sum(len(text.encode()) for text in TEXTS[:count])
    nats = other["val_loss"] * other["val_tokens"]
    assert other["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    assert 0 < result["bits_per_byte"] != other["bits_per_byte"]
    assert result["completion"]["acc_norm_bytes"]["items"] == other["completion"]["acc_norm_bytes"]["items"]
    report = (project.root / "reports/evaluation.md").read_text(encoding="utf-8")
    assert f"{tokens - 1:,} tokens of gpt2; compare bits per byte" in report
    assert "| vocabulary | BPE 400: 400 tokens" in report
    assert "BPE 400, 400 tokens" in (project.root / "reports/model_card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sample", "--prompt", "The", "--tokens", "5"], "The"),
        (["verify"], "data/tokens: good"),
        (["summary"], "it starts near ln 400 = 5.99"),
        (["plan", "--no-measure"], "parameters"),
        (["evaluate", "--model", "other"], "of gpt2"),
        (["export", "--out", "new.gguf"], "f16, SHA-256"),
    ],
)
def test_commands_know_it(
    project: Project,
    command: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project.root)
    assert main(command) == 0
    assert words in capsys.readouterr().out


def test_another_size_makes_other_tokens_and_the_first_again_makes_nothing(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    shutil.copytree(project.root, root)
    copy = Project(root)
    first = sha256_file(root / "data/tokens/manifest.json")
    monkeypatch.setitem(PARAMS, "model", LLAMA)
    write_params(root, vocabulary__source="train", vocabulary__vocab_size=390)
    assert "linked again" in copy.stage("download").stdout
    for stage in ("vocabulary", "tokenize"):
        copy.runs(stage)
    assert read_json(root / "metrics/vocabulary.json")["size"] == 390
    assert sha256_file(root / "data/tokens/manifest.json") != first
    assert (
        read_json(root / "data/tokens/manifest.json")["shards"][0]["documents"]
        == (read_json(root / "metrics/vocabulary.json")["validation_documents"])
    )
    write_params(root, vocabulary__source="train", vocabulary__vocab_size=400)
    for stage in ("vocabulary", "tokenize"):
        assert "linked again" in copy.stage(stage).stdout
    assert sha256_file(root / "data/tokens/manifest.json") == first


def test_weights_of_another_vocabulary_are_refused_before_a_step(project: Project, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(project.root / "data/vocabulary")
    with pytest.raises(
        UserError, match=r"other has another vocabulary \(GPT-2, \w{16}\) than the data's \(BPE 400, \w{16}\)"
    ):
        find_model(project.root / "other", tokenizer)
    shutil.copytree(project.root / "models", tmp_path / "same size")
    value = json.loads((tmp_path / "same size/tokenizer.json").read_bytes())
    first, second = value["model"]["merges"][-2:]  # swap two tokens
    value["model"]["merges"][-2:] = [second, first]
    vocabulary = value["model"]["vocab"]
    (one, a), (two, b) = [(("".join(merge)), vocabulary["".join(merge)]) for merge in (first, second)]
    vocabulary[one], vocabulary[two] = b, a
    (tmp_path / "same size/tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"same size has another vocabulary \(BPE 400, .*set vocabulary\.source"):
        find_model(tmp_path / "same size", tokenizer)


def test_shards_of_another_vocabulary_are_refused(project: Project) -> None:
    encoding = read_json(project.root / "data/tokens/manifest.json")["encoding"]
    with pytest.raises(UserError, match=r"need the vocabulary bpe-400 \(\w{16}\), and only gpt2"):
        find_tokenizer(encoding)
    tokens = read_manifest(project.root / "data/tokens")  # of another clone: its vocabulary is beside them
    assert tokens.tokenizer.encoding == encoding


def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_the_datas(project: Project, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(project.root / "data/vocabulary")
    shutil.copytree(project.root / "models", tmp_path / "normed")
    value = json.loads((tmp_path / "normed/tokenizer.json").read_bytes())
    (tmp_path / "normed/tokenizer.json").write_text(json.dumps({**value, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(UserError, match=r"changes the text first \(normalizer Lowercase\)"):
        find_model(tmp_path / "normed", tokenizer)


def test_a_loss_of_another_vocabulary_is_not_drawn_beside_ours() -> None:
    result = {"val_loss": 4.0}
    others = {"same": {"val_loss": 5.0}, "other": {"val_loss": 6.0, "vocabulary": "gpt2"}}
    source = {"kind": "hub", "repo": "HuggingFaceFW/fineweb-edu"}
    subject = Subject(result, others, 124_000_000, 400, source, {}, [], None, has_own_vocabulary=True)
    assert [name for name, _ in _levels("val_loss", subject)] == ["same, measured"]
    alone = replace(subject, baselines={})
    assert _levels("val_loss", alone) == []
    assert _levels("val_loss", replace(alone, has_own_vocabulary=False)) != []


def test_plan_does_not_take_the_shards_of_another_vocabulary_for_the_corpus(project: Project) -> None:
    params = load_params(project.root / "params.yaml")
    assert corpus_of(params, project.root) is not None
    other = replace(params, vocabulary=replace(params.vocabulary, vocab_size=390))
    assert corpus_of(other, project.root) is None


def test_text_that_is_cut_in_a_character_is_encoded_anew(project: Project, tmp_path: Path) -> None:
    """GPT-2's validation shard ends anywhere."""
    from small_corpus import write_shards

    tokenizer = read_tokenizer(project.root / "data/vocabulary")
    whole = np.array([GPT2_TOKENIZER.end_token_id, *GPT2_TOKENIZER.encode("a 日本 b👍🏽")], np.uint16)
    (tmp_path / "tokens").mkdir()
    write_shards(tmp_path / "tokens", [whole[:-1]], 1000)
    (tmp_path / "new").mkdir()
    data = encoded_anew(Data(tmp_path / "tokens", tmp_path, GPT2_TOKENIZER), tokenizer, tmp_path / "new")
    assert data.tokens is not None
    shard = open_shard(data.tokens / "val_000000.bin")
    text = tokenizer.decode(shard[1:].tolist())
    assert "a 日本 b👍🏽".startswith(text)
    assert text.startswith("a 日本 b")
    assert count_text_bytes(shard, tokenizer) == len(text.encode())
