"""Pictures of the curves: which there are, and that equal curves give equal bytes."""

from pathlib import Path

import pytest
from PIL import Image

from pipelib.evaluation.pictures import draw_pictures

TRAIN = "step,tokens,loss,lr,grad_norm\n1,256,10.8,0.001,4.5\n2,512,9.9,0.002,2.5\n"
VALIDATION = "step,tokens,loss\n0,0,10.82\n2,512,9.95\n"
HELLASWAG = "step,tokens,acc,acc_norm,low,high\n"
ALWAYS = ["loss.png", "learning_rate.png", "grad_norm.png"]


@pytest.mark.parametrize(
    ("hellaswag", "names"),
    [
        (None, ALWAYS),
        (HELLASWAG, ALWAYS),
        (
            HELLASWAG + "2,512,0.26,0.27,0.25,0.29\n",
            ["loss.png", "hellaswag.png", "learning_rate.png", "grad_norm.png"],
        ),
    ],
    ids=["not measured", "measured never", "measured"],
)
def test_every_curve_that_is_there_is_drawn(tmp_path: Path, hellaswag: str | None, names: list[str]) -> None:
    curves = tmp_path / "curves"
    curves.mkdir()
    (curves / "train.csv").write_text(TRAIN)
    (curves / "validation.csv").write_text(VALIDATION)
    if hellaswag is not None:
        (curves / "hellaswag.csv").write_text(hellaswag)
    shown = draw_pictures(curves, tmp_path / "one")
    assert list(shown) == names
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(names)
    draw_pictures(curves, tmp_path / "two")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        with Image.open(tmp_path / "one" / name) as picture:
            picture.load()
            assert picture.width == 960
            assert len(picture.convert("L").getcolors() or []) > 5, "nothing is drawn"
