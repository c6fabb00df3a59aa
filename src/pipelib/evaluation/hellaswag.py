"""Four-way completion in the style of build-nanogpt: the likeliest ending wins.

An item is a context and four endings (HellaSwag, Zellers et al., 2019). Every ending is scored by the loss of its tokens
after context + " "; `acc` takes the smallest sum, `acc_norm` the smallest mean per token, `acc_norm_bytes` the smallest
loss per byte, which compares between vocabularies.
The lm-eval harness scores HellaSwag differently (activity label, cleaned text, per character). Its figures have other names
and are never mixed with these.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelib.evaluation.benchmark_items import ENDINGS, Item
from pipelib.evaluation.endings import score_endings
from pipelib.model.decoder import Decoder


@dataclass(frozen=True)
class Accuracy:
    """The share of right answers, with its 95 % interval."""

    value: float
    low: float
    high: float
    items: int

    @classmethod
    def of(cls, correct: Sequence[bool], documents: Sequence[int]) -> "Accuracy":
        """The mean, and the normal interval of a mean over clusters (Liang and Zeger, 1986).

        Errors in items of one document are correlated, so documents, not items, are the independent units. If all items are
        right, or all wrong, the interval is Wilson's (1927) with one trial per document. A single document gives 0 to 1.
        """
        value = sum(correct) / len(correct)
        clusters = len(set(documents))
        if clusters < 2:
            return cls(value, 0.0, 1.0, len(correct))
        if value in (0.0, 1.0):
            width = 1.96**2 / (clusters + 1.96**2)
            return cls(value, value * (1 - width), value + (1 - value) * width, len(correct))
        # Sum the residuals of each document before squaring, so that correlated errors add up.
        residuals: dict[int, float] = {}
        for right, document in zip(correct, documents, strict=True):
            residuals[document] = residuals.get(document, 0.0) + right - value
        variance = sum(residual**2 for residual in residuals.values()) * clusters / (clusters - 1)
        stderr = math.sqrt(variance) / len(correct)
        return cls(value, max(0.0, value - 1.96 * stderr), min(1.0, value + 1.96 * stderr), len(correct))

    def excludes(self, chance: float) -> bool:
        """Whether the whole interval is above or below `chance`."""
        return not self.low <= chance <= self.high


@dataclass(frozen=True)
class Scores:
    """The losses of all endings of all items, and the accuracies that follow from them."""

    sums: npt.NDArray[np.float64]
    """Summed loss of each ending in nats (items, 4)."""
    means: npt.NDArray[np.float64]
    """The same per token (items, 4)."""
    items: Sequence[Item]

    @property
    def per_byte(self) -> npt.NDArray[np.float64]:
        """The same per byte of text, which does not depend on the vocabulary (items, 4)."""
        lengths: npt.NDArray[np.int64] = np.array([item.ending_bytes for item in self.items])
        return self.sums / lengths

    @property
    def acc(self) -> Accuracy:
        """By summed loss."""
        return self._accuracy(self.sums)

    @property
    def acc_norm(self) -> Accuracy:
        """By mean loss per token."""
        return self._accuracy(self.means)

    @property
    def acc_norm_bytes(self) -> Accuracy:
        """By loss per byte."""
        return self._accuracy(self.per_byte)

    def _accuracy(self, losses: npt.NDArray[np.float64]) -> Accuracy:
        labels = [item.label for item in self.items]
        return Accuracy.of((losses.argmin(axis=1) == labels).tolist(), [item.document for item in self.items])


def score(
    model: Decoder,
    items: Sequence[Item],
    batch_tokens: int,
    precision: str,
    advance: Callable[[int], object] = lambda _: None,
) -> Scores:
    """Score every ending of every item; see `score_endings` for the arguments."""
    found = score_endings(model, [(item.context, item.endings) for item in items], batch_tokens, precision, advance)
    sums = np.array([[ending.losses.sum() for ending in endings] for endings in found]).reshape(-1, ENDINGS)
    means = np.array([[ending.losses.mean() for ending in endings] for endings in found]).reshape(-1, ENDINGS)
    return Scores(sums, means, items)


def score_unigram(counts: npt.NDArray[np.int64], items: Sequence[Item]) -> Scores:
    """Score a unigram model, which knows only how often each token occurs in training, with one added to every count."""
    losses = -np.log((counts + 1) / (counts + 1).sum())  # one added, so that a token never seen has a finite loss
    sums = np.array([[losses[list(ending)].sum() for ending in item.endings] for item in items])
    lengths = np.array([[len(ending) for ending in item.endings] for item in items])
    return Scores(sums, sums / lengths, items)
