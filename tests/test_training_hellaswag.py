"""`train.hellaswag_every`: the score that the evaluation gives, at its steps, the same for any number of ranks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_params import model_params, train_params
from small_run import ALONE, curve, random_model, train_small, write_tokens
from small_vocabulary import TOKENIZER

from pipelib.errors import UserError
from pipelib.evaluation.benchmark_items import read_items
from pipelib.evaluation.hellaswag import score
from pipelib.training.inputs import require_hellaswag
from pipelib.training.probes import HELLASWAG, HellaSwag

TEXT = "the loss of a model is what it does not know about the text that it is given"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tokens and seven items."""
    write_tokens(tmp_path / "tokens")
    words = TEXT.split()
    rows = [
        {
            "ctx": " ".join(words[n : n + 4]),
            "endings": [" ".join(words[m : m + 3]) for m in range(n, n + 4)],
            "label": n % 4,
        }
        for n in range(7)
    ]
    (tmp_path / HELLASWAG).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_it_is_scored_at_its_steps_and_at_the_last(folder: Path) -> None:
    params = train_params(max_tokens=64 * 10, hellaswag_every=4)
    model = train_small(folder, params)
    rows = curve(folder, "hellaswag")
    assert [row["step"] for row in rows] == [4, 8, 10]
    assert [row["tokens"] for row in rows] == [256, 512, 640]
    expected = score(model, read_items(folder / HELLASWAG, TOKENIZER), 64, "fp32")
    assert (rows[-1]["acc_norm"], rows[-1]["acc"]) == (expected.acc_norm.value, expected.acc.value)
    assert (rows[-1]["low"], rows[-1]["high"]) == (expected.acc_norm.low, expected.acc_norm.high)


def test_scoring_changes_no_step_and_null_scores_nothing(folder: Path) -> None:
    train_small(folder, train_params(max_tokens=64 * 10))
    losses = (folder / "work/train.csv").read_bytes()
    assert curve(folder, "hellaswag") == []
    (folder / "work").rename(folder / "other")
    train_small(folder, train_params(max_tokens=64 * 10, hellaswag_every=3))
    assert (folder / "work/train.csv").read_bytes() == losses


@pytest.mark.parametrize("world_size", [2, 8])
def test_ranks_share_the_items(folder: Path, world_size: int) -> None:
    model, params = random_model(model_params()), train_params(micro_batch_size=1)
    shares = []

    def note(losses: object) -> object:
        shares.append(losses)
        return losses

    for rank in range(world_size):
        world = SimpleNamespace(rank=rank, world_size=world_size, sum_exactly=note)
        HellaSwag(params, folder, TOKENIZER, world).measure(model)  # type: ignore[arg-type]
    whole = HellaSwag(params, folder, TOKENIZER, ALONE).measure(model)
    sums, means = sum(shares)
    assert sums == pytest.approx(whole.sums, abs=1e-4)
    assert means == pytest.approx(whole.means, abs=1e-4)
    assert (sums > 0).all()


def test_without_items_the_stage_says_what_to_do(folder: Path) -> None:
    items = folder / HELLASWAG
    assert require_hellaswag(train_params(), folder) == {}
    before = require_hellaswag(train_params(hellaswag_every=5), folder)
    items.write_text(items.read_text() * 2)
    assert require_hellaswag(train_params(hellaswag_every=5), folder) != before
    items.write_text("")  # as download leaves it where nobody asks for it
    with pytest.raises(UserError, match=r"name hellaswag in download.benchmarks and run dvc repro"):
        require_hellaswag(train_params(hellaswag_every=5), folder)
