"""Pictures of a training's curves for the report, the README and MLflow. The same curves give the same bytes.

`dvc plots show` draws the same columns (dvc.yaml, .dvc/plots), for several runs and with values under the pointer.
Throughput is only in `dvc plots show`: it differs from run to run, and reports/ must be reproducible.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelib.evaluation.curves import read_curve

Line = tuple[str, float]
"""The label of a horizontal line, and its value."""


def draw_loss(curves: Path, path: Path, vocab_size: int, levels: Sequence[Line] = ()) -> None:
    """Draw the training and validation loss over the tokens seen.

    Args:
        vocab_size: the number of tokens that a uniform guess chooses among.
        levels: losses of other models on the same text.
    """
    train, validation = read_curve(curves / "train.csv"), read_curve(curves / "validation.csv")
    with _axes(path, "loss, nats per token") as axes:
        axes.plot(train["tokens"], train["loss"], color="#9ecae1", linewidth=0.8, label="training, each step")
        axes.plot(
            validation["tokens"], validation["val_loss"], color="#08519c", marker="o", markersize=4, label="validation"
        )
        axes.axhline(
            math.log(vocab_size),
            color="#888888",
            linestyle=":",
            linewidth=1,
            label=f"uniform guess, ln {vocab_size:,}",
        )
        _draw_levels(axes, levels)


def draw_hellaswag(curves: Path, path: Path, levels: Sequence[Line] = ()) -> None:
    """Draw HellaSwag's acc_norm over the tokens seen, with its 95 % interval."""
    curve = read_curve(curves / "hellaswag.csv")
    with _axes(path, "HellaSwag acc_norm, completion style") as axes:
        axes.fill_between(curve["tokens"], curve["low"], curve["high"], color="#9ecae1", alpha=0.5, linewidth=0)
        axes.plot(
            curve["tokens"],
            curve["acc_norm"],
            color="#08519c",
            marker="o",
            markersize=4,
            label="this model, 95 % interval",
        )
        axes.axhline(0.25, color="#888888", linestyle=":", linewidth=1, label="chance")
        _draw_levels(axes, levels)


def draw_column(curves: Path, column: str, path: Path, y_label: str) -> None:
    """Draw a column of train.csv over the steps."""
    train = read_curve(curves / "train.csv")
    with _axes(path, y_label, "step", height=3.0) as axes:
        axes.plot(train["step"], train[column], color="#08519c", linewidth=0.9)


def has_rows(curve: Path) -> bool:
    """Whether a curve exists and has rows."""
    return curve.exists() and any(read_curve(curve).values())


def _draw_levels(axes: Any, levels: Sequence[Line]) -> None:
    for (label, value), color in zip(levels, ("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#666666"), strict=False):
        axes.axhline(value, color=color, linestyle="--", linewidth=1, label=label)


@contextmanager
def _axes(path: Path, y_label: str, x_label: str = "tokens trained on", height: float = 4.5) -> Iterator[Any]:
    """Axes that are saved as a picture in `path` at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, height), dpi=120)
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
    figure.savefig(path, metadata={"Software": None})  # the library's version would change the bytes
    pyplot.close(figure)
