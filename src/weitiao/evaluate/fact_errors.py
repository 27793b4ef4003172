"""How extraction goes wrong: facts missing, spurious, of the wrong type or cut in the wrong place; with examples.

Which kind an error has is the business of `tasks/`; this module counts, and writes facts as people read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..tasks.base import RowScore, Task
from ..tasks.fact_errors import error_kinds
from .prediction import Prediction
from .score import Side

NUM_EXAMPLES = 5

KIND_TEXTS: Mapping[str, str] = {
    "missing": "the label holds it, the answer has nothing like it",
    "spurious": "the answer gives it, the label has nothing like it",
    "wrong type": "the same values, said to be of another kind",
    "boundary": "the right kind, with too much or too little of the value",
}


class ShownError(NamedTuple):
    """One error of one row, in words; a side that has no fact is empty."""

    kind: str
    gold: str
    given: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorKind:
    """All errors of one kind in one task."""

    kind: str
    count: int
    rows: int
    """Rows that have such an error."""
    examples: tuple[tuple[int, ShownError], ...]
    """Each with the place of its row on the side."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        examples = [{"place": place, "gold": one.gold, "given": one.given} for place, one in self.examples]
        return {"kind": self.kind, "count": self.count, "rows": self.rows, "examples": examples}


def errors_of(task: Task, prediction: Prediction, score: RowScore) -> list[ShownError]:
    """The errors of one answer; none for an exact answer, one without the form, and outside extraction."""
    if task.kind != "extraction" or not score.valid or score.exact:
        return []
    form = task.form
    found = error_kinds(form, form.parse(prediction.gold), form.parse(prediction.answer))
    return [ShownError(one.kind, " · ".join(one.gold or ()), " · ".join(one.given or ())) for one in found]


def error_kinds_of(side: Side, task: Task) -> tuple[ErrorKind, ...]:
    """The kinds of errors that `side` makes in `task`, the most frequent first."""
    counts: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    examples: dict[str, list[tuple[int, ShownError]]] = {}
    for place, (prediction, score) in enumerate(zip(side.predictions, side.rows, strict=True)):
        if prediction.task != task.name:
            continue
        found = errors_of(task, prediction, score)
        counts.update(one.kind for one in found)
        rows.update({one.kind for one in found})
        for one in found:
            kept = examples.setdefault(one.kind, [])
            if len(kept) < NUM_EXAMPLES and place not in [known for known, _ in kept]:  # five rows say more than one
                kept.append((place, one))
    ordered = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return tuple(
        ErrorKind(kind=kind, count=counts[kind], rows=rows[kind], examples=tuple(examples[kind])) for kind in ordered
    )
