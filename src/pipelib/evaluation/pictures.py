"""The curves of a training as pictures, a function of `curves/` alone: for the report, the README and MLflow.

`dvc plots show` draws the same columns (dvc.yaml, .dvc/plots), for several runs and with values under the pointer.
Throughput is not among these pictures, since reports/ reproduces and throughput does not; it is in `dvc plots show`.
"""

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelib.model.vocabulary import VOCAB_SIZE

GPT2_HELLASWAG = 0.2955
"""acc_norm of OpenAI's GPT-2 124M, completion style, as build-nanogpt (Karpathy, 2024) publishes it."""
CHANCE = 0.25
_LIGHT, _DARK, _GREY = "#9ecae1", "#08519c", "#888888"


def draw_pictures(curves: Path, folder: Path) -> dict[str, str]:
    """Draw every curve that `curves` has.

    Returns:
        What each picture shows, by its file's name in `folder`, in the order in which to show them. `hellaswag.png` is
        among them where training measured HellaSwag.
    """
    draw_loss(curves, folder / "loss.png")
    shown = {"loss.png": "Loss of training and validation"}
    hellaswag = curves / "hellaswag.csv"
    if hellaswag.exists() and _columns(hellaswag).get("step"):
        draw_hellaswag(hellaswag, folder / "hellaswag.png")
        shown["hellaswag.png"] = "HellaSwag while training"
    train = _columns(curves / "train.csv")
    for name, column, title in (
        ("learning_rate.png", "lr", "learning rate"),
        ("grad_norm.png", "grad_norm", "gradient norm before clipping"),
    ):
        with _axes(folder / name, "step", title, height=3.0) as axes:
            axes.plot(train["step"], train[column], color=_DARK, linewidth=0.9)
        shown[name] = title.capitalize()
    return shown


def draw_loss(curves: Path, path: Path) -> None:
    """A picture of the training and validation loss over the tokens seen."""
    train, validation = _columns(curves / "train.csv"), _columns(curves / "validation.csv")
    with _axes(path, "tokens trained on", "loss, nats per token") as axes:
        axes.plot(train["tokens"], train["loss"], color=_LIGHT, linewidth=0.8, label="training, each step")
        axes.plot(
            validation["tokens"], validation["loss"], color=_DARK, marker="o", markersize=4, label="validation"
        )  # fmt: skip
        _line(axes, math.log(VOCAB_SIZE), ":", f"uniform guess, ln {VOCAB_SIZE:,}")


def draw_hellaswag(curve: Path, path: Path) -> None:
    """A picture of HellaSwag's acc_norm over the tokens seen, with its 95 % interval, beside GPT-2's."""
    scores = _columns(curve)
    with _axes(path, "tokens trained on", "HellaSwag, acc_norm") as axes:
        axes.fill_between(scores["tokens"], scores["low"], scores["high"], color=_LIGHT, alpha=0.5, linewidth=0)
        axes.plot(scores["tokens"], scores["acc_norm"], color=_DARK, marker="o", markersize=4, label="this model")
        _line(axes, GPT2_HELLASWAG, "--", f"OpenAI's GPT-2 124M, {GPT2_HELLASWAG}")
        _line(axes, CHANCE, ":", f"chance, {CHANCE}")


@contextmanager
def _axes(path: Path, x_label: str, y_label: str, height: float = 4.5) -> Iterator[Any]:
    """Axes to draw on; the picture is written to `path` when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, height), dpi=120)
    try:
        yield axes
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})  # the library's version would change the bytes
    finally:
        pyplot.close(figure)


def _line(axes: Any, height: float, style: str, label: str) -> None:
    axes.axhline(height, color=_GREY, linestyle=style, linewidth=1, label=label)


def _columns(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers, by name; empty lists where it has no rows."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    return {name: [float(row[name]) for row in rows] for name in reader.fieldnames or ()}
