"""The completion benchmark: nothing but the text tells the right ending from the wrong ones."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import make_novel, make_texts
from small_params import PARAMS

from pipelib.corpus.benchmarks import (
    CONTEXT_WORDS,
    ENDING_WORDS,
    ITEMS_PER_DOCUMENT,
    SLOT_WORDS,
    _text,
    completion_items,
    write_benchmarks,
)
from pipelib.corpus.hub_benchmarks import HUB_BENCHMARKS, known_benchmarks
from pipelib.corpus.hub_lists import HubPin
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.parquet import iterate_raw, write_raw
from pipelib.corpus.raw import Document, write_manifest
from pipelib.errors import UserError

TOO_SHORT = CONTEXT_WORDS[0] + SLOT_WORDS - 1
"""The most words of a document that gives no item."""


def make_documents(count: int, words: int = 200) -> list[dict[str, Any]]:
    """Documents of words that name their document and place, with varying white space between them."""
    spaces = random.Random(0)
    return [
        {
            "id": f"d{index}",
            "text": "".join(f"d{index}w{word}{spaces.choice([' ', '  ', chr(10)])}" for word in range(words)),
        }
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return completion_items(make_documents(300), seed=7)


def test_an_item_is_a_stretch_of_its_document(items: list[dict[str, Any]]) -> None:
    documents = make_documents(300)
    assert [item["ind"] for item in items] == list(range(len(items)))
    for item in items:
        document = documents[item["document"]]
        right = item["endings"][item["label"]]
        assert item["ctx"] in document["text"]
        assert right in document["text"]
        words = document["text"].split()
        start = int(item["source_id"].split("~")[1])
        context = item["ctx"].split()
        assert context + right.split() == words[start - len(context) : start + len(right.split())]
        assert item["ctx"] == item["ctx_a"]
        assert item["ctx_b"] == ""


def test_lengths_are_as_documented(items: list[dict[str, Any]]) -> None:
    for item in items:
        counts = {len(ending.split()) for ending in item["endings"]}
        assert len(counts) == 1
        assert ENDING_WORDS[0] <= counts.pop() <= ENDING_WORDS[1]
        assert CONTEXT_WORDS[0] <= len(item["ctx"].split()) <= CONTEXT_WORDS[1]


def test_wrong_endings_come_from_three_other_documents_at_the_same_position(items: list[dict[str, Any]]) -> None:
    for item in items:
        origins = [{word.split("w")[0] for word in ending.split()} for ending in item["endings"]]
        assert all(len(origin) == 1 for origin in origins)
        assert len({origin.pop() for origin in origins}) == 4
        places = [int(ending.split()[0].split("w")[1]) for ending in item["endings"]]
        assert max(places) - min(places) <= 1  # all documents are equally long here


def test_endings_of_a_document_do_not_overlap(items: list[dict[str, Any]]) -> None:
    for document in range(300):
        words = [
            word for item in items if item["document"] == document for word in item["endings"][item["label"]].split()
        ]
        assert len(set(words)) == len(words)
    assert max(Counter(item["document"] for item in items).values()) == ITEMS_PER_DOCUMENT


def test_the_right_answer_is_anywhere(items: list[dict[str, Any]]) -> None:
    slots = Counter(item["label"] for item in items)
    expected = len(items) / 4
    assert sum((slots[slot] - expected) ** 2 / expected for slot in range(4)) < 16.3  # chi-square, 3 degrees, p = 0.001


def test_seed_and_documents_decide(items: list[dict[str, Any]]) -> None:
    assert completion_items(make_documents(300), seed=7) == items
    assert completion_items(make_documents(300), seed=8) != items


def test_short_documents_give_no_item_and_no_ending() -> None:
    short = [{"id": f"s{index}", "text": f"short{index} " * TOO_SHORT} for index in range(50)]
    items = completion_items(make_documents(20) + short, seed=1)
    assert {item["document"] for item in items} == set(range(20))
    assert "short" not in json.dumps(items)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("「他说，你好。」用 GPT-2，再见！" * 9, "「", "见！"),
        ("東京とカタカナ。" * 9, "東", "ナ。"),
        ("ไทยที่นี่" * 9, "ไ", "นี่"),  # the last three code points are a letter and two marks
    ],
)
def test_words_of_a_text_without_spaces_are_letters(text: str, first: str, last: str) -> None:
    found = _text(0, {"id": "a", "text": text})
    words = [found.stretch(place, 1) for place in range(len(found.words))]
    assert "".join(words) == text.replace(" ", "")
    assert (words[0], words[-1]) == (first, last)
    assert len(words) > 44
    assert not any(word[0] in "，。！" for word in words)


def test_words_of_a_text_with_spaces_are_between_them() -> None:
    text = "In Japanese, Tokyo is 東京 and means eastern capital. Это по-русски, 한국어는 띄어쓰기를 한다."
    found = _text(0, {"id": "a", "text": text})
    assert [found.stretch(place, 1) for place in range(len(found.words))] == text.split()


def test_items_of_a_chinese_text() -> None:
    documents = [{"id": None, "text": make_novel(12, seed=number)} for number in range(30)]
    items = completion_items(documents, seed=1)
    assert len(items) == 30 * ITEMS_PER_DOCUMENT
    for item in items:
        text = documents[item["document"]]["text"]
        right = item["endings"][item["label"]]
        assert (item["ctx"] + right).replace("\n", "") in text.replace("\n", "")
        assert {len(re.findall(r"\w", ending)) for ending in item["endings"]} == {len(re.findall(r"\w", right))}
        assert ENDING_WORDS[0] <= len(re.findall(r"\w", right)) <= ENDING_WORDS[1]


def test_items_of_english_text_keep_their_bytes() -> None:
    """Of before each letter of a text without spaces was a word, for text that has some of them."""
    rows = [{"id": None, "text": text} for text in make_texts(60, words=150)]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in completion_items(rows, seed=1337))
    assert (
        hashlib.sha256(lines.encode()).hexdigest() == "ba5acdff46087b3410519cd59bdd883c6cd10751a2703874973eeaf2b24fb999"
    )


def test_templates_give_no_two_equal_endings() -> None:
    template = [{"id": "t", "text": " ".join(f"Word{word}" for word in range(200)).swapcase()} for _ in range(10)]
    assert completion_items(template, seed=1) == []
    items = completion_items(make_documents(4) + template, seed=1)
    assert items
    for item in items:
        assert len({" ".join(ending.split()).casefold() for ending in item["endings"]}) == 4


def params(documents: int | str, benchmarks: tuple[Any, ...] = ("completion",)) -> DownloadParams:
    changes = {"source": "docs", "benchmarks": benchmarks, "benchmark_documents": documents, "models": (), "seed": 1}
    return DownloadParams(**{**PARAMS["download"], **changes})


def write_corpus(folder: Path, count: int, words: int = 200) -> Path:
    documents = [Document(row["text"], row["id"]) for row in make_documents(count, words)]
    write_manifest(folder, {}, write_raw(documents, folder))
    return folder


def no_hub(_: object) -> AbstractContextManager[Path]:
    raise AssertionError("the hub was not asked for")


def test_files_and_manifest(tmp_path: Path) -> None:
    raw = write_corpus(tmp_path / "raw", 30)
    manifest = write_benchmarks(params(20), raw, tmp_path / "benchmarks", no_hub)
    assert json.loads((tmp_path / "benchmarks/manifest.json").read_text()) == manifest
    lines = (tmp_path / "benchmarks/completion.jsonl").read_text().splitlines()
    assert len(lines) == manifest["completion.jsonl"]["items"] == 120
    held = [json.loads(line)["text"] for line in (tmp_path / "benchmarks/heldout.jsonl").read_text().splitlines()]
    assert held == [row["text"] for row in make_documents(30)[:20]]
    assert write_benchmarks(params(20, ()), raw, tmp_path / "none", no_hub) == {}
    assert (tmp_path / "none/hellaswag.jsonl").read_bytes() == b"\n"  # train depends on it


@pytest.mark.parametrize(
    ("documents", "words", "message"),
    [(30, 200, "none would be left to train on"), (20, TOO_SHORT, "no completion item")],
)
def test_a_corpus_that_is_too_small(tmp_path: Path, documents: int, words: int, message: str) -> None:
    raw = write_corpus(tmp_path / "raw", 30, words)
    with pytest.raises(UserError, match=message):
        write_benchmarks(params(documents), raw, tmp_path / "benchmarks", no_hub)


COLUMNS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "ind": 1, "activity_label": "a", "ctx_a": "b", "ctx_b": "c", "ctx": "b c", "endings": ["d", "e", "f", "g"],
        "source_id": "s", "split": "val", "split_type": "indomain", "label": "2",
    },
    "lambada_openai": {"text": "one two\u2028 three"},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "arc_easy": {"id": "i", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "winogrande": {"sentence": "a _ c", "option1": "x", "option2": "y", "answer": "2"},
    "sciq": {
        "question": "q", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d", "support": "s",
    },
    "openbookqa": {"id": "i", "question_stem": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
    "wikitext": {"page": "= a =\n b"},
}  # fmt: skip
"""A row of each set as its repository has it."""


def test_sets_of_the_hub_keep_their_columns(tmp_path: Path) -> None:
    @contextmanager
    def fetch(pin: HubPin) -> Iterator[Path]:
        row = COLUMNS[next(name for name, known in HUB_BENCHMARKS.items() if known.repo == pin.repo.name)]
        path = tmp_path / Path(pin.path).name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row] * 3), path)
        else:
            path.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 3, encoding="utf-8")
        yield path

    manifest = write_benchmarks(params(0, tuple(COLUMNS)), tmp_path / "raw", tmp_path / "benchmarks", fetch)
    assert sorted(manifest) == sorted(f"{name}.jsonl" for name in COLUMNS)
    for name, columns in COLUMNS.items():
        loaded = datasets.load_dataset(
            "json",
            data_files=str(tmp_path / f"benchmarks/{name}.jsonl"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
        assert manifest[f"{name}.jsonl"]["items"] == len(loaded) == 3
        if name != "hellaswag":  # the one that is converted
            assert loaded[2] == columns
    assert set(known_benchmarks()) == {"completion", *HUB_BENCHMARKS}


@pytest.mark.parametrize("name", HUB_BENCHMARKS)
def test_sets_of_the_hub_are_those_of_the_harness(name: str) -> None:
    """Repository and split, as the harness's own task file says them."""
    folder = Path(lm_eval.__file__).parent / "tasks"
    file = {"arc_easy": "arc/arc_easy", "lambada_openai": "lambada/lambada_openai", "winogrande": "winogrande/default"}
    path = folder / f"{file.get(name, f'{name}/{name}')}.yaml"
    if not path.exists() and name not in COLUMNS:
        pytest.skip(f"lm-eval has no task {name}")
    text = path.read_text(encoding="utf-8")
    task = dict(re.findall(r"^(\w+): (\S+)$", text, re.MULTILINE))
    pin = HUB_BENCHMARKS[name]
    assert task["dataset_path"] == pin.repo
    split = task.get("test_split", "null")
    assert (split if split != "null" else task["validation_split"]) in Path(pin.path).name
    assert task.get("dataset_name", "null") in ("null", "default") or pin.path.startswith(task["dataset_name"])


@pytest.mark.parametrize(("documents", "expected"), [(5000, 480), (200, 20)])
def test_auto_takes_a_tenth_of_the_text(tmp_path: Path, documents: int, expected: int) -> None:
    raw = write_corpus(tmp_path / "raw", documents)
    manifest = write_benchmarks(params("auto"), raw, tmp_path / "benchmarks", no_hub)
    assert abs(manifest["heldout.jsonl"]["documents"] - expected) <= 3


def test_auto_takes_no_more_than_a_megabyte(tmp_path: Path) -> None:
    raw = write_corpus(tmp_path / "raw", 600, words=4000)
    sizes = [len(row["text"].encode()) for row in iterate_raw(raw)]
    count = write_benchmarks(params("auto"), raw, tmp_path / "benchmarks", no_hub)["heldout.jsonl"]["documents"]
    assert sum(sizes[:count]) <= 1_000_000 < sum(sizes[: count + 1])


def test_auto_takes_no_more_than_the_documents_for_validation(tmp_path: Path) -> None:
    raw = write_corpus(tmp_path / "raw", 300)
    manifest = write_benchmarks(params("auto"), raw, tmp_path / "benchmarks", no_hub, 7)
    assert manifest["heldout.jsonl"]["documents"] == 7


@pytest.mark.parametrize("at_most", [None, 3])
def test_auto_refuses_too_few_documents(tmp_path: Path, at_most: int | None) -> None:
    raw = write_corpus(tmp_path / "raw", 30)
    with pytest.raises(UserError, match=r"and that is 3 documents .*download\.split"):
        write_benchmarks(params("auto"), raw, tmp_path / "benchmarks", no_hub, at_most)
