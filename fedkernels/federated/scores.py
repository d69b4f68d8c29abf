"""Metrics of a test set from sums over its samples, so that shards of it add up exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.datasets import Metric


@dataclass(frozen=True)
class Score:
    """A metric: its value, from the mean loss and the confusion matrix, and whether it needs the latter."""

    value: Callable[[float, np.ndarray | None], float]
    of_confusion: bool


def matthews(confusion: np.ndarray) -> float:
    """Matthews correlation of targets and predictions, for any number of classes; 0 where one of them is constant.

    `(c s − Σ_k t_k p_k) / √((s² − Σ p_k²)(s² − Σ t_k²))` with s samples, c of them right, t_k of class k and p_k
    predicted to be.

    Args:
        confusion: counts `[targets, predictions]`.

    Example:
        >>> matthews(np.array([[2, 0], [0, 3]])), matthews(np.array([[0, 2], [0, 3]]))
        (1.0, 0.0)

    Reference: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """
    t, p, s = confusion.sum(1), confusion.sum(0), confusion.sum()
    spread = float(s**2 - p @ p) * float(s**2 - t @ t)
    return float(np.trace(confusion) * s - t @ p) / math.sqrt(spread) if spread else 0.0


def f1(confusion: np.ndarray) -> float:
    """F1 of the second of two classes, `2 TP / (2 TP + FP + FN)`; 0 where it neither occurs nor is predicted.

    Args:
        confusion: counts `[2, 2]` of targets by predictions.

    Example:
        >>> f1(np.array([[5, 1], [1, 2]]))
        0.6666666666666666
    """
    hits = 2 * confusion[1, 1]
    total = hits + confusion[0, 1] + confusion[1, 0]
    return float(hits / total) if total else 0.0


def perplexity(loss: float) -> float:
    """`exp` of the mean loss of a token, infinite where that overflows."""
    return math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else math.inf


def _of(metric: Callable[[np.ndarray], float]) -> Score:
    def value(loss: float, confusion: np.ndarray | None) -> float:
        assert confusion is not None
        return metric(confusion)

    return Score(value, of_confusion=True)


SCORES: dict[Metric, Score] = {
    "matthews": _of(matthews),
    "f1": _of(f1),
    "perplexity": Score(lambda loss, confusion: perplexity(loss), of_confusion=False),
}
