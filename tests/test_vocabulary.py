"""The vocabulary stage: training, the folder of an existing vocabulary, and what all engines make of it."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import make_texts, write_raw_files
from small_params import PARAMS
from small_project import CHECKOUT

from pipelib.corpus.parquet import iterate_groups, iterate_raw, row_groups
from pipelib.errors import UserError
from pipelib.files import read_json, sha256_file, write_json
from pipelib.schema import parse
from pipelib.stage import Build
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.bpe import train_bpe
from pipelib.vocabulary.build import make_vocabulary
from pipelib.vocabulary.choice import is_gpt2, read_vocabulary, tokenizer_of_model
from pipelib.vocabulary.engines import HARD_STRINGS, GigatokenEngine, Texts
from pipelib.vocabulary.folder import read_tokenizer
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.planned import planned_size
from pipelib.vocabulary.sample import held_out, training_texts
from pipelib.vocabulary.tokenizer import BYTES, PATTERNS, Tokenizer

RUNS = int(os.environ.get("PIPELIB_TEST_RUNS", "4"))
TEXTS = make_texts(600, words=60)


def vocabulary_params(**changes: Any) -> VocabularyParams:
    values = {
        **PARAMS["vocabulary"],
        "source": "train",
        "vocab_size": 400,
        "special_tokens": ["<|im_start|>", "<|im_end|>"],
        **changes,
    }
    problems: list[str] = []
    params = parse(VocabularyParams, values, "vocabulary", problems)
    assert params is not None, problems
    return params


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [TEXTS[:300], [None, "", *TEXTS[300:]]]
    return write_raw_files(tmp_path_factory.mktemp("corpus") / "raw", files, row_group_rows=50)


def make(folder: Path, raw: Path, benchmark_documents: int = 8, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """data/vocabulary, and the stage's result."""
    build = Build(folder / "outs", folder / "work", NullRun(), {}, False)
    result, _ = make_vocabulary(build, vocabulary_params(**changes), raw, benchmark_documents)
    return folder / "outs/data/vocabulary", dict(result)


@pytest.fixture(scope="module")
def made(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELIB_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        return make(tmp_path_factory.mktemp("made"), raw)


# ---- Training --------------------------------------------------------------------------------------------------------


def test_ids_are_bytes_then_merges_then_special_tokens(made: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = read_tokenizer(made[0])
    assert tokenizer.size == 400
    assert sorted(tokenizer.ranks().values()) == list(range(397))
    assert {len(token) for token, number in tokenizer.ranks().items() if number < BYTES} == {1}
    assert tokenizer.special_tokens == {"<|endoftext|>": 397, "<|im_start|>": 398, "<|im_end|>": 399}
    assert tokenizer.end_token_id == 397
    merges = json.loads((made[0] / "tokenizer.json").read_bytes())["model"]["merges"]
    assert len(merges) == 397 - BYTES


def test_the_folder_says_what_is_in_it(made: tuple[Path, dict[str, Any]]) -> None:
    folder, result = made
    vocabulary = read_vocabulary(folder)
    assert vocabulary.validation_documents == result["validation_documents"]
    assert result["vocabulary_sha256"] == vocabulary.tokenizer.fingerprint
    assert read_json(folder / "manifest.json") == {
        **vocabulary.tokenizer.encoding, "size": 400, "end_token_id": 397, "validation_documents": result["validation_documents"],
    }  # fmt: skip
    assert np.load(folder / "token_bytes.npy").tolist() == vocabulary.tokenizer.byte_lengths().tolist()
    lines = (folder / "vocabulary.tiktoken").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(397))


def test_it_compresses_what_it_was_trained_on(made: tuple[Path, dict[str, Any]]) -> None:
    result = made[1]
    ours, theirs = result["bytes_per_token"], result["gpt2_bytes_per_token"]
    assert ours["low"] <= ours["value"] <= ours["high"]
    tokenizer = read_tokenizer(made[0])
    texts = TEXTS[: result["validation_documents"]]
    size = sum(len(text.encode()) for text in texts)
    assert result["held_out_bytes"] == size
    assert ours["value"] == pytest.approx(size / sum(len(tokenizer.encode(text)) for text in texts), abs=1e-4)
    assert theirs["value"] == pytest.approx(size / sum(len(GPT2_TOKENIZER.encode(text)) for text in texts), abs=1e-4)
    assert 60_000 < result["training_bytes"] <= 100_000  # `max_bytes`


SCRIPT = """
import sys
from pathlib import Path
from pipelib.stage import Build
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.build import make_vocabulary
from pipelib.vocabulary.params import VocabularyParams
params = VocabularyParams("train", 400, "gpt2", ("<|im_start|>", "<|im_end|>"), 100000, "auto")
folder = Path(sys.argv[1])
make_vocabulary(Build(folder / "outs", folder / "work", NullRun(), {}, False), params, Path(sys.argv[2]), 8)
"""


def in_a_process(folder: Path, raw: Path, **environment: str) -> "subprocess.Popen[str]":
    changed = {**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), **environment}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(raw)]
    return subprocess.Popen(command, env=changed, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_its_bytes_depend_on_no_threads(made: tuple[Path, Any], raw: Path, tmp_path: Path, threads: str) -> None:
    process = in_a_process(tmp_path, raw, RAYON_NUM_THREADS=threads)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert hashes(tmp_path / "outs/data/vocabulary") == hashes(made[0])


@pytest.mark.random
def test_killed_at_any_instant_it_begins_again(made: tuple[Path, Any], raw: Path, tmp_path: Path) -> None:
    """Outs are built beside the workspace; nothing that a killed run left can reach those of the next."""
    draw = random.Random(0)
    for _ in range(max(2, RUNS // 4)):
        process = in_a_process(tmp_path, raw)
        time.sleep(draw.uniform(0.2, 3.0))
        process.kill()
        process.communicate()
        shutil.rmtree(tmp_path / "outs", ignore_errors=True)  # as `stage.py` does
    process = in_a_process(tmp_path, raw)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert hashes(tmp_path / "outs/data/vocabulary") == hashes(made[0])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


# ---- All engines agree -----------------------------------------------------------------------------------------------

PIECES = [
    "don't", "WE'LL", "'s", "'S", "ſ", "K", "1234567", " 12 ", "\n", "\r\n", " ", "  ", "\t", "é", "日本", "中文字",
    "👩‍👩‍👧", "\u0301", "\u200b", "\ufeff", "\u00a0", "\u2028", "\u3000", "\x00", "\x85", "<|endoftext|>", "<|im_start|>",
    "abc", "ABC", " the", " of", "...", "!?", "(x)", "\\n", "_", "½", "²", "٣", "Ⅷ", "हिन्दी", "עברית", "🇩🇪", "'re", "’s",
    "a\n\n\n", "   end",
]  # fmt: skip


def hard_strings(count: int) -> list[str]:
    """Strings of what is hard for pre-tokenizers, and of characters of all planes."""
    draw = random.Random(1)
    joined = ["".join(draw.choices(PIECES, k=draw.randint(1, 14))) for _ in range(count)]
    ranges = [(0, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0x1F300, 0x1FA00), (10, 14), (32, 33)]
    anything = [
        "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randint(1, 20))) for _ in range(count)
    ]
    return [*HARD_STRINGS, *joined, *anything]


@pytest.mark.parametrize("pre_tokenizer", PATTERNS)
def test_all_engines_have_the_same_ids(tmp_path: Path, pre_tokenizer: str) -> None:
    """tokenizers, tiktoken, gigatoken, and transformers' AutoTokenizer. Special tokens as text stay text."""
    import tokenizers
    import transformers

    params = vocabulary_params(pre_tokenizer=pre_tokenizer, vocab_size=600)
    (tmp_path / "tokenizer.json").write_bytes(train_bpe([*TEXTS, *PIECES * 3], params))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.pre_tokenizer == pre_tokenizer
    strings = hard_strings(1500)
    expected = [tokenizer.encode(text) for text in strings]
    assert all(tokenizer.end_token_id not in ids for ids in expected)
    tokens, offsets = GigatokenEngine(tokenizer).encode(Texts.of(strings))
    assert [tokens[start:end].tolist() for start, end in pairwise(offsets)] == expected
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert [encoded.ids for encoded in theirs.encode_batch(strings)] == expected
    for name, content in tokenizer.files(128).items():
        (tmp_path / name).write_bytes(content)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto(strings, split_special_tokens=True)["input_ids"] == expected
    assert auto("a<|endoftext|>")["input_ids"][-1] == auto.eos_token_id == tokenizer.end_token_id
    assert len(auto) == tokenizer.size
    assert auto.model_max_length == 128
    for text, ids in zip(strings, expected, strict=True):
        assert tokenizer.decode(ids) == text
        assert auto.decode(ids) == text
    assert read_tokenizer(tmp_path) == tokenizer  # what is exported is read again


# ---- What it is trained on -------------------------------------------------------------------------------------------


def test_the_split_is_held_out_and_the_rest_is_trained_on(raw: Path) -> None:
    held = [document.text for document in held_out(raw, vocabulary_params(validation_documents=310), 8)]
    assert held == TEXTS[:310]
    assert [*training_texts(raw, 310, 10**9)] == TEXTS[310:]
    assert [*training_texts(raw, 600, 10**9)] == []


def test_auto_holds_a_tenth_out_and_the_benchmarks_documents(raw: Path) -> None:
    total = sum(group.text_bytes for group in row_groups(raw))
    held = [document.text for document in held_out(raw, vocabulary_params(), 8)]
    size = sum(len(text.encode()) for text in held)
    assert total // 10 <= size <= total // 10 + max(map(len, TEXTS)) * 4
    assert held == TEXTS[: len(held)]
    assert len([*held_out(raw, vocabulary_params(), 200)]) == 200


def test_the_files_that_the_user_names_are_the_split(raw: Path, tmp_path: Path) -> None:
    named = tmp_path / "raw"
    shutil.copytree(raw, named)
    write_json(named / "manifest.json", {**read_json(named / "manifest.json"), "validation_documents": 17})
    assert len([*held_out(named, vocabulary_params(validation_documents=5), 8)]) == 17


def test_a_prefix_of_a_file_is_all_that_counts(raw: Path, tmp_path: Path) -> None:
    """`download.max_tokens` ends the corpus in the middle of a file that stays whole."""
    short = tmp_path / "raw"
    shutil.copytree(raw, short)
    manifest = read_json(short / "manifest.json")
    files = [{**manifest["files"][0], "rows": 120}]
    write_json(short / "manifest.json", {**manifest, "files": files})
    groups = row_groups(short)
    assert [group.rows for group in groups] == [50, 50, 20, 0, 0, 0]
    size = sum(len(text.encode()) for text in TEXTS[:120])
    assert sum(group.text_bytes for group in groups) == pytest.approx(size, rel=0.2)
    held = [*held_out(short, vocabulary_params(), 4)]
    assert 8 < len(held) < 30  # a tenth
    assert [*training_texts(short, len(held), 10**9)] == TEXTS[len(held) : 120]


@pytest.mark.parametrize("max_bytes", [65536, 100_000])
def test_one_row_group_is_enough(tmp_path: Path, max_bytes: int) -> None:
    whole = write_raw_files(tmp_path / "raw", [TEXTS], row_group_rows=1000)
    found = "".join(training_texts(whole, 40, max_bytes))
    assert max_bytes - 4 < len(found.encode()) <= max_bytes
    assert "".join(TEXTS[40:]).startswith(found)


def test_a_long_document_is_cut_and_ends_nothing_early(tmp_path: Path) -> None:
    whole = write_raw_files(tmp_path / "raw", [["held out", "a short one", "日本" * 100_000]])
    found = [*training_texts(whole, 1, 65536)]
    assert found[0] == "a short one"
    assert 65536 - 3 <= sum(len(text.encode()) for text in found) <= 65536


@pytest.mark.parametrize("max_bytes", [65536, 100_000, 200_000])
def test_the_sample_is_bounded_and_spread_over_the_corpus(raw: Path, max_bytes: int) -> None:
    found = [*training_texts(raw, 40, max_bytes)]
    size = sum(len(text.encode()) for text in found)
    assert 0.6 * max_bytes < size <= max_bytes
    places = [TEXTS.index(text) for text in found]
    assert places == sorted(set(places))
    assert places[0] >= 40
    total = sum(len(text.encode()) for text in TEXTS[40:])
    if size < total / 2:  # parts of the first and of the last third
        assert places[0] < 200
        assert places[-1] > 400


def test_row_groups_are_read_by_their_places(raw: Path) -> None:
    whole = [row["text"] for row in iterate_raw(raw)]
    found = [*iterate_groups(raw, groups={0, 7})]
    assert [row["text"] for _, row in found] == [*whole[:50], *whole[350:400]]
    assert [number for number, _ in found] == [0] * 50 + [7] * 50
    assert sum(group.rows for group in row_groups(raw)) == len(whole) == 602


# ---- The folder of an existing vocabulary ----------------------------------------------------------------------------


def test_a_folder_gives_its_vocabulary(made: tuple[Path, Any], raw: Path, tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "given")
    (tmp_path / "given/manifest.json").unlink()
    folder, result = make(tmp_path, raw, source=str(tmp_path / "given"), validation_documents=20)
    assert read_tokenizer(folder) == read_tokenizer(made[0])
    assert result["validation_documents"] == 20
    assert "training_bytes" not in result
    assert planned_size(vocabulary_params(source=str(tmp_path / "given"))) == 400


def test_an_end_token_may_have_another_name(made: tuple[Path, Any], raw: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    content = (made[0] / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>")
    (given / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"no end token .*eos_token"):
        read_tokenizer(given)
    write_json(given / "tokenizer_config.json", {"eos_token": {"content": "</s>"}})
    folder, _ = make(tmp_path, raw, source=str(given))
    first = read_vocabulary(folder).tokenizer
    assert first.end_token_id == 397
    write_json(given / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    assert read_tokenizer(given).encoding != first.encoding  # documents begin with another token
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no end token"):
        read_vocabulary(folder)


def test_gpt2s_own_file_is_gpt2s_vocabulary(made: tuple[Path, Any], tmp_path: Path) -> None:
    assert not is_gpt2(read_tokenizer(made[0]))
    gpt2_folder(tmp_path)
    assert is_gpt2(read_tokenizer(tmp_path))
    assert tokenizer_of_model(tmp_path, read_tokenizer(made[0])) is GPT2_TOKENIZER
    assert tokenizer_of_model(tmp_path / "none", GPT2_TOKENIZER) is GPT2_TOKENIZER


def gpt2_folder(folder: Path, vocab_size: int = 50257, added: Sequence[str] = ()) -> None:
    """GPT-2's vocabulary as transformers saves it for its fast tokenizers, and the config of a model."""
    import transformers

    for name, content in GPT2_TOKENIZER.files(1024).items():
        (folder / name).write_bytes(content)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*added]})
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", {"vocab_size": vocab_size})


def test_tokens_added_without_rows_are_not_the_models(tmp_path: Path) -> None:
    gpt2_folder(tmp_path, added=["[PAD]"])
    assert tokenizer_of_model(tmp_path, GPT2_TOKENIZER) is GPT2_TOKENIZER
    gpt2_folder(tmp_path, vocab_size=50304 + 1, added=["[PAD]"])
    assert tokenizer_of_model(tmp_path, GPT2_TOKENIZER).size == 50258


# ---- Bad input -------------------------------------------------------------------------------------------------------


def bad_files() -> Iterator[Any]:
    def case(name: str, change: Any, message: str) -> Any:
        return pytest.param(change, message, id=name)

    yield case("WordPiece", lambda v: v["model"].update(type="WordPiece"), "is of the kind WordPiece")
    yield case("Unigram", lambda v: v["model"].update(type="Unigram"), "is of the kind Unigram")
    yield case("normalizer", lambda v: v.update(normalizer={"type": "NFKC"}), "changes the text first .*NFKC")
    yield case("prefix space", lambda v: v["pre_tokenizer"].update(add_prefix_space=True), "splits text in another way")
    yield case("no pre-tokenizer", lambda v: v.update(pre_tokenizer=None), "splits text in another way")
    yield case("dropout", lambda v: v["model"].update(dropout=0.1), "has dropout = 0.1")
    yield case("byte fallback", lambda v: v["model"].update(byte_fallback=True), "has byte_fallback = True")
    yield case("a gap", lambda v: v["added_tokens"][2].update(id=500), "has ids that leave gaps")
    yield case("order", lambda v: v["model"]["merges"].reverse(), "has merges in another order")
    yield case("a missing byte", lambda v: v["model"]["vocab"].pop("!"), "has no token for 1 of the 256 bytes")
    yield case("not bytes", lambda v: v["model"]["vocab"].update({"日": 0}), "is not a tokenizer of bytes")
    yield case(
        "an added word",
        lambda v: v["added_tokens"][1].update(special=False, normalized=True),
        "has the added token .* an ordinary word",
    )
    yield case("a stripping token", lambda v: v["added_tokens"][1].update(lstrip=True), "has the added token .* lstrip")
    yield case("no model", lambda v: v.pop("model"), "is not a tokenizer of bytes")


@pytest.mark.parametrize(("change", "message"), [*bad_files()])
def test_a_tokenizer_of_another_kind_is_refused(
    made: tuple[Path, Any], tmp_path: Path, change: Any, message: str
) -> None:
    value = json.loads((made[0] / "tokenizer.json").read_bytes())
    change(value)
    write_json(tmp_path / "tokenizer.json", value)
    with pytest.raises(UserError, match=rf"tokenizer\.json {message}.*; use a byte-level BPE tokenizer"):
        read_tokenizer(tmp_path)


def test_what_is_no_vocabulary_is_refused(tmp_path: Path, made: tuple[Path, Any]) -> None:
    with pytest.raises(UserError, match=r"none/tokenizer.json does not exist"):
        planned_size(vocabulary_params(source=str(tmp_path / "none")))
    gpt2_folder(tmp_path)
    with pytest.raises(UserError, match=r"has GPT-2's vocabulary.*set vocabulary\.source: gpt2"):
        planned_size(vocabulary_params(source=str(tmp_path)))
    shutil.copytree(made[0], tmp_path / "b")
    (tmp_path / "b/tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match=r"is not the vocabulary of its manifest\.json"):
        read_vocabulary(tmp_path / "b")


def test_a_corpus_that_is_too_small_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"size: 60,000 tokens are more than the text can give \(([\d,]+):.*set it to \1 or less"
    ):
        make(tmp_path / "a", raw, vocab_size=60_000)
    with pytest.raises(UserError, match="no text behind the 600 documents"):
        make(tmp_path / "b", raw, validation_documents=5000)
    with pytest.raises(UserError, match="5 documents are fewer than the 8 that the benchmark is made of"):
        make(tmp_path / "c", raw, validation_documents=5)


def test_a_special_token_that_text_has_too_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'document' occurs in the text so often"):
        make(tmp_path / "a", raw, special_tokens=["document"])
    with pytest.raises(UserError, match=r"'é' is how tokenizer\.json writes an ordinary token"):
        make(tmp_path / "b", raw, special_tokens=["é"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "own"}, "write ./own if it is a folder"),
        ({"special_tokens": ["<|x|>", "<|x|>"]}, r"<\|x\|> would be there twice"),
        ({"special_tokens": ["<|endoftext|>"]}, r"<\|endoftext\|> would be there twice"),
        ({"special_tokens": [" x"]}, "' x' is too short, or has white space"),
        ({"special_tokens": [""]}, "'' is too short"),
        ({"vocab_size": 258}, "vocab_size: 258 has no room for 256 bytes and 3 special tokens"),
        ({"pre_tokenizer": "llama"}, "pre_tokenizer"),
    ],
)
def test_parameters_that_cannot_go_together(changes: dict[str, Any], message: str) -> None:
    problems: list[str] = []
    values = {**PARAMS["vocabulary"], "source": "train", "special_tokens": ["<|im_start|>", "<|im_end|>"], **changes}
    parse(VocabularyParams, values, "vocabulary", problems)
    assert len(problems) == 1

    assert re.search(message, problems[0]), problems


def test_what_a_source_does_not_use_starts_nothing() -> None:
    gpt2 = vocabulary_params(source="gpt2")
    assert (
        gpt2.decides()
        == dataclasses.replace(gpt2, vocab_size=5000, validation_documents=7).decides()
        == {"source": "gpt2"}
    )
    assert vocabulary_params().decides() != vocabulary_params(vocab_size=500).decides()


def test_gpt2s_vocabulary_needs_no_text(tmp_path: Path) -> None:
    folder, result = make(tmp_path, tmp_path / "no corpus", source="gpt2")
    assert read_vocabulary(folder).tokenizer is GPT2_TOKENIZER
    assert read_vocabulary(folder).validation_documents is None
    assert result == {"name": "gpt2", "size": 50257}


def test_a_tokenizer_reaches_another_process(made: tuple[Path, Any]) -> None:
    import pickle

    tokenizer: Tokenizer = pickle.loads(pickle.dumps(read_tokenizer(made[0])))
    assert tokenizer.encode("hello world") == read_tokenizer(made[0]).encode("hello world")
