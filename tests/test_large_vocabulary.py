"""Vocabularies of more than 65,536 tokens, and those that normalise: shards of 32 bits, equal engines, the bytes of the text."""

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from large_vocabulary import LLAMA3, QWEN3, SMOLLM2, write_large_vocabulary
from small_corpus import make_texts, write_raw_files, write_shards
from small_params import evaluate_params
from test_vocabulary import hard_strings
from warm_pool import fork_workers

from pipelib.errors import UserError
from pipelib.evaluation.measure import Data, measure
from pipelib.files import read_json, write_json
from pipelib.inspection.export import export_npy
from pipelib.model.decoder import build
from pipelib.model.huggingface import CONFIG, export_model, find_model, import_model
from pipelib.model.params import family_params
from pipelib.stage import Build
from pipelib.tokens.check import check_shards
from pipelib.tokens.encode_corpus import encode_corpus
from pipelib.tokens.loader import training_rows
from pipelib.tokens.params import TokenizeParams
from pipelib.tokens.shards import open_shard, read_manifest
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.choice import Vocabulary, tokenizer_of_model, write_vocabulary
from pipelib.vocabulary.engines import GigatokenEngine, Texts, TiktokenEngine
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer, token_type

TINY: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
SIZES = [*TINY][:6]
DECOMPOSED = "e\u0301 A\u030a \u212b \u1100\u1161 >\u0338"
"""Text that NFC changes, also in its number of bytes."""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """Qwen3's kind of vocabulary, just larger than 16 bits allow."""
    folder = tmp_path_factory.mktemp("qwen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELIB_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setenv("PIPELIB_WORKERS", "1")
        fork_workers(patch)
        yield write_large_vocabulary(folder / "data/vocabulary", **{**QWEN3, "ordinary": 66_000})


def test_the_size_decides_the_type() -> None:
    assert [token_type(size).itemsize for size in (50257, 65536, 65537, 151669)] == [2, 2, 4, 4]


def test_all_engines_normalise_equally(qwen: Tokenizer) -> None:
    import tokenizers

    strings = [*hard_strings(300), DECOMPOSED, f"<|endoftext|>{DECOMPOSED}"]
    expected = [qwen.encode(text) for text in strings]
    assert max(map(max, filter(None, expected))) > 65_536
    for engine in (GigatokenEngine(qwen), TiktokenEngine(qwen)):
        tokens, offsets = engine.encode(Texts.of(strings))
        assert tokens.dtype == np.uint32
        assert [tokens[start:end].tolist() for start, end in pairwise(offsets)] == expected
    theirs = tokenizers.Tokenizer.from_str(qwen.files(0)["tokenizer.json"].decode())
    theirs.encode_special_tokens = True
    assert [encoded.ids for encoded in theirs.encode_batch(strings)] == expected
    assert qwen.decode(qwen.encode("e\u0301")) == "é"
    theirs.encode_special_tokens = False
    marked = "x<|endoftext|>\u0338y"
    assert qwen.encode(marked, with_special=True) == theirs.encode(marked).ids


@pytest.fixture(scope="module")
def tokens(qwen: Tokenizer) -> tuple[Path, list[str], dict[str, Any]]:
    """data/tokens in the large vocabulary, the texts, and the result."""
    root = Path(qwen.files.args[0]).parents[2]  # type: ignore[attr-defined]
    texts = [f"{text} {DECOMPOSED}" for text in make_texts(120, words=20)]
    texts[3] = texts[1]
    raw = write_raw_files(root / "raw", [texts], row_group_rows=10)
    write_vocabulary(root / "data/vocabulary", Vocabulary(qwen, 4))
    (root / "work").mkdir()
    build = Build(root, root / "work", NullRun(), {}, False)
    result, _ = encode_corpus(build, raw, TokenizeParams(1000, "exact"), 0, Vocabulary(qwen, 4))
    return root / "data/tokens", texts, dict(result)


def test_shards_hold_32_bits_in_llm_cs_format(
    tokens: tuple[Path, list[str], Any], qwen: Tokenizer, tmp_path: Path
) -> None:
    folder, texts, result = tokens
    kept = [text for number, text in enumerate(texts) if number != 3]
    expected = [token for text in kept for token in (qwen.end_token_id, *qwen.encode(text))]
    found: list[int] = []
    shards = read_manifest(folder).shards
    for shard in shards:
        content = (folder / shard.name).read_bytes()
        magic, version, count = struct.unpack("<3i", content[:12])
        assert (magic, version) == (20240801, 7)
        found += struct.unpack(f"<{count}I", content[1024:])
    assert found == expected
    assert check_shards(folder).problems == ()
    inputs, targets = training_rows(folder, read_manifest(folder), 8).batch(np.arange(20))
    first = expected[shards[0].tokens :]
    assert inputs.ravel().tolist() == first[:160]
    assert targets[:, -1].tolist() == first[8:161:8]
    export_npy(folder, tmp_path / "npy", "x")
    assert np.load(tmp_path / "npy/x_val_000000.npy").tolist() == expected[: shards[0].tokens]
    assert result["bytes_per_token"] == pytest.approx(
        sum(len(text.encode()) for text in texts) / sum(len(qwen.encode(text)) for text in texts), abs=1e-4
    )


def test_a_shard_that_was_damaged_is_found(tokens: tuple[Path, list[str], Any], tmp_path: Path) -> None:
    content = (tokens[0] / "val_000000.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:-2])
    with pytest.raises(UserError, match="too few or too many tokens"):
        open_shard(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(struct.pack("<i", 20240520) + content[4:])
    with pytest.raises(UserError, match="does not begin with a shard's header"):
        open_shard(tmp_path / "a.bin")


def test_bits_per_byte_count_the_text_before_it_is_normalised(
    tokens: tuple[Path, list[str], Any], qwen: Tokenizer, tmp_path: Path
) -> None:
    """Of data in the model's own vocabulary, and of data in GPT-2's, which a baseline encodes again."""
    folder, texts, _ = tokens
    held_out = texts[:3]
    original = sum(len(text.encode()) for text in held_out)
    assert original != sum(len(qwen.normalise(text).encode()) for text in held_out)
    assert read_manifest(folder).validation_bytes == original
    model = build(family_params("qwen3")(**TINY, context_length=64), qwen.size)
    model.initialise(1)
    export_model(model, qwen, tmp_path / "model", {})
    pieces = [np.array([50256, *GPT2_TOKENIZER.encode(text)], np.uint16) for text in held_out]
    write_shards(tmp_path / "gpt2", pieces, 10**6)
    for data in (
        Data(folder, tmp_path / "none", qwen, original),
        Data(tmp_path / "gpt2", tmp_path / "none", GPT2_TOKENIZER),
    ):
        result = measure("it", tmp_path / "model", evaluate_params(), data, tmp_path / "scratch", qwen).result
        nats = result["val_loss"] * result["val_tokens"]
        assert result["bits_per_byte"] == pytest.approx(nats / np.log(2) / original, rel=1e-4)


# ---- Published models ------------------------------------------------------------------------------------------------

ROPE = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3-0.6B": (QWEN3, {
        "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "max_position_embeddings": 40960, "max_window_layers": 28,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "Llama-3.2-1B": (LLAMA3, {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "hidden_act": "silu", "max_position_embeddings": 131072, "mlp_bias": False,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {**ROPE, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 128256,
    }),
    "SmolLM2-135M": (SMOLLM2, {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "silu", "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49152,
    }),
}  # fmt: skip
"""Each model's vocabulary, and its config.json but for the sizes, which are tiny here."""


def write_published(folder: Path, name: str) -> Tokenizer:
    """A model with a published one's keys and vocabulary size, tiny and with made-up weights in bf16."""
    import transformers

    vocabulary, config = PUBLISHED[name]
    tokenizer = write_large_vocabulary(folder, **vocabulary)
    write_json(folder / CONFIG, {**{key: TINY[key] for key in SIZES}, **config})
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    own = read_json(folder / CONFIG)
    theirs.to(torch.bfloat16).save_pretrained(folder)
    write_json(folder / CONFIG, own)  # as published, and not as transformers writes it today
    return tokenizer


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read_with_their_vocabulary(name: str, tmp_path: Path) -> None:
    import transformers

    tokenizer = write_published(tmp_path / "published", name)
    assert tokenizer_of_model(tmp_path / "published", GPT2_TOKENIZER) == tokenizer
    model = import_model(tmp_path / "published", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float32)
    inputs = torch.randint(0, tokenizer.size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.logits(model.hidden(inputs))[..., : tokenizer.size]
        torch.testing.assert_close(ours, theirs(inputs).logits[..., : tokenizer.size], atol=1e-5, rtol=1e-5)
    export_model(model, tokenizer, tmp_path / "again", {})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(ours, again(inputs).logits, atol=1e-5, rtol=1e-5)


def test_more_rows_than_padding_are_refused(qwen: Tokenizer, tmp_path: Path) -> None:
    model = build(family_params("qwen3")(**TINY, context_length=64), qwen.size)
    model.initialise(1)
    export_model(model, qwen, tmp_path, {})
    write_json(tmp_path / CONFIG, {**read_json(tmp_path / CONFIG), "vocab_size": qwen.size + 2000})
    with pytest.raises(UserError, match=f"has vocab_size = {qwen.size + 2000}"):
        find_model(tmp_path, qwen)
