"""Monotone curves from the confidence a model gives to the share of such answers that is right, fitted to tried ones.

Three kinds, and the curve that changes nothing. `temperature` divides the log-odds of a confidence by one number (Guo
et al. 2017), `logistic` shifts them as well (Platt 1999), `isotonic` is the non-decreasing step function nearest to
the outcomes (Zadrozny and Elkan 2002), joined up linearly. None of them ever claims certainty: the scaled curves aim at
Platt's targets, (right + 1) / (right + 2) and 1 / (wrong + 2), and the isotonic one is fitted with one wrong answer
added at the highest confidence and one right answer at the lowest.

Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Method = Literal["none", "temperature", "logistic", "isotonic"]
METHODS: tuple[Method, ...] = ("none", "temperature", "logistic", "isotonic")
"""From the simplest to the most flexible."""

Floats = npt.NDArray[np.float64]

SMALLEST = 1e-9
"""Confidences this near to 0 or 1 are taken to be as far from it: log-odds and losses stay finite."""
_RIDGE = 1e-3
"""Pulls slope and offset to 1 and 0, as much as a thousandth of an answer would: enough to decide the undecidable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One fitted curve; `apply` never falls where the confidence rises, and stays within 0 and 1."""

    method: Method = "none"
    slope: float = 1.0
    """Factor on the log-odds, at least 0: one over the temperature."""
    offset: float = 0.0
    """What is added to them."""
    points: tuple[tuple[float, float], ...] = ()
    """Of the isotonic curve: (confidence, share right), both rising; straight lines between, level outside."""

    def apply(self, confidences: Floats) -> Floats:
        """The calibrated confidences."""
        if self.method == "isotonic":
            given, right = np.array(self.points).T
            return np.asarray(np.interp(confidences, given, right), dtype=np.float64)
        if self.method == "none":
            return np.clip(confidences, 0.0, 1.0)
        return _inside(_sigmoid(self.slope * log_odds(confidences) + self.offset))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal."""
        points = [list(point) for point in self.points]
        return {"method": self.method, "slope": self.slope, "offset": self.offset, "points": points}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """The curve that `to_json` wrote. Raises ValueError, in a sentence, for a curve that is none."""
        curve = cls(**{**data, "points": tuple((float(given), float(right)) for given, right in data["points"])})
        if curve.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {curve.method!r}.")
        if not (math.isfinite(curve.slope) and math.isfinite(curve.offset) and curve.slope >= 0):
            raise ValueError(f"slope must be at least 0 and offset a number, not {curve.slope} and {curve.offset}.")
        rising = all(one[0] <= two[0] and one[1] <= two[1] for one, two in zip(curve.points, curve.points[1:]))
        shares = all(0 <= number <= 1 for point in curve.points for number in point)
        if not (rising and shares) or bool(curve.points) != (curve.method == "isotonic"):
            raise ValueError("points must be rising pairs of shares for an isotonic curve, and none for another.")
        return curve


def fit_curve(method: Method, confidences: Floats, right: Floats) -> Curve:
    """The curve of kind `method` that is most probable given which answers were right.

    Args:
        method: one of `METHODS`.
        confidences: of at least one answer, 0–1.
        right: 1 for each that was right, 0 for the others.
    """
    if method == "isotonic":
        return Curve(method="isotonic", points=_isotonic_points(confidences, right))
    if method == "none":
        return Curve()
    slope, offset = _scaling(log_odds(confidences), _platt_targets(right), shifted=method == "logistic")
    return Curve(method=method, slope=slope, offset=offset)


def log_loss(confidences: Floats, right: Floats) -> float:
    """Mean negative log-likelihood (nats) of the outcomes `right` under `confidences`."""
    given = _inside(confidences)
    return float(-np.mean(right * np.log(given) + (1 - right) * np.log1p(-given)))


def log_odds(confidences: Floats) -> Floats:
    """``log(p / (1 - p))`` of each confidence."""
    given = _inside(confidences)
    return np.log(given) - np.log1p(-given)


def _inside(confidences: Floats) -> Floats:
    return np.asarray(np.clip(confidences, SMALLEST, 1 - SMALLEST), dtype=np.float64)


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0.0, -values)), dtype=np.float64)


# ---- scaled log-odds ------------------------------------------------------------------------------------------


def _platt_targets(right: Floats) -> Floats:
    """What the curve should say of right and of wrong answers: less than certainty, as Platt has it."""
    num_right = float(right.sum())
    num_wrong = len(right) - num_right
    return np.where(right > 0, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))


def _scaling(odds: Floats, targets: Floats, *, shifted: bool) -> tuple[float, float]:
    """Slope and offset of the log-odds that minimise the cross-entropy to `targets`; the slope is never negative."""
    columns = np.stack([odds, np.ones_like(odds)]) if shifted else odds[None]
    start = np.array([1.0, 0.0])[: len(columns)]
    found = _minimise(columns, targets, start)
    if found[0] >= 0:
        return float(found[0]), float(found[1]) if shifted else 0.0
    # The loss is convex: when its minimum lies beyond slope 0, the best that is allowed lies on slope 0.
    return 0.0, float(_minimise(np.ones((1, len(odds))), targets, np.zeros(1))[0]) if shifted else 0.0


def _minimise(columns: Floats, targets: Floats, start: Floats) -> Floats:
    """The weights of `columns` with the smallest cross-entropy, by Newton's method; `start` is what the ridge favours.

    `columns` is weights × answers.
    """

    def loss(weights: Floats) -> float:
        values = weights @ columns
        entropy = np.logaddexp(0.0, values) - targets * values
        return float(entropy.sum() + 0.5 * _RIDGE * np.sum((weights - start) ** 2))

    weights, current = start, loss(start)
    for _ in range(100):
        given = _sigmoid(weights @ columns)
        gradient = columns @ (given - targets) + _RIDGE * (weights - start)
        curvature = (columns * (given * (1 - given))) @ columns.T + _RIDGE * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (reached := loss(weights - size * step)) > current and size > 1e-10:
            size /= 2
        if reached >= current - 1e-12 * (1 + abs(current)):
            break
        weights, current = weights - size * step, reached
    return weights


# ---- isotonic -------------------------------------------------------------------------------------------------


def _isotonic_points(confidences: Floats, right: Floats) -> tuple[tuple[float, float], ...]:
    """The corners of the isotonic curve: both ends of each level piece."""
    ends = np.array([confidences.max(), confidences.min()])
    given = np.append(confidences, ends)
    outcomes = np.append(right, [0.0, 1.0])
    places, which, counts = np.unique(given, return_inverse=True, return_counts=True)
    means = np.bincount(which, weights=outcomes) / counts
    levels = pool_adjacent_violators(means, counts.astype(np.float64))
    corner = np.ones(len(places), dtype=bool)
    corner[1:-1] = (levels[1:-1] != levels[:-2]) | (levels[1:-1] != levels[2:])
    return tuple(zip(places[corner].tolist(), levels[corner].tolist()))


def pool_adjacent_violators(values: Floats, weights: Floats) -> Floats:
    """The non-decreasing sequence nearest to `values` in weighted squares.

    >>> pool_adjacent_violators(np.array([0.0, 1.0, 0.5, 1.0]), np.ones(4)).tolist()
    [0.0, 0.75, 0.75, 1.0]
    """
    blocks: list[tuple[float, float, int]] = []
    """(mean, weight, number of values) of each level piece so far."""
    for value, weight in zip(values.tolist(), weights.tolist()):
        mean, mass, size = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, its_mass, its_size = blocks.pop()
            mean = (before * its_mass + mean * mass) / (its_mass + mass)
            mass, size = mass + its_mass, size + its_size
        blocks.append((mean, mass, size))
    return np.repeat([mean for mean, _, _ in blocks], [size for _, _, size in blocks])
