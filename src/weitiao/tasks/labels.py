"""Counting labels, one or several a row: accuracy, F1 over labels, and the confusion table."""

from __future__ import annotations

import json
from collections.abc import Mapping

from .forms import Answer, AnswerForm

PRIMARY_METRIC = "accuracy"

INVALID = "(no valid answer)"
"""The column of the confusion table for answers without the form."""


def label_set(answer: Answer) -> set[str]:
    """The labels of a parsed answer."""
    return set(answer) if isinstance(answer, list) else {answer}


def several(form: AnswerForm) -> bool:
    """Whether a row may have several labels."""
    return form.shape == "label list" and form.max_items != 1


def count(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Counts of one row: `correct`, `jaccard`, per-label ``tp: fp: fn:``, and a ``pair:`` for the confusion."""
    wanted = label_set(gold)
    given = label_set(answer) if answer is not None else set()
    counts = {"correct": float(answer is not None and wanted == given)}
    if several(form):
        union = wanted | given
        counts["jaccard"] = len(wanted & given) / len(union) if union else counts["correct"]
    for part, members in (("tp", wanted & given), ("fp", given - wanted), ("fn", wanted - given)):
        counts |= {f"{part}:{label}": 1.0 for label in members}
    gold_name = ", ".join(sorted(wanted))
    given_name = INVALID if answer is None else ", ".join(sorted(given))
    return counts | {f"pair:{json.dumps([gold_name, given_name], ensure_ascii=False)}": 1.0}


def summarise(form: AnswerForm, counts: Mapping[str, float]) -> dict[str, float]:
    """Accuracy (the whole set of labels right), F1 over labels; Jaccard or balanced accuracy, as there are labels.

    The macro figures are means over labels that occur: F1 over those of gold or answers, balanced accuracy (the mean
    recall) over those of gold alone.
    """
    names = {key.split(":", 1)[1] for key in counts if key.startswith(("tp:", "fp:", "fn:"))}
    f1s, recalls, totals = [], [], [0.0, 0.0, 0.0]
    for name in sorted(names):
        tp, fp, fn = (counts.get(f"{part}:{name}", 0.0) for part in ("tp", "fp", "fn"))
        f1s.append(_f1(tp, fp, fn))
        recalls += [tp / (tp + fn)] if tp + fn else []
        totals = [total + part for total, part in zip(totals, (tp, fp, fn))]
    rows = counts["rows"]
    figures = {
        "accuracy": counts.get("correct", 0.0) / rows,
        "macro_f1": sum(f1s) / len(f1s) if f1s else 0.0,
        "micro_f1": _f1(*totals),
    }
    if several(form):
        return figures | {"jaccard": counts.get("jaccard", 0.0) / rows}
    return figures | {"balanced_accuracy": sum(recalls) / len(recalls) if recalls else 0.0}


def main_metrics(form: AnswerForm) -> tuple[str, ...]:
    """The metrics that a reader is shown first."""
    return ("accuracy", "macro_f1", "micro_f1", "jaccard") if several(form) else ("accuracy", "macro_f1")


def confusion(counts: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """``{gold: {given: number of rows}}`` of summed counts."""
    table: dict[str, dict[str, int]] = {}
    for key, value in counts.items():
        if key.startswith("pair:"):
            gold, given = json.loads(key.removeprefix("pair:"))
            table.setdefault(gold, {})[given] = int(value)
    return table


def _f1(tp: float, fp: float, fn: float) -> float:
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0
