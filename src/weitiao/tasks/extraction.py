"""Counting facts: triples, entities and attributes, as true positives, false positives and false negatives.

A fact of a list of objects is the tuple of its content fields; "typed" facts add the ``…_type`` fields. A fact of a
list of strings is a string. A fact of one object of attributes is a (key, value) pair; the placeholder of absence is no
fact, so that saying "not in the text" rightly earns nothing and costs nothing, and inventing a value costs precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .forms import Answer, AnswerForm

PRIMARY_METRIC = "f1"

Fact = tuple[str, ...]

_NAMING_KEYS = ("predicate", "relation", "type", "label", "关系", "类型")


def facts(form: AnswerForm, answer: Answer, *, typed: bool) -> set[Fact]:
    """The facts of a parsed `answer`; types of subject and object count only when `typed`."""
    if form.shape == "object":
        absent = {field.key: field.absent for field in form.fields}
        return {
            (key, str(value))
            for key, values in answer.items()
            for value in (values if isinstance(values, list) else [values])
            if value != absent[key]
        }
    if form.shape == "string list":
        return {(item,) for item in answer}
    keys = [field.key for field in form.fields if typed or not field.key.endswith("_type")]
    return {tuple(str(item[key]) for key in keys) for item in answer}


def naming_key(form: AnswerForm) -> str | None:
    """The field that names the kind of an object (the predicate), for the table of scores by kind."""
    keys = [field.key for field in form.fields]
    named = [key for key in _NAMING_KEYS if key in keys]
    closed = [field.key for field in form.fields if field.values and not field.key.endswith("_type")]
    return next(iter([*named, *closed]), None)


def count(form: AnswerForm, gold: Answer, answer: Answer | None) -> dict[str, float]:
    """Counts of one row: ``tp fp fn``, the same with types, and per predicate or key. `answer` None: invalid."""
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
    return counts


def _names(form: AnswerForm, members: Iterable[Fact]) -> list[str]:
    if form.shape == "object":
        return [fact[0] for fact in members]
    key = naming_key(form)
    if key is None:
        return []
    place = [field.key for field in form.fields if not field.key.endswith("_type")].index(key)
    return [fact[place] for fact in members]


def summarise(counts: Mapping[str, float]) -> dict[str, float]:
    """Micro-averaged F1, precision and recall (strict), and F1 with types."""

    def scores(suffix: str) -> tuple[float, float, float]:
        tp, fp, fn = (counts.get(part + suffix, 0.0) for part in ("tp", "fp", "fn"))
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn) if tp + fn else 0.0
        f1 = 2 * tp / (2 * tp + fp + fn) if tp else float(not fp + fn)  # nothing to find and nothing given is right
        return precision, recall, f1

    precision, recall, f1 = scores("")
    return {"f1": f1, "precision": precision, "recall": recall, "f1_typed": scores("_typed")[2]}
