"""How a score grows with the number of rows: a power law through a few points, and what it foretells of more rows.

Knows numbers; knows nothing of tasks or training.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EXPONENTS: Floats = np.geomspace(0.1, 2.0, 61)
"""The exponents tried: from hardly more bent than a logarithm to all but level at once."""


class PowerLaw(NamedTuple):
    """score = a - b · rows^(-c), for each of several sets of points."""

    a: Floats
    """The score of endlessly many rows, 0 to 1."""
    b: Floats
    """At least 0: more rows never make it worse."""
    c: Floats

    def at(self, rows: float) -> Floats:
        """The score of each set at so many rows."""
        return self.a - self.b * rows**-self.c


def fit_power_law(rows: Floats, scores: Floats) -> PowerLaw:
    """The power law nearest to `scores` by least squares, within 0 ≤ a ≤ 1, b ≥ 0 and the least and greatest exponent.

    For a given exponent a and b follow from linear regression, moved to the bound that they would cross; all exponents
    are tried. Shapes: `rows` (points,), `scores` (sets, points); each result (sets,).

    Args:
        rows: numbers of rows, three different ones or more.
        scores: for each set and number of rows, a score from 0 to 1.
    """
    best = np.full(len(scores), np.inf)
    found = PowerLaw(a=np.zeros(len(scores)), b=np.zeros(len(scores)), c=np.full(len(scores), EXPONENTS[0]))
    for exponent in EXPONENTS:
        x = (rows / rows[0]) ** -exponent  # in units of the first, or large numbers of rows leave no digits
        centred = x - x.mean()
        slope = -(scores @ centred) / (centred @ centred)
        b = np.maximum(slope, 0.0)
        a = scores.mean(axis=1) + b * x.mean()
        above = a > 1
        b = np.where(above, np.maximum((1 - scores) @ x / (x @ x), 0.0), b)
        a = np.minimum(a, 1.0)
        errors = np.square(a[:, None] - b[:, None] * x - scores).sum(axis=1)
        better = errors < best - 1e-12
        best = np.where(better, errors, best)
        found.a[better], found.b[better] = a[better], (b * rows[0] ** exponent)[better]
        found.c[better] = exponent
    return found
