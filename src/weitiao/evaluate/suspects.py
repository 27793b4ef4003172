"""Rows whose label looks wrong: the model is sure of another answer, or the label surprises it far more than usual.

A sure model is often wrong and a rare label is often right, so a suspect is a row to look at, never one to change
unseen. The bounds were chosen to give a person a short list, and stand here by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runs import write_text
from ..tasks.base import Task
from .differences import Span, label_in_answers_order, mark_differences
from .prediction import Prediction
from .score import Side

MIN_CONFIDENCE = 0.9
"""An answer the model is less sure of says little against the label."""
USUAL_SHARE = 0.95
"""A label's loss is unusual above this share of the losses of labels that the model answers exactly …"""
MIN_LOSS = 0.1
"""… and above this many nats per token: where nearly all labels are foretold, the highest loss may still be small."""
MIN_EXACT = 10
"""With fewer exact answers the losses of all rows of the task are taken instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A row whose label may be wrong, with what the model would put in its place."""

    place: int
    """Which prediction of its side it is."""
    prediction: Prediction
    shown_gold: str
    """The label, its items in the order of the suggestion."""
    suggested: str
    """The model's answer in the labelled form's own spelling."""
    reason: str

    @property
    def marks(self) -> tuple[list[Span], list[Span]]:
        """Label and suggestion in pieces, marked where they differ."""
        return mark_differences(self.shown_gold, self.suggested, keep_space=False)

    def to_json(self) -> dict[str, Any]:
        """One line of ``suspects.jsonl``."""
        row = self.prediction
        return {
            "source": row.source,
            "task": row.task,
            "prompt": row.prompt,
            "gold": row.gold,
            "suggested": self.suggested,
            "confidence": row.confidence,
            "loss": row.loss,
            "reason": self.reason,
        }


def find_suspects(
    side: Side, tasks: Sequence[Task], *, others: Mapping[str, Side] | None = None
) -> tuple[Suspect, ...]:
    """The suspects of `side`, the surest first; none where neither confidence nor loss was measured.

    Args:
        side: scored predictions. A row is a suspect when its answer has the form, is not exact, and the model gave it
            at least `MIN_CONFIDENCE`, the label's loss being unusual where it was measured. Without a confidence the
            loss decides alone. Chat and free text have many right answers: they are never suspects.
        tasks: their tasks.
        others: other models' answers to the same rows, by name. Who gives the same answer is named in the reason.
    """
    by_name = {task.name: task for task in tasks if task.kind != "text"}
    bounds = {name: _unusual_loss(side, name) for name in by_name}
    same = _agreeing(side, others or {})
    found = []
    for place, (prediction, score) in enumerate(zip(side.predictions, side.rows, strict=True)):
        task = by_name.get(prediction.task)
        if task is None or not score.valid or score.exact or not _is_suspect(prediction, bounds[task.name]):
            continue
        form = task.form
        parsed = form.parse(prediction.answer)
        if _is_same_set(parsed, form.parse(prediction.gold)):
            continue  # another order of the same facts is no other label
        reason = _reason(prediction, bounds[task.name], same.get(place, []))
        suggested = form.write(parsed)
        shown = label_in_answers_order(form, prediction.gold, suggested)
        found.append(Suspect(place=place, prediction=prediction, shown_gold=shown, suggested=suggested, reason=reason))
    return tuple(sorted(found, key=lambda one: (-(one.prediction.confidence or 0), -(one.prediction.loss or 0))))


def write_suspects(suspects: Sequence[Suspect], path: Path) -> None:
    """One JSON line per suspect, for a person to review; an empty file says that none was found."""
    write_text(path, "".join(json.dumps(one.to_json(), ensure_ascii=False) + "\n" for one in suspects))


def _unusual_loss(side: Side, task: str) -> float | None:
    known = [
        (row.loss, score.exact)
        for row, score in zip(side.predictions, side.rows, strict=True)
        if row.task == task and row.loss is not None
    ]
    right = [loss for loss, exact in known if exact]
    usual = right if len(right) >= MIN_EXACT else [loss for loss, _ in known]
    return max(MIN_LOSS, float(np.quantile(usual, USUAL_SHARE))) if usual else None


def _is_suspect(row: Prediction, bound: float | None) -> bool:
    unusual = row.loss is not None and bound is not None and row.loss >= bound
    if row.confidence is None:
        return unusual
    return row.confidence >= MIN_CONFIDENCE and (row.loss is None or unusual)


def _is_same_set(answer: Any, gold: Any) -> bool:
    if not (isinstance(answer, list) and isinstance(gold, list)):
        return bool(answer == gold)
    ours, theirs = ({json.dumps(item, sort_keys=True) for item in items} for items in (answer, gold))
    return ours == theirs


def _agreeing(side: Side, others: Mapping[str, Side]) -> dict[int, list[str]]:
    """For each place of `side`, the names of the other sides that gave the very same answer to the row."""
    answers = {
        name: {(row.source, row.task): row.answer.strip() for row in other.predictions}
        for name, other in others.items()
    }
    return {
        place: [name for name, known in answers.items() if known.get((row.source, row.task)) == row.answer.strip()]
        for place, row in enumerate(side.predictions)
    }


def _reason(row: Prediction, bound: float | None, agreeing: Sequence[str]) -> str:
    parts = []
    if row.confidence is not None:
        parts.append(f"The model is {100 * row.confidence:.0f} % sure of another answer.")
    if row.loss is not None and bound is not None:
        parts.append(f"The label costs it {row.loss:.2f} nats a token, more than is usual (up to {bound:.2f}).")
    if agreeing:
        parts.append(f"The same answer came from: {', '.join(agreeing)}.")
    return " ".join(parts)
