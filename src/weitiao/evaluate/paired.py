"""Whether two models' scores on the same rows differ by more than chance: paired bootstrap, McNemar's exact test.

Paired: in every resample the same rows are drawn for both models, so that hard rows are hard for both and what is
left is the difference between the models. Knows scored rows; knows nothing of files or pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..tasks.base import RowScore, Task, add_counts
from .score import draws, resampled_counts

LEVEL = 0.05
"""A difference that chance brings about less often than this counts as more than chance."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One figure of two models on the same rows."""

    a: float
    b: float
    interval: tuple[float, float]
    """95 % bootstrap interval of `difference`."""
    p_value: float
    """How often a difference at least this far from none would come about, were there none; two-sided."""

    @property
    def difference(self) -> float:
        """`b` less `a`."""
        return self.b - self.a

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {**asdict(self), "interval": list(self.interval), "difference": self.difference}


class Paired(NamedTuple):
    """The differences of all metrics of one task, and the resampled differences of its primary one."""

    differences: Mapping[str, Difference]
    primary: Floats


def paired_bootstrap(
    tasks: tuple[Task, Task], a: Sequence[RowScore], b: Sequence[RowScore], *, seed: int = 0, resamples: int = 10_000
) -> Paired:
    """The differences between the scores `a` and `b`, where ``a[i]`` and ``b[i]`` belong to the same row.

    Intervals are Efron's percentile intervals; the p-value inverts them, so it is below 0.05 exactly where the 95 %
    interval leaves out 0 (but for the resamples' own grain, 1 / `resamples`).

    Args:
        tasks: what each model's answers were scored as; the same task, perhaps of differently spelled forms.
        a: scores of the first model, at least one row.
        b: scores of the second.
        seed: of the resampling.
        resamples: how many.
    """
    assert len(a) == len(b) > 0
    first, second = (_totals(task, rows) for task, rows in zip(tasks, (a, b), strict=True))
    names = [name for name in first if name in second]
    blocks: list[Floats] = []
    for drawn in draws(len(a), seed=seed, resamples=resamples):  # block by block: all draws at once are too many
        sides = [
            np.array([[sample.get(name, math.nan) for name in names] for sample in _summaries(task, rows, drawn)])
            for task, rows in zip(tasks, (a, b), strict=True)
        ]
        blocks.append(sides[1] - sides[0])
    table = np.concatenate(blocks)
    differences = {
        name: difference(first[name], second[name], table[:, place][~np.isnan(table[:, place])])
        for place, name in enumerate(names)
    }
    return Paired(differences, table[:, names.index(tasks[1].primary_metric)])


def difference(a: float, b: float, resampled: Floats) -> Difference:
    """The difference of two figures, judged by its resampled values."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    tails = [
        (1 + int(np.sum(resampled <= 0))) / (1 + resampled.size),
        (1 + int(np.sum(resampled >= 0))) / (1 + resampled.size),
    ]
    return Difference(a=a, b=b, interval=(float(low), float(high)), p_value=min(1.0, 2 * min(tails)))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test: are the rows that one model alone gets right split by a fair coin?

    >>> mcnemar(1, 9), mcnemar(3, 3)
    (0.021484375, 1.0)
    """
    count = only_a + only_b
    term = total = 1
    for k in range(1, min(only_a, only_b) + 1):
        term = term * (count - k + 1) // k
        total += term
    return min(1.0, 2 * total / (1 << count))  # whole numbers of any size: Python divides them without overflow


def _totals(task: Task, rows: Sequence[RowScore]) -> dict[str, float]:
    return task.summarise(add_counts([row.counts for row in rows]))


def _summaries(task: Task, rows: Sequence[RowScore], drawn: npt.NDArray[np.int64]) -> list[dict[str, float]]:
    return [task.summarise(counts) for counts in resampled_counts(task, rows, [drawn])]
