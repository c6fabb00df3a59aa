"""Pictures of the curves: what they show, and that equal curves give equal bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipelib.evaluation.pictures import draw_column, draw_hellaswag, draw_loss, has_rows

TRAIN = "step,tokens,loss,lr,grad_norm\n1,256,10.8,0.001,4.5\n2,512,9.9,0.002,2.5\n"
VALIDATION = "step,tokens,loss\n0,0,10.82\n2,512,9.95\n"
HELLASWAG = "step,tokens,acc,acc_norm,low,high\n"


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    folder = tmp_path / "curves"
    folder.mkdir()
    (folder / "train.csv").write_text(TRAIN)
    (folder / "validation.csv").write_text(VALIDATION)
    (folder / "hellaswag.csv").write_text(HELLASWAG + "2,512,0.26,0.27,0.25,0.29\n")
    return folder


@pytest.mark.parametrize(
    "draw",
    [
        lambda curves, path: draw_loss(curves, path, 50257, [("GPT-2, measured", 3.29)]),
        lambda curves, path: draw_hellaswag(curves, path, [("GPT-2, published", 0.2955)]),
        lambda curves, path: draw_column(curves, "grad_norm", path, "gradient norm"),
    ],
    ids=["loss", "hellaswag", "column"],
)
def test_a_picture_shows_something_and_is_the_same_each_time(
    curves: Path, tmp_path: Path, draw: Callable[[Path, Path], None]
) -> None:
    for name in ("one.png", "two.png"):
        draw(curves, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        picture.load()
        assert picture.width == 960
        assert len(picture.convert("L").getcolors() or []) > 5, "nothing is drawn"


def test_a_curve_that_was_never_measured_is_not_drawn(curves: Path) -> None:
    assert has_rows(curves / "hellaswag.csv")
    (curves / "hellaswag.csv").write_text(HELLASWAG)
    assert not has_rows(curves / "hellaswag.csv")
    assert not has_rows(curves / "none.csv")
