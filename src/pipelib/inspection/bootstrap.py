"""The difference between two models on the same items, with its confidence interval: a paired bootstrap over texts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelib.evaluation.items import DOCUMENTS, IDS, WEIGHTS

Scores = Mapping[str, npt.NDArray[Any]]
"""What `evaluation.items.read_scores` returns."""
RESAMPLES = 2000
_BLOCK = 1 << 22  # draws in memory at a time


@dataclass(frozen=True)
class Difference:
    """A difference of means with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the two models differ by more than the choice of texts explains."""
        return self.low > 0 or self.high < 0


def measures(scores: Scores) -> Iterator[str]:
    """The names `PREFIX/MEASURE` of all measures in the scores."""
    for prefix in sorted(name.removesuffix(f"/{IDS}") for name in scores if name.endswith(f"/{IDS}")):
        for name in sorted(scores):
            measure = name.removeprefix(f"{prefix}/")
            if name.startswith(f"{prefix}/") and "/" not in measure and measure not in (IDS, DOCUMENTS):
                yield name


def mean(scores: Scores, name: str) -> float:
    """The mean of a measure, weighted if its items have weights."""
    values = scores[name].astype(np.float64)
    return float(np.average(values, weights=scores.get(f"{name}/{WEIGHTS}")))


def paired_difference(first: Scores, second: Scores, name: str) -> Difference | None:
    """`second` minus `first` for one measure; None unless both have the same items with the same weights.

    Texts are drawn with replacement, not items, since the errors of items of one text are correlated. The draws are the same
    every time.
    """
    pair = _paired(first, second, name)
    if pair is None:
        return None
    differences, weights, documents = pair
    _, places = np.unique(documents, return_inverse=True)
    # sums per text, so that a resample only adds up the texts it drew
    totals = np.bincount(places, weights * differences), np.bincount(places, weights)
    texts, rng = len(totals[0]), np.random.default_rng(0)
    means = []
    for start in range(0, RESAMPLES, rows := max(1, _BLOCK // texts)):
        drawn = rng.integers(0, texts, (min(rows, RESAMPLES - start), texts))
        means.append(totals[0][drawn].sum(axis=1) / totals[1][drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Difference(float(totals[0].sum() / totals[1].sum()), float(low), float(high))


def _paired(
    first: Scores, second: Scores, name: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[Any]] | None:
    """Differences, weights and texts of the items, sorted by id; None unless both have the same items."""
    prefix = name.rpartition("/")[0]
    if name not in first or name not in second:
        return None
    orders = [np.argsort(scores[f"{prefix}/{IDS}"], kind="stable") for scores in (first, second)]
    ids = [scores[f"{prefix}/{IDS}"][order] for scores, order in zip((first, second), orders, strict=True)]
    if not np.array_equal(ids[0], ids[1]) or not len(ids[0]):
        return None
    weights = [
        scores.get(f"{name}/{WEIGHTS}", np.ones(len(order)))[order].astype(np.float64)
        for scores, order in zip((first, second), orders, strict=True)
    ]
    if not np.array_equal(weights[0], weights[1]):
        return None
    before, after = (
        scores[name][order].astype(np.float64) for scores, order in zip((first, second), orders, strict=True)
    )
    return after - before, weights[0], first[f"{prefix}/{DOCUMENTS}"][orders[0]]
