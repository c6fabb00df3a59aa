"""The curves of a training, read: CSV files of a row a step, which train writes into curves/."""

import csv
from pathlib import Path

OLD_NAMES = {("train.csv", "lr"): "learning_rate", ("validation.csv", "loss"): "val_loss"}
"""What columns were called before, by file."""


def read_curve(path: Path) -> dict[str, list[float]]:
    """The columns of a curve by their names of today, (rows,) each; a curve in which nothing was written yet has empty ones."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        columns = reader.fieldnames or ()
        return {OLD_NAMES.get((path.name, name), name): [float(row[name]) for row in rows] for name in columns}
