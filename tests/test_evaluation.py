"""What is said about a model is true: losses and scores equal those of plain code, of Hugging Face and of lm-eval."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import (
    model_params,
    one_thread,  # noqa: F401 (a fixture)
    random_model,
    train_params,
    train_small,
    write_tokens,
)

from pipelib.errors import UserError
from pipelib.evaluation.evaluate import count_text_bytes, evaluate, evaluation_inputs
from pipelib.evaluation.harness import run_tasks
from pipelib.evaluation.hellaswag import Accuracy, Item, read_items, score, score_unigram
from pipelib.evaluation.loss import summed_loss
from pipelib.evaluation.params import TASKS, EvaluateParams
from pipelib.evaluation.report import verdict
from pipelib.files import files_under
from pipelib.model.gpt import GPT
from pipelib.model.huggingface import export_model
from pipelib.model.vocabulary import VOCAB_SIZE
from pipelib.stage import Build
from pipelib.tokens.encoding import tiktoken_encoding
from pipelib.tokens.loader import validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD, open_shard
from pipelib.tracking import NullRun

WORDS = ["the", "a", "model", "of", "data", "returns", "array", "index", "is", "not", "and", "each", "café", "日本"]
PARAMS = EvaluateParams(precision="fp32", batch_tokens=128, tasks=(), task_limit=None, sample_prompts=("The", "x ="))


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(model_params(n_embd=32, context_length=24))


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the vocabulary is laid out; and what the harness sets in the environment is taken back."""
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path_factory.getbasetemp() / "evaluation-state"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


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


# ---- Loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_does_not_depend_on_the_batch_size_and_counts_every_token(tmp_path: Path, model: GPT) -> None:
    write_tokens(tmp_path, count=4003)  # 1,000 of them to validate on, so the last row is a short one
    losses = [
        summed_loss(model, validation_batches(tmp_path / VALIDATION_SHARD, 24, rows, None), "fp32")
        for rows in (1, 7, 100)
    ]
    assert {loss.tokens for loss in losses} == {999}
    assert [loss.nats for loss in losses] == pytest.approx([losses[0].nats] * 3, rel=1e-7)


def test_the_loss_is_hugging_faces(tmp_path: Path, model: GPT) -> None:
    from transformers import GPT2LMHeadModel

    write_tokens(tmp_path, count=4003)
    export_model(model, tmp_path / "model", "")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    tokens = torch.from_numpy(open_shard(tmp_path / VALIDATION_SHARD).astype(np.int64))
    nats = 0.0
    for start in range(0, 999, 24):
        row = tokens[start : start + 25]
        with torch.no_grad():
            nats += F.cross_entropy(theirs(row[None, :-1]).logits[0], row[1:], reduction="sum").item()
    loss = summed_loss(model, validation_batches(tmp_path / VALIDATION_SHARD, 24, 8, None), "fp32")
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert loss.mean == pytest.approx(nats / 999, rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(nats / 999), rel=1e-4)


def test_the_bytes_of_a_text_are_counted_from_its_tokens() -> None:
    text = " ".join(WORDS)
    tokens = np.array([50256, *tiktoken_encoding().encode_ordinary(text)], np.uint16)
    assert count_text_bytes(tokens) == len(text.encode())


# ---- Completion ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_losses(model: GPT, item: Item) -> tuple[list[float], list[float]]:
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


@pytest.mark.parametrize("batch_tokens", [24, 100, 100_000])
def test_completion_scores_are_those_of_a_plain_implementation(tmp_path: Path, model: GPT, batch_tokens: int) -> None:
    items = read_items(write_lines(tmp_path / "items.jsonl", completion_rows(25)), tiktoken_encoding())
    assert max(len(item.context) for item in items) > model.params.context_length
    scores = score(model, items, batch_tokens, "fp32")
    expected = [plain_losses(model, item) for item in items]
    assert np.allclose(scores.sums, [sums for sums, _ in expected], rtol=1e-5)
    assert np.allclose(scores.means, [means for _, means in expected], rtol=1e-5)
    right = [int(np.argmin(sums)) == item.label for (sums, _), item in zip(expected, items, strict=True)]
    right_norm = [int(np.argmin(means)) == item.label for (_, means), item in zip(expected, items, strict=True)]
    assert scores.acc.value == sum(right) / 25
    assert scores.acc_norm.value == sum(right_norm) / 25


def test_items_are_read_as_written(tmp_path: Path) -> None:
    row = {"ctx": "The sum", "endings": ["of x", "of y", "is", "not"], "label": 2, "document": 9}
    encode = tiktoken_encoding().encode_ordinary
    (item,) = read_items(write_lines(tmp_path / "items.jsonl", [row]), tiktoken_encoding())
    assert item == Item(tuple(encode("The sum")), tuple(tuple(encode(f" {end}")) for end in row["endings"]), 2, 9)


GOOD = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "endings": ["b", "c", "d"]},
        {**GOOD, "endings": ["b", "c", "d", ""]},
        {**GOOD, "endings": ["b", "c", "d", 5]},
        {**GOOD, "label": 4},
        {**GOOD, "label": -1},
        {**GOOD, "label": "first"},
        {**GOOD, "ctx": None},
        {"ctx": "a", "label": 0},
        ["a", "b"],
        7,
    ],
    ids=str,
)
def test_a_bad_item_is_named_by_its_line(tmp_path: Path, bad: object) -> None:
    with pytest.raises(UserError, match=r"items\.jsonl, line 2 .*pipelib verify data/benchmarks --repair"):
        read_items(write_lines(tmp_path / "items.jsonl", [GOOD, bad]), tiktoken_encoding())


@pytest.mark.parametrize(("text", "message"), [("", "has no items"), (json.dumps(GOOD)[:-3], "line 1 is not an item")])
def test_a_file_without_whole_items_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_items(tmp_path / "items.jsonl", tiktoken_encoding())


def test_a_unigram_model_scores_by_how_often_tokens_occur() -> None:
    counts = np.zeros(VOCAB_SIZE, np.int64)
    counts[[1, 2]] = 7, 3
    item = Item((5,), ((1,), (1, 2), (3,), (2, 2, 2)), 0, 0)
    total = VOCAB_SIZE + 10
    one, two, none = (-math.log(share / total) for share in (8, 4, 1))
    scores = score_unigram(counts, [item])
    assert scores.sums[0].tolist() == pytest.approx([one, one + two, none, 3 * two])
    assert scores.means[0].tolist() == pytest.approx([one, (one + two) / 2, none, two])
    assert scores.acc.value == 1.0


# ---- Intervals -------------------------------------------------------------------------------------------------------


def test_an_interval_by_hand() -> None:
    # 2 of 4 right; document 0 errs by 1 - 2 · 0.5 = 0, document 1 by 0.5, document 2 by -0.5: sqrt(0.5) / 4 = 0.17678
    accuracy = Accuracy.of([True, False, True, False], [0, 0, 1, 2])
    assert (accuracy.value, accuracy.items) == (0.5, 4)
    assert accuracy.high - 0.5 == pytest.approx(1.96 * math.sqrt(0.5) / 4)
    assert 0.5 - accuracy.low == pytest.approx(1.96 * math.sqrt(0.5) / 4)


def test_items_of_one_document_that_err_together_widen_the_interval() -> None:
    right = [number % 40 < 20 for number in range(400)]  # runs of 20
    together = Accuracy.of(right, [number // 20 for number in range(400)])
    apart = Accuracy.of(right, list(range(400)))
    assert apart.high - apart.value == pytest.approx(1.96 * 0.5 / 20)
    assert together.high - together.value == pytest.approx(1.96 * 0.5 / 20 * math.sqrt(20))


def test_an_interval_is_about_that_of_a_bootstrap_over_documents() -> None:
    chance = np.random.default_rng(0)
    ease = chance.uniform(0.1, 0.6, 150)
    documents = np.repeat(np.arange(150), 6)
    right = chance.random(900) < ease[documents]
    accuracy = Accuracy.of(right.tolist(), documents.tolist())
    by_document = right.reshape(150, 6).mean(axis=1)
    draws = by_document[chance.integers(0, 150, (4000, 150))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert accuracy.high - accuracy.low == pytest.approx(high - low, rel=0.1)
    assert accuracy.low == pytest.approx(low, abs=0.01)


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (0.24, 0.26, 0.28, "includes 0.25: nothing shows"),
        (0.26, 0.28, 0.30, "lies above 0.25"),
        (0.20, 0.22, 0.24, "lies below 0.25"),
    ],
)
def test_a_verdict_says_what_the_interval_says(low: float, value: float, high: float, words: str) -> None:
    assert words in verdict("completion", Accuracy(value, low, high, 2000), None)


# ---- The lm-eval harness ---------------------------------------------------------------------------------------------


def hugging_faces_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's own view of a model in a Hugging Face folder."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    # Imported by lm-eval's module and of no use to one process, the package accelerate need not be installed.
    for module, names in {
        "accelerate": ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"),
        "accelerate.utils": ("get_max_memory",),
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names)))  # type: ignore[arg-type]
    from lm_eval.models.huggingface import HFLM

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True), batch_size=1)


def test_the_harness_scores_as_its_own_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
    chance = np.random.default_rng(4)
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "data/benchmarks/completion.jsonl", completion_rows(12))
    write_lines(tmp_path / "data/benchmarks/heldout.jsonl", [{"text": words(chance, 2, 90)} for _ in range(6)])
    export_model(model, tmp_path / "model", "")
    ours = run_tasks(model, replace(PARAMS, tasks=("completion", "heldout")), tmp_path / "scratch")
    assert {task: set(scores) for task, scores in ours.items()} == {
        "completion": {"acc", "acc_norm", "version", "examples"},
        "heldout": {"word_perplexity", "byte_perplexity", "bits_per_byte", "version", "examples"},
    }
    assert all(isinstance(value, int | float) for scores in ours.values() for value in scores.values())

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    outcome = simple_evaluate(
        model=hugging_faces_model(tmp_path / "model", monkeypatch),
        tasks=["completion", "heldout"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        log_samples=False,
    )
    for task, metrics in (
        ("completion", ("acc", "acc_norm")),
        ("heldout", ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    ):
        for metric in metrics:
            assert ours[task][metric] == pytest.approx(outcome["results"][task][f"{metric},none"], rel=1e-6), metric
    assert (ours["completion"]["examples"], ours["heldout"]["examples"]) == (12, 6)
    assert {ours[task]["version"] for task in ours} == {1.0}


def test_a_task_without_its_data_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GPT
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data is missing .*name its benchmark in download.benchmarks"):
        run_tasks(model, replace(PARAMS, tasks=("heldout",)), tmp_path / "scratch")


# ---- The stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the stage reads, after a short training."""
    folder = tmp_path_factory.mktemp("trained")
    write_tokens(folder / "tokens")
    model = train_small(folder, train_params(max_tokens=640))
    export_model(model, folder / "models", "")
    (folder / "curves").mkdir()
    for name in ("train.csv", "validation.csv", "samples.csv"):
        shutil.copy(folder / "work" / name, folder / "curves")
    write_lines(folder / "benchmarks/completion.jsonl", completion_rows(9))
    return folder


def run_evaluation(folder: Path, outs: Path) -> tuple[Any, Any]:
    """Build `outs/reports`."""
    outs.mkdir()
    build = Build(outs, outs.parent / "scratch", NullRun(), code={}, resumed_with_other_code=False)
    return evaluate(build, PARAMS, folder / "models", folder / "tokens", folder / "benchmarks", folder / "curves")


def test_the_report_says_what_was_measured_and_is_the_same_each_time(trained: Path, tmp_path: Path) -> None:
    from PIL import Image

    result, speed = run_evaluation(trained, tmp_path / "first")
    again, _ = run_evaluation(trained, tmp_path / "second")
    assert result == again
    reports = [
        {path.name: path.read_bytes() for path in files_under(tmp_path / name / "reports")}
        for name in ("first", "second")
    ]
    assert reports[0] == reports[1]
    pictures = {"loss.png", "learning_rate.png", "grad_norm.png"}
    assert reports[0].keys() == {"evaluation.md", "model_card.md", *pictures}
    text = reports[0]["evaluation.md"].decode()
    assert f"| validation loss | {result['val_loss']:.4f} nats per token |" in text
    assert f"{result['completion']['acc_norm']['value']:.4f}" in text
    assert "````text\nThe" in text
    with Image.open(tmp_path / "first/reports/loss.png") as picture:
        picture.load()
        assert picture.size == (960, 540)
    assert result["val_tokens"] == 2047
    assert result["completion"]["acc"]["items"] == 9
    assert speed["loss_seconds"] >= 0


@pytest.mark.parametrize("benchmarks", [True, False])
def test_weights_that_are_lost_are_an_error_and_no_score(trained: Path, tmp_path: Path, benchmarks: bool) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(trained, folder, ignore=None if benchmarks else shutil.ignore_patterns("completion.jsonl"))
    model = GPT(model_params())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    export_model(model, folder / "models", "")
    with pytest.raises(UserError, match="weights are lost"):
        run_evaluation(folder, tmp_path / "outs")
    assert files_under(tmp_path / "outs") == []


def test_scores_of_lost_weights_are_refused(model: GPT) -> None:
    lost = random_model(model.params)
    with torch.no_grad():
        lost.ln_f.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        score(lost, [Item((1,), ((2,), (3,), (4,), (5,)), 0, 0)], 100, "fp32")


def test_every_file_that_is_read_decides_the_evaluation(trained: Path) -> None:
    folders = (trained / "models", trained / "tokens", trained / "benchmarks", trained / "curves")
    before = evaluation_inputs(PARAMS, *folders)
    assert evaluation_inputs(replace(PARAMS, batch_tokens=64), *folders) != before
    for name in ("models/README.md", "benchmarks/completion.jsonl", "curves/train.csv", "tokens/unigram_counts.npy"):
        kept = (trained / name).read_bytes()
        (trained / name).write_bytes(kept + b"\n")
        assert evaluation_inputs(PARAMS, *folders) != before, name
        (trained / name).write_bytes(kept)
    assert evaluation_inputs(PARAMS, *folders) == before
