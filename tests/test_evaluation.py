"""What is said about a model is true: losses and completion scores equal those of plain code and of Hugging Face."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_evaluation import (
    WORDS,
    completion_rows,
    plain_losses,
    real_data,
    small_model,
    state,  # noqa: F401 (a fixture)
    write_lines,
)
from small_params import model_params
from small_run import random_model, write_tokens

from pipelib.errors import UserError
from pipelib.evaluation.benchmark_items import Item, read_items
from pipelib.evaluation.endings import score_endings
from pipelib.evaluation.hellaswag import Accuracy, score, score_unigram
from pipelib.evaluation.loss import Loss, losses_of_rows, summed_loss
from pipelib.evaluation.measure import Data, accuracy_json, contexts_cut, count_text_bytes, measure_loss
from pipelib.evaluation.params import EvaluateParams
from pipelib.evaluation.report import verdict
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model
from pipelib.tokens.loader import validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD, open_shard
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


@pytest.fixture(scope="module")
def model() -> GPT2:
    return small_model()


# ---- Loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_does_not_depend_on_the_batch_size_and_counts_every_token(tmp_path: Path, model: GPT2) -> None:
    # 1,000 of the tokens to validate on, so the last row is a short one
    write_tokens(tmp_path, count=4003, tokenizer=GPT2_TOKENIZER)
    losses = [
        summed_loss(model, validation_batches(tmp_path / VALIDATION_SHARD, 24, rows, None), "fp32")
        for rows in (1, 7, 100)
    ]
    assert {loss.tokens for loss in losses} == {999}
    assert [loss.nats for loss in losses] == pytest.approx([losses[0].nats] * 3, rel=1e-7)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_shares_of_several_ranks_add_up_to_the_loss(tmp_path: Path, model: GPT2, world_size: int) -> None:
    write_tokens(tmp_path, count=4003, tokenizer=GPT2_TOKENIZER)
    whole = summed_loss(model, validation_batches(tmp_path / VALIDATION_SHARD, 24, 4, None), "fp32")
    batches = list(validation_batches(tmp_path / VALIDATION_SHARD, 24, 4, None))
    shares = [summed_loss(model, batches[rank::world_size], "fp32") for rank in range(world_size)]
    together = Loss(sum(share.nats for share in shares), sum(share.tokens for share in shares))
    assert together.tokens == whole.tokens
    assert together.mean == pytest.approx(whole.mean, rel=1e-9)


def test_every_row_has_its_own_loss(tmp_path: Path, model: GPT2) -> None:
    write_tokens(tmp_path, count=4003, tokenizer=GPT2_TOKENIZER)
    seen: list[int] = []
    batches = list(validation_batches(tmp_path / VALIDATION_SHARD, 24, 7, None))
    nats, tokens = losses_of_rows(model, batches, "fp32", seen.append)
    assert sum(seen) == tokens.sum() == 999
    assert tokens.tolist() == [24] * 41 + [15]
    rows = [pair for inputs, targets in batches for pair in zip(inputs, targets, strict=True)]
    for row in (0, 20, 41):
        inputs, targets = map(torch.from_numpy, rows[row])
        with torch.no_grad():
            alone = F.cross_entropy(model.logits(model.hidden(inputs[None]))[0], targets)
        assert nats[row] / tokens[row] == pytest.approx(alone.item(), rel=1e-5)


def test_a_row_belongs_to_the_document_that_it_begins_in(tmp_path: Path, model: GPT2) -> None:
    write_tokens(tmp_path, count=4003, tokenizer=GPT2_TOKENIZER)  # a document has 40 tokens, a row 24
    _, items = measure_loss(
        "m", model, EvaluateParams("fp32", 60, (), None, (), ()), Data(tmp_path, Path(), GPT2_TOKENIZER)
    )
    assert items.documents.tolist() == [1 + row * 24 // 40 for row in range(42)]


def test_a_loss_too_large_for_a_perplexity_is_no_crash() -> None:
    assert Loss(8000.0, 10).perplexity == math.inf


def test_bits_per_byte_by_hand() -> None:
    assert Loss(nats=8 * math.log(2), tokens=4).bits_per_byte(text_bytes=16) == pytest.approx(0.5)


def test_the_loss_is_hugging_faces(tmp_path: Path, model: GPT2) -> None:
    from transformers import GPT2LMHeadModel

    write_tokens(tmp_path, count=4003, tokenizer=GPT2_TOKENIZER)
    export_model(model, GPT2_TOKENIZER, tmp_path / "model", {})
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
    tokens = np.array([50256, *GPT2_TOKENIZER.encode(text)], np.uint16)
    assert count_text_bytes(tokens, GPT2_TOKENIZER) == len(text.encode())


# ---- Completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [24, 100, 100_000])
def test_completion_scores_are_those_of_a_plain_implementation(tmp_path: Path, model: GPT2, batch_tokens: int) -> None:
    items = read_items(write_lines(tmp_path / "items.jsonl", completion_rows(25)), GPT2_TOKENIZER)
    assert max(len(item.context) for item in items) > model.params.context_length
    scores = score(model, items, batch_tokens, "fp32")
    expected = [plain_losses(model, item) for item in items]
    assert np.allclose(scores.sums, [sums for sums, _ in expected], rtol=1e-5)
    assert np.allclose(scores.means, [means for _, means in expected], rtol=1e-5)
    right = [int(np.argmin(sums)) == item.label for (sums, _), item in zip(expected, items, strict=True)]
    right_norm = [int(np.argmin(means)) == item.label for (_, means), item in zip(expected, items, strict=True)]
    assert scores.acc.value == sum(right) / 25
    assert scores.acc_norm.value == sum(right_norm) / 25


def test_predictions_on_real_items_are_those_of_a_plain_implementation() -> None:
    """`PIPELIB_TEST_DATA=FOLDER`: every item of FOLDER/hellaswag*.jsonl, by a model with the context of GPT-2."""
    (path,) = real_data().glob("hellaswag*.jsonl")
    wide = random_model(model_params(n_embd=64, context_length=1024), tokenizer=GPT2_TOKENIZER)
    items = read_items(path, GPT2_TOKENIZER)
    scores = score(wide, items, 4096, "fp32")
    for number, item in enumerate(items):
        sums, means = plain_losses(wide, item)
        assert int(np.argmin(sums)) == scores.sums[number].argmin()
        assert int(np.argmin(means)) == scores.means[number].argmin()


def test_an_ending_longer_than_the_context_is_scored_in_pieces(model: GPT2) -> None:
    chance = np.random.default_rng(5)
    context, ending = (5, 6, 7), tuple(chance.integers(0, 500, 60).tolist())
    ((found, short),) = score_endings(model, [(context, [ending, (9, 9)])], 100, "fp32")
    row = [*context[-1:], *ending]
    for start in (0, 24, 48):  # 24 tokens at a time, the first after one token of the context
        piece = torch.tensor([row[start : start + 25]])
        losses = F.cross_entropy(model.logits(model.hidden(piece[:, :-1]))[0], piece[0, 1:], reduction="none")
        assert found.losses[start : start + 24] == pytest.approx(losses.detach().numpy(), rel=1e-4)
    assert len(found.losses) == 60
    assert len(short.losses) == 2


@pytest.mark.parametrize("batch_tokens", [24, 300])
def test_many_endings_share_their_context_without_seeing_each_other(model: GPT2, batch_tokens: int) -> None:
    chance = np.random.default_rng(6)
    context = tuple(chance.integers(0, 500, 9).tolist())
    endings = [tuple(chance.integers(0, 500, count).tolist()) for count in (1, 3, 16, 2, 5, 1, 15)]
    (together,) = score_endings(model, [(context, endings)], batch_tokens, "fp32", with_greedy=True)
    for ending, found in zip(endings, together, strict=True):
        ((alone,),) = score_endings(model, [(context, [ending])], batch_tokens, "fp32", with_greedy=True)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)
        assert found.greedy == alone.greedy


def test_the_models_own_choices_are_greedy(model: GPT2) -> None:
    context = [3, 1, 4]
    ending: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            ending.append(int(model.logits(model.hidden(torch.tensor([[*context, *ending]])))[0, -1].argmax()))
    other = [*ending[:-1], ending[-1] + 1]
    ((own, not_own),) = score_endings(model, [(context, [ending, other])], 100, "fp32", with_greedy=True)
    assert own.greedy
    assert not not_own.greedy


def test_bf16_tells_the_likeliest_token_from_the_next_also_far_from_zero(model: GPT2) -> None:
    """Logits of published models lie between -30 and -120, where bf16 has steps of a quarter to a half."""
    far = random_model(model.params, tokenizer=GPT2_TOKENIZER)
    with torch.no_grad():
        far.wte.weight[:, 0] = 1.0  # adds the same number to all logits
        far.ln_f.weight[0] = 0.0
        far.ln_f.bias[0] = -100.0
        context = [3, 1, 4]
        best = far.logits(far.hidden(torch.tensor([context])))[0, -1].topk(2).indices.tolist()
        assert far.logits(far.hidden(torch.tensor([context])))[0, -1, best[0]] < -60
    ((first, second),) = score_endings(far, [(context, [[best[0]], [best[1]]])], 100, "bf16", with_greedy=True)
    ((exact, _),) = score_endings(far, [(context, [[best[0]], [best[1]]])], 100, "fp32")
    assert first.greedy
    assert not second.greedy
    assert first.losses[0] == pytest.approx(exact.losses[0], abs=0.05)
    tokens = torch.tensor([[*context, best[0]]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = far.token_losses(tokens[:, :-1], tokens[:, 1:])
    assert losses[0, -1].item() == pytest.approx(exact.losses[0], abs=0.05)


TEXTS = ("context", "a", "b", "c", "d")


def small_items() -> list[Item]:
    chance = np.random.default_rng(8)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(chance.integers(0, 500, chance.integers(1, most)).tolist())

    return [Item(tokens(12), tuple(tokens(9) for _ in range(4)), 0, number, TEXTS) for number in range(9)]


def test_the_shares_of_several_ranks_are_the_scores(model: GPT2) -> None:
    items = small_items()
    whole = score(model, items, 100, "fp32")
    for rank in (0, 1):
        share = score(model, items[rank::2], 100, "fp32")
        assert np.allclose(share.sums, whole.sums[rank::2], rtol=1e-5)


def test_bf16_scores_are_about_those_of_fp32(model: GPT2) -> None:
    items = small_items()
    assert np.allclose(score(model, items, 100, "bf16").means, score(model, items, 100, "fp32").means, rtol=0.02)


def test_no_items_have_no_scores(model: GPT2) -> None:
    """A rank may have none."""
    assert score(model, [], 100, "fp32").sums.shape == (0, 4)


def test_items_whose_context_is_cut_are_counted() -> None:
    endings = ((1,), (1, 2), (1, 2, 3), (1,))
    items = [Item((5,) * length, endings, 0, 0, TEXTS) for length in (20, 21, 22, 23)]  # 22 + 3 - 1 = 24
    assert contexts_cut(items, 24) == 1


def test_items_are_read_as_written(tmp_path: Path) -> None:
    row = {"ctx": "The sum", "endings": ["of x", "of y", "is", "not"], "label": 2, "document": 9}
    encode = GPT2_TOKENIZER.encode
    (item,) = read_items(write_lines(tmp_path / "items.jsonl", [row]), GPT2_TOKENIZER)
    assert item == Item(
        tuple(encode("The sum")),
        tuple(tuple(encode(f" {end}")) for end in row["endings"]),
        2,
        9,
        ("The sum", *row["endings"]),
    )


GOOD = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "endings": ["b", "c", "d"]},
        {**GOOD, "endings": []},
        {**GOOD, "endings": ["b", "c", "d", ""]},
        {**GOOD, "endings": ["b", "c", "d", " \n"]},
        {**GOOD, "endings": ["b", "c", "d", 5]},
        {**GOOD, "label": 4},
        {**GOOD, "label": -1},
        {**GOOD, "label": "first"},
        {**GOOD, "ctx": None},
        {"ctx": "a", "label": 0},
        {**GOOD, "endings": "bcde"},
        {**GOOD, "label": 1.7},
        {**GOOD, "label": math.inf},
        ["a", "b"],
        7,
    ],
    ids=str,
)
def test_a_bad_item_is_named_by_its_line(tmp_path: Path, bad: object) -> None:
    with pytest.raises(UserError, match=r"items\.jsonl, line 2 .*pipelib verify data/benchmarks --repair"):
        read_items(write_lines(tmp_path / "items.jsonl", [GOOD, bad]), GPT2_TOKENIZER)


@pytest.mark.parametrize(("text", "message"), [("", "has no items"), (json.dumps(GOOD)[:-3], "line 1 is not an item")])
def test_a_file_without_whole_items_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_items(tmp_path / "items.jsonl", GPT2_TOKENIZER)


def test_a_unigram_model_scores_by_how_often_tokens_occur() -> None:
    counts = np.zeros(GPT2_TOKENIZER.size, np.int64)
    counts[[1, 2]] = 7, 3
    item = Item((5,), ((1,), (1, 2), (3,), (2, 2, 2)), 0, 0, TEXTS)
    total = GPT2_TOKENIZER.size + 10
    one, two, none = (-math.log(share / total) for share in (8, 4, 1))
    scores = score_unigram(counts, [item])
    assert scores.sums[0].tolist() == pytest.approx([one, one + two, none, 3 * two])
    assert scores.means[0].tolist() == pytest.approx([one, (one + two) / 2, none, two])
    assert scores.acc.value == 1.0


# ---- Intervals -------------------------------------------------------------------------------------------------------


def test_an_interval_by_hand() -> None:
    # 2 of 4 right; document 0 errs by 1 - 2 · 0.5 = 0, document 1 by 0.5, document 2 by -0.5; 3 documents: sqrt(0.5 · 3/2) / 4
    accuracy = Accuracy.of([True, False, True, False], [0, 0, 1, 2])
    assert (accuracy.value, accuracy.items) == (0.5, 4)
    assert accuracy.high - 0.5 == pytest.approx(1.96 * math.sqrt(0.75) / 4)
    assert 0.5 - accuracy.low == pytest.approx(1.96 * math.sqrt(0.75) / 4)


def test_an_interval_is_wide_where_little_is_known() -> None:
    one = Accuracy.of([True, True, True, False], [0, 0, 0, 0])
    assert (one.value, one.low, one.high) == (0.75, 0.0, 1.0)
    none, all_of_them = Accuracy.of([False] * 9, range(9)), Accuracy.of([True] * 9, range(9))
    assert (none.low, all_of_them.high) == (0.0, 1.0)
    assert none.high == pytest.approx(1 - all_of_them.low)
    assert none.high == pytest.approx(0.2991, abs=1e-4)  # Wilson's for 0 of 9
    assert none.excludes(0.5)
    assert not none.excludes(0.25)


def test_items_of_one_document_that_err_together_widen_the_interval() -> None:
    right = [number % 40 < 20 for number in range(400)]  # runs of 20
    together = Accuracy.of(right, [number // 20 for number in range(400)])
    apart = Accuracy.of(right, list(range(400)))
    assert apart.high - apart.value == pytest.approx(1.96 * 0.5 / 20 * math.sqrt(400 / 399))
    assert together.high - together.value == pytest.approx(1.96 * 0.5 / 20 * math.sqrt(20 * 20 / 19))


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
        (0.26, 0.28, 0.30, "is above 0.25"),
        (0.20, 0.22, 0.24, "is below 0.25"),
    ],
)
def test_a_verdict_says_what_the_interval_says(low: float, value: float, high: float, words: str) -> None:
    assert words in verdict("completion", accuracy_json(Accuracy(value, low, high, 2000)), None)


# ---- Lost weights ----------------------------------------------------------------------------------------------------


def test_scores_of_lost_weights_are_refused(model: GPT2) -> None:
    lost = random_model(model.params, tokenizer=GPT2_TOKENIZER)
    with torch.no_grad():
        lost.ln_f.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        score(lost, [Item((1,), ((2,), (3,), (4,), (5,)), 0, 0, TEXTS)], 100, "fp32")
