"""Scores of single items survive being written, as equal bytes, and a damaged file is refused."""

from pathlib import Path

import numpy as np
import pytest

from pipelib.errors import UserError
from pipelib.evaluation.items import ItemScores, item_ids, read_items_file, read_scores, write_items

SCORES = {
    "validation": ItemScores(
        item_ids([b"a", b"b", b"c"]),
        np.arange(3),
        {"loss": np.array([5.5, 4.25, 3.0])},
        {"loss": np.array([16, 16, 7])},
    ),
    "lm_eval/hellaswag": ItemScores(
        item_ids([b"x", b"y"]), np.array([4, 4]), {"acc": np.array([True, False]), "acc_norm": np.array([True, True])}
    ),
}


def test_scores_are_read_as_written(tmp_path: Path) -> None:
    write_items(tmp_path / "items.npz", SCORES)
    assert {name: array.tolist() for name, array in read_scores(tmp_path / "items.npz").items()} == {
        "lm_eval/hellaswag/acc": [True, False],
        "lm_eval/hellaswag/acc_norm": [True, True],
        "lm_eval/hellaswag/documents": [4, 4],
        "lm_eval/hellaswag/ids": item_ids([b"x", b"y"]).tolist(),
        "validation/documents": [0, 1, 2],
        "validation/ids": item_ids([b"a", b"b", b"c"]).tolist(),
        "validation/loss": [5.5, 4.25, 3.0],
        "validation/loss/weights": [16, 16, 7],
    }
    again = read_items_file(tmp_path / "items.npz")
    assert again.keys() == SCORES.keys()
    for prefix, items in SCORES.items():
        assert again[prefix].ids.tolist() == items.ids.tolist()
        assert again[prefix].documents.tolist() == items.documents.tolist()
        for ours, theirs in ((again[prefix].values, items.values), (again[prefix].weights, items.weights)):
            assert {name: array.tolist() for name, array in ours.items()} == {
                name: array.tolist() for name, array in theirs.items()
            }


def test_equal_scores_are_equal_bytes(tmp_path: Path) -> None:
    write_items(tmp_path / "one.npz", SCORES)
    write_items(tmp_path / "two.npz", dict(reversed(SCORES.items())))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_an_item_has_its_own_number() -> None:
    one, two, again = item_ids([b"one", b"two", b"one"]).tolist()
    assert one == again != two


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive at all"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "items.npz").write_bytes(content)
    with pytest.raises(UserError, match="is not a valid item-scores file"):
        read_scores(tmp_path / "items.npz")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "items.npz", SCORES)
    whole = (tmp_path / "items.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be trusted"):
        read_scores(tmp_path / "cut.npz")


def test_a_missing_file_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run dvc repro"):
        read_scores(tmp_path / "items.npz")
