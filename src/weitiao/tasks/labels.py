"""Counting labels: accuracy, macro-F1 and the confusion table, for one or several labels a row."""

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


def count(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Counts of one row: `correct`, per-label ``tp: fp: fn:``, and a ``pair:`` for the confusion."""
    wanted = label_set(gold)
    given = label_set(answer) if answer is not None else set()
    counts = {"correct": float(answer is not None and wanted == given)}
    for part, members in (("tp", wanted & given), ("fp", given - wanted), ("fn", wanted - given)):
        counts |= {f"{part}:{label}": 1.0 for label in members}
    gold_name = ", ".join(sorted(wanted))
    given_name = INVALID if answer is None else ", ".join(sorted(given))
    return counts | {f"pair:{json.dumps([gold_name, given_name], ensure_ascii=False)}": 1.0}


def summarise(counts: Mapping[str, float]) -> dict[str, float]:
    """Accuracy (the whole set of labels right) and F1 averaged over the labels that occur in gold or answers."""
    names = {key.split(":", 1)[1] for key in counts if key.startswith(("tp:", "fp:", "fn:"))}
    scores = []
    for name in sorted(names):
        tp, fp, fn = (counts.get(f"{part}:{name}", 0.0) for part in ("tp", "fp", "fn"))
        scores.append(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
    return {
        "accuracy": counts.get("correct", 0.0) / counts["rows"],
        "macro_f1": sum(scores) / len(scores) if scores else 0.0,
    }


def confusion(counts: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """``{gold: {given: number of rows}}`` of summed counts."""
    table: dict[str, dict[str, int]] = {}
    for key, value in counts.items():
        if key.startswith("pair:"):
            gold, given = json.loads(key.removeprefix("pair:"))
            table.setdefault(gold, {})[given] = int(value)
    return table
