"""The scores of every single item, kept so that two models can later be compared item by item.

`reports/items.npz` is a compressed NumPy archive. Each name in it starts with PREFIX, the data that was scored:
`validation`, `completion`, `hellaswag` or `lm_eval/TASK`.

    PREFIX/MEASURE            one number per item, in the order of the data (items,): 0 or 1 for a wrong or right answer, or a
                              loss in nats; the measure is the mean of these numbers
    PREFIX/MEASURE/weights    the weight of each item in that mean (items,), if they are not equal: tokens, words or bytes
    PREFIX/ids                a number for the item's content (items,), uint64: equal exactly if two models had the same item
    PREFIX/documents          the text that an item belongs to (items,), int64: items of one text are not independent

Equal results give equal bytes. This module needs only NumPy.
"""

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError, how_to_repair
from pipelib.files import write_atomic

IDS, DOCUMENTS, WEIGHTS = "ids", "documents", "weights"
Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class ItemScores:
    """The scores of each item of one data set, in its order."""

    ids: npt.NDArray[np.uint64]
    """See `item_ids` (items,)."""
    documents: npt.NDArray[np.int64]
    """The text that each item belongs to (items,)."""
    values: Mapping[str, Numbers]
    """By measure (items,): right or wrong, or a loss in nats."""
    weights: Mapping[str, Numbers] = field(default_factory=dict)
    """By measure (items,), for those that are a weighted mean."""


@dataclass(frozen=True)
class Measured:
    """The result of measuring one model."""

    result: dict[str, Any]
    """As in metrics/evaluate.json: losses, accuracies with intervals, the harness's scores."""
    items: dict[str, ItemScores]
    """The scores of every item, by the data set."""
    seconds: dict[str, float]
    """The time that each part took."""


def item_ids(contents: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """A number for each item's content: the first 8 bytes of its SHA-256."""
    digests = [hashlib.sha256(content).digest()[:8] for content in contents]
    return np.frombuffer(b"".join(digests), "<u8")


def write_items(path: Path, scores: Mapping[str, ItemScores]) -> None:
    """Write the scores of several data sets, by their prefixes."""
    arrays: dict[str, Numbers] = {}
    for prefix, items in scores.items():
        named = {IDS: items.ids, DOCUMENTS: items.documents, **items.values}
        named |= {f"{measure}/{WEIGHTS}": weights for measure, weights in items.weights.items()}
        assert {len(array) for array in named.values()} == {len(items.ids)}, f"{prefix}: not one number an item"
        arrays |= {f"{prefix}/{name}": array for name, array in named.items()}
    with write_atomic(path) as file:
        # Sorted, so that equal results give equal bytes.
        np.savez_compressed(file, allow_pickle=False, **{name: arrays[name] for name in sorted(arrays)})


def read_scores(path: Path) -> dict[str, Numbers]:
    """Read every array of the file by its name; see the top of this module.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so there are no items to compare; run dvc repro.") from None
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a valid item-scores file ({error}), so it cannot be trusted; {how_to_repair('reports')}."
        ) from None


def read_items_file(path: Path) -> dict[str, ItemScores]:
    """Read the scores of every data set by its prefix: what `write_items` was given.

    Raises:
        UserError: the file is missing or damaged.
    """
    arrays = read_scores(path)
    found = {}
    for prefix in sorted(name.removesuffix(f"/{IDS}") for name in arrays if name.endswith(f"/{IDS}")):
        own = {
            name.removeprefix(f"{prefix}/"): array for name, array in arrays.items() if name.startswith(f"{prefix}/")
        }
        found[prefix] = ItemScores(
            own[IDS],
            own[DOCUMENTS],
            {name: array for name, array in own.items() if "/" not in name and name not in (IDS, DOCUMENTS)},
            {name.removesuffix(f"/{WEIGHTS}"): array for name, array in own.items() if name.endswith(f"/{WEIGHTS}")},
        )
    return found
