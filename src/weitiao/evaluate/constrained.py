"""What holding the answers to the labelled form changed: the same model's answers with the constraint and without.

Knows scored predictions; knows nothing of grammars or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..tasks.base import Task
from .score import Side, TaskScore, row_value

FREE = ", unconstrained"
"""A side of this name's ending is the side of the same name without it, asked with nothing held to the form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstraintEffect:
    """What the constraint did to the answers of one task."""

    task: str
    metric: str
    held: float
    """The metric (0–1) of the answers held to the form."""
    free: float
    """The metric of the answers that were not."""
    held_valid: float
    """Share of answers in the form, held to it."""
    free_valid: float
    rows: int
    differ: int
    """Rows whose two answers are not the same text."""
    better: int
    """Of these, how many are worth more with the constraint."""
    worse: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)


def pair_rows(side: Side, other: Side) -> dict[int, int]:
    """For each row of `side` that `other` has as well, its place there: the same source and task, in order."""
    places: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(other.predictions):
        places.setdefault((row.source, row.task), []).append(place)
    waiting = {key: iter(found) for key, found in places.items()}
    pairs: dict[int, int] = {}
    for place, row in enumerate(side.predictions):
        match = next(waiting.get((row.source, row.task), iter(())), None)
        if match is not None:
            pairs[place] = match
    return pairs


def constraint_effects(held: Side, free: Side, tasks: Sequence[Task]) -> tuple[ConstraintEffect, ...]:
    """For each task that both sides have rows of, what the constraint changed."""
    pairs = pair_rows(held, free)
    effects = []
    for task in tasks:
        scores = [_score(side, task) for side in (held, free)]
        own = [(one, two) for one, two in pairs.items() if held.predictions[one].task == task.name]
        if not own or scores[0] is None or scores[1] is None:
            continue
        values = [
            (row_value(task, held.rows[one]), row_value(task, free.rows[two]))
            for one, two in own
            if held.predictions[one].answer != free.predictions[two].answer
        ]
        effects.append(
            ConstraintEffect(
                task=task.name,
                metric=task.primary_metric,
                held=scores[0].metrics[task.primary_metric],
                free=scores[1].metrics[task.primary_metric],
                held_valid=scores[0].metrics["valid"],
                free_valid=scores[1].metrics["valid"],
                rows=len(own),
                differ=len(values),
                better=sum(one > two for one, two in values),
                worse=sum(one < two for one, two in values),
            )
        )
    return tuple(effects)


def free_side(sides: Mapping[str, Side], examined: str) -> Side | None:
    """The answers of the examined side's model without the constraint; None when there are none."""
    return sides.get(examined + FREE)


def _score(side: Side, task: Task) -> TaskScore | None:
    return next((score for score in side.scores if score.task == task.name and score.rows), None)
