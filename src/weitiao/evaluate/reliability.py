"""Do confidences say how often answers are right? The reliability diagram, and its one figure.

Knows confidences and outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .confidence_curve import Floats

MAX_BINS = 10
MIN_ROWS_PER_BIN = 10


class Bin(NamedTuple):
    """Answers of like confidence."""

    low: float
    high: float
    """The lowest and the highest confidence in the bin."""
    rows: int
    mean_confidence: float
    accuracy: float
    """Share of them that is right."""


def reliability_bins(confidences: Floats, right: Floats) -> tuple[Bin, ...]:
    """Bins of as many answers each as can be, by rising confidence: ten, or fewer where that would be under ten each.

    Answers of one confidence are never parted: which of them stood in which bin would be chance. So bins may differ in
    size, and there may be fewer.
    """
    total = len(confidences)
    num_bins = max(1, min(MAX_BINS, total // MIN_ROWS_PER_BIN))
    _, which, counts = np.unique(confidences, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - counts / 2
    bin_of = (middles * num_bins / total).astype(np.int64)[which]
    bins = []
    for number in np.unique(bin_of):
        given, outcomes = confidences[bin_of == number], right[bin_of == number]
        figures = (float(figure) for figure in (given.min(), given.max(), given.mean(), outcomes.mean()))
        low, high, mean, accuracy = figures
        bins.append(Bin(low, high, len(given), mean, accuracy))
    return tuple(bins)


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance between confidence and share right over the bins, each weighing as many answers as it has."""
    total = sum(one.rows for one in bins)
    return sum(one.rows * abs(one.mean_confidence - one.accuracy) for one in bins) / total
