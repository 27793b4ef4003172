"""Counting facts: triples, entities and attributes, strictly and with credit for what nearly agrees.

Strict counts are true positives, false positives and false negatives of facts (`facts.py`). The relaxed score gives a
fact 1 when it equals a labelled one but for spelling and 0.5 when its values overlap (`relaxed.py`). Rightly leaving a
field of attributes empty earns no fact and costs none; it is counted on its own, as accuracy on absent fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .fact_errors import count_errors
from .facts import Fact, absent_keys, facts, naming_key, naming_place
from .forms import Answer, AnswerForm
from .relaxed import PARTIAL_CREDIT, alike, match

__all__ = ["PRIMARY_METRIC", "Fact", "count", "facts", "main_metrics", "naming_key", "summarise"]

PRIMARY_METRIC = "f1"


def count(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Counts of one row; `answer` None: invalid.

    ``tp fp fn``, the same with types (``tp_typed`` …) and per predicate or key (``tp:NAME`` …), the relaxed `credit`
    likewise, ``err:KIND``, and for attributes `absent` and `absent_right`, where a field is absent.
    """
    counts: dict[str, float] = {}
    for suffix, typed in (("", False), ("_typed", True)):
        wanted = facts(form, gold, typed=typed)
        given = facts(form, answer, typed=typed) if answer is not None else set()
        parts = {"tp": wanted & given, "fp": given - wanted, "fn": wanted - given}
        counts |= {f"{part}{suffix}": float(len(members)) for part, members in parts.items()}
        if not typed:
            for part, members in parts.items():
                for name in _names(form, members):
                    counts[f"{part}:{name}"] = counts.get(f"{part}:{name}", 0.0) + 1
            counts |= _credit(form, parts["tp"], parts["fn"], parts["fp"])
    counts |= count_errors(form, gold, answer)
    if form.shape == "object":
        counts |= _absence(form, gold, answer)
    return counts


def _credit(form: AnswerForm, found: set[Fact], missed: set[Fact], spare: set[Fact]) -> dict[str, float]:
    """The credit of a row, in all and by name: 1 for equal facts, `PARTIAL_CREDIT` for overlapping ones."""
    place = naming_place(form, typed=False)
    types = () if place is None else (place,)
    pairs = match(missed, spare, lambda a, b: alike(a, b, types)) if missed and spare else []
    credits = [(fact, 1.0) for fact in found]
    credits += [(fact, 1.0 if likeness == 1 else PARTIAL_CREDIT) for fact, _, likeness in pairs]
    counts = {"credit": sum(credit for _, credit in credits)}
    if place is not None:
        for fact, credit in credits:
            counts[f"credit:{fact[place]}"] = counts.get(f"credit:{fact[place]}", 0.0) + credit
    return counts


def _absence(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Fields that the label leaves empty, and those of them that the answer leaves empty too."""
    wanted = absent_keys(form, gold)
    right = wanted & absent_keys(form, answer) if answer is not None else set()
    counts = {"absent": float(len(wanted)), "absent_right": float(len(right))} if wanted else {}
    return counts | {f"absent:{key}": 1.0 for key in wanted} | {f"absent_right:{key}": 1.0 for key in right}


def _names(form: AnswerForm, members: Iterable[Fact]) -> list[str]:
    place = naming_place(form, typed=False)
    return [] if place is None else [fact[place] for fact in members]


def summarise(form: AnswerForm, counts: Mapping[str, float]) -> dict[str, float]:
    """Micro-averaged F1, precision and recall, strict, with types and relaxed; accuracy on absent fields."""
    tp, fp, fn, credit = (counts.get(part, 0.0) for part in ("tp", "fp", "fn", "credit"))
    typed = [counts.get(f"{part}_typed", 0.0) for part in ("tp", "fp", "fn")]
    figures = {
        "f1": _f1(tp, tp + fp, tp + fn),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "f1_typed": _f1(typed[0], typed[0] + typed[1], typed[0] + typed[2]),
        "f1_relaxed": _f1(credit, tp + fp, tp + fn),
        "precision_relaxed": credit / (tp + fp) if tp + fp else 0.0,
        "recall_relaxed": credit / (tp + fn) if tp + fn else 0.0,
    }
    if "absent" in counts:  # only where a label leaves a field empty; a resample without one has nothing to get wrong
        absent = counts["absent"]
        figures["absence_accuracy"] = counts.get("absent_right", 0.0) / absent if absent else 1.0
    return figures


def main_metrics(form: AnswerForm) -> tuple[str, ...]:
    """The metrics that a reader is shown first."""
    typed = ("f1_typed",) if any(field.key.endswith("_type") for field in form.fields) else ()
    absence = ("absence_accuracy",) if form.shape == "object" else ()
    return ("f1", "precision", "recall", *typed, "f1_relaxed", *absence)


def _f1(credit: float, given: float, wanted: float) -> float:
    """Twice the credit over all facts; nothing to find and nothing given is right."""
    return 2 * credit / (given + wanted) if given + wanted else 1.0
