"""How long the rows are: counts collected row by row, their histogram, and how many pass a limit.

Knows numbers only; what is counted, characters or tokens, is the caller's to say.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """The distribution of one length over all rows."""

    unit: str
    """``characters`` or ``tokens``."""
    of: str
    """What is counted: ``input``, ``answer`` or ``example``, both together."""
    count: int
    shortest: int
    median: int
    ninety_fifth: int
    longest: int
    total: int
    edges: tuple[int, ...]
    """Bin i of the histogram holds the lengths from edges[i] up to, not including, edges[i + 1]. The last bin takes
    what is far longer than the rest, and so may be wider than the others."""
    bins: tuple[int, ...]

    @property
    def wide_end(self) -> bool:
        """Whether the last bin is wider than the others."""
        return len(self.edges) > 2 and self.edges[-1] - self.edges[-2] != self.edges[1] - self.edges[0]

    def to_json(self) -> dict[str, object]:
        """A JSON-ready copy."""
        return {
            "unit": self.unit,
            "of": self.of,
            "rows": self.count,
            "min": self.shortest,
            "median": self.median,
            "p95": self.ninety_fifth,
            "max": self.longest,
            "total": self.total,
            "edges": list(self.edges),
            "bins": list(self.bins),
        }


class LengthCount:
    """Collects lengths; four bytes a row."""

    def __init__(self, unit: str, of: str) -> None:
        self.unit, self.of = unit, of
        self._values = array("I")

    def __len__(self) -> int:
        return len(self._values)

    def add(self, *values: int) -> None:
        """Take in the next lengths."""
        self._values.extend(values)

    def over(self, limit: int) -> list[int]:
        """The places, in order of adding, of what is longer than `limit`."""
        return [place for place, value in enumerate(self._values) if value > limit]

    def value(self, place: int) -> int:
        """The length added at `place`."""
        return self._values[place]

    def describe(self, num_bins: int = 24) -> Lengths | None:
        """The distribution; None when nothing was added."""
        if not len(self._values):
            return None
        values = sorted(self._values)
        usual = _share_of(values, 0.99)
        edges = nice_edges(values[0], usual, num_bins)
        if values[-1] >= edges[-1]:
            edges = (*edges, values[-1] + 1)
        places = [bisect_left(values, edge) for edge in edges]
        return Lengths(
            unit=self.unit,
            of=self.of,
            count=len(values),
            shortest=values[0],
            median=_share_of(values, 0.5),
            ninety_fifth=_share_of(values, 0.95),
            longest=values[-1],
            total=sum(values),
            edges=edges,
            bins=tuple(end - start for start, end in pairwise(places)),
        )


def _share_of(values: Sequence[int], share: float) -> int:
    """The value that `share` of the sorted `values` do not pass."""
    return values[int(share * (len(values) - 1))]


def nice_edges(low: int, high: int, num_bins: int) -> tuple[int, ...]:
    """Round bin edges from at most `low` to more than `high`, at most about `num_bins` bins.

    >>> nice_edges(3, 47, 5)
    (0, 10, 20, 30, 40, 50)
    """
    rough = max(1.0, (high - low + 1) / num_bins)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= rough)
    start = low // step * step
    return tuple(range(start, high + step + 1, step))


def count_over(values: LengthCount, limits: Sequence[int]) -> dict[int, int]:
    """For each limit how many lengths pass it."""
    return {limit: len(values.over(limit)) for limit in limits}
