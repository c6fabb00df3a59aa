"""Made-up benchmarks and a model small enough to score them in a test, and the plain way of scoring."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_params import evaluate_params, model_params
from small_run import random_model

from pipelib.evaluation.benchmark_items import Item
from pipelib.model.families.gpt2 import GPT2
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

WORDS = ["the", "a", "model", "of", "data", "returns", "array", "index", "is", "not", "and", "each", "café", "日本"]
PARAMS = evaluate_params(batch_tokens=128, sample_prompts=["The", "x ="])


def small_model() -> GPT2:
    """A model whose context is shorter than many of the questions."""
    return random_model(model_params(n_embd=32, context_length=24), tokenizer=GPT2_TOKENIZER)


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the vocabulary is laid out; and what the harness sets in the environment is taken back."""
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path_factory.getbasetemp() / "evaluation-state"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE", "DISABLE_MULTIPROC"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def real_data() -> Path:
    """A folder with the field's own data, for those who have it; a test that asks for it is left out elsewhere."""
    folder = os.environ.get("PIPELIB_TEST_DATA")
    if not folder:
        pytest.skip("PIPELIB_TEST_DATA names no folder with hellaswag.jsonl, piqa.jsonl, ...")
    return Path(folder)


def words(chance: np.random.Generator, least: int, most: int) -> str:
    return " ".join(chance.choice(WORDS, chance.integers(least, most)))


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def completion_rows(count: int) -> list[dict[str, Any]]:
    """Items with contexts from one word to more than the model's context holds, and endings of unequal length."""
    chance = np.random.default_rng(3)
    return [
        {
            "ctx": words(chance, 1, 40), "endings": [words(chance, 1, 12) for _ in range(4)],
            "label": int(chance.integers(4)), "document": number // 3,
        }
        for number in range(count)
    ]  # fmt: skip


def hub_rows(count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of every task's data, in the columns that the hub has, with questions that are too long for the model too."""
    chance = np.random.default_rng(4)

    def some(most: int = 8) -> str:
        return words(chance, 1, most)

    def choices(number: int) -> dict[str, list[str]]:
        return {"text": [some() for _ in range(number)], "label": ["A", "B", "C", "D"][:number]}

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for number in range(count):
        rows["hellaswag"].append(
            {
                "activity_label": "Work", "ctx_a": some(30), "ctx_b": some(4), "ctx": some(30), "label": number % 4,
                "endings": [f"{some(4)} [title] {some(4)}" for _ in range(4)], "document": None,
            }
        )  # fmt: skip
        rows["lambada_openai"].append({"text": f"{words(chance, 3, 30)} data"})
        rows["piqa"].append({"goal": some(30), "sol1": some(), "sol2": some(), "label": number % 2})
        rows["arc_easy"].append(
            {"question": some(20), "choices": choices(4 - number % 2), "answerKey": "ABC"[number % 3]}
        )
        sentence = f"{some()} _ {some()}"
        rows["winogrande"].append(
            {"sentence": sentence, "option1": "Ann", "option2": "Bo", "answer": str(1 + number % 2)}
        )
        distractors = {f"distractor{place}": some() for place in (1, 2, 3)}
        rows["sciq"].append({"support": f" {some(20)}", "question": some(), "correct_answer": some(), **distractors})
        rows["openbookqa"].append(
            {"question_stem": some(20), "choices": choices(4), "answerKey": " ABCD"[1 + number % 4]}
        )
        rows["wikitext"].append({"page": f" = {some()} = \n {words(chance, 1, 90)} @-@ {some()} .\n"})
    return rows


TASKS = ("hellaswag", "lambada_openai", "piqa", "arc_easy", "winogrande", "sciq", "openbookqa", "wikitext")


@torch.no_grad()
def plain_losses(model: GPT2, item: Item) -> tuple[list[float], list[float]]:
    """Summed and mean loss of each ending, one forward pass each, with everything written out."""
    sums, means = [], []
    for ending in item.endings:
        row = [*item.context, *ending]
        row = row[max(0, len(row) - model.params.context_length - 1) :]
        logits = model.logits(model.hidden(torch.tensor([row[:-1]])))[0]
        log_probabilities = logits.log_softmax(dim=-1)
        losses = [-log_probabilities[place - 1, row[place]].item() for place in range(len(row) - len(ending), len(row))]
        sums.append(sum(losses))
        means.append(sum(losses) / len(losses))
    return sums, means
