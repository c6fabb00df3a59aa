"""Read the curves of a training: CSV files with one row per step, which train writes into curves/."""

import csv
from pathlib import Path

OLD_NAMES = {("train.csv", "lr"): "learning_rate", ("validation.csv", "loss"): "val_loss"}
"""Today's names of columns that earlier versions named otherwise, by file and old name."""


def read_curve(path: Path) -> dict[str, list[float]]:
    """Read the columns of a curve by their names, (rows,) each. The columns of a curve without rows are empty."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        columns = reader.fieldnames or ()
        return {OLD_NAMES.get((path.name, name), name): [float(row[name]) for row in rows] for name in columns}
