"""Marked places of a text → the answers they stand for: entities, triples.

Offsets are checked against the text, for an offset that is off by one teaches half a word. Counts characters as Python
and doccano do (Unicode code points), from 0, the end excluded. Knows no annotation tool's keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weitiao.data.record import RowFindings, kind_of, shown

TRIPLES = (
    "找出下面文本中的实体关系三元组，用 JSON 列表回答，"
    "每个三元组写明 predicate、object_type、subject_type、object、subject。\n\n{text}"
)
"""How triples are asked for when the recipe gives no prompt."""
ENTITIES = "找出下面文本中的实体，用 JSON 列表回答，每个实体写明 text 和 label。\n\n{text}"
"""How entities are asked for when the recipe gives no prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One marked place."""

    text: str
    label: str
    start: int | None = None
    """Where it starts in the text; None when the row does not say."""


def check_span(
    text: str, start: object, end: object, stated: object, *, place: str, findings: RowFindings
) -> tuple[str, int] | None:
    """What stands between the offsets and where it starts; None after a finding when they or the text do not fit."""
    if not isinstance(start, int) or not isinstance(end, int) or isinstance(start, bool) or isinstance(end, bool):
        seen = f"are {shown(start)} and {shown(end)}"
        findings.add(place, f"the offsets {seen}, not two whole numbers.", "Write where the span starts and ends.")
        return None
    if not 0 <= start < end <= len(text):
        message = f"the offsets {start} and {end} do not lie in the text, which has {len(text)} characters."
        findings.add(place, message, "Count characters from 0; the end is the first character after the span.")
        return None
    found = text[start:end]
    if stated is not None and stated != found:
        message = f"the text from {start} to {end} is {shown(found)}, but the row says {shown(stated)}."
        where = text.find(stated) if isinstance(stated, str) and stated else -1
        fix = f"It stands at {where}: mend the offsets." if where >= 0 else "Mend the offsets or the text."
        findings.add(place, message, fix)
        return None
    return found, start


def write_entities(spans: Sequence[Span]) -> list[Any]:
    """The answer of an entity row, in the order of the text: ``[{"text": "南京", "label": "地名"}, …]``.

    The keys are the words of doccano and Label Studio. Spans whose place is unknown keep their order.
    """
    ordered = list(spans)
    if all(span.start is not None for span in spans):
        ordered.sort(key=lambda span: (span.start or 0, len(span.text)))
    return [{"text": span.text, "label": span.label} for span in ordered]


def write_triple(*, predicate: str, subject: Span, object: Span) -> Mapping[str, Any]:
    """One triple in the key order of the widespread DuIE-style rows, so that sets from several tools share one form.

    A model that learns to write the predicate first has named the relation before it looks for its ends.
    """
    return {
        "predicate": predicate,
        "object_type": object.label,
        "subject_type": subject.label,
        "object": object.text,
        "subject": subject.text,
    }


def read_name(holder: Mapping[str, Any], keys: Sequence[str], place: str, findings: RowFindings) -> str:
    """The first text under one of `keys`; "" after a finding when there is none."""
    for key in keys:
        value = holder.get(key)
        if value is None:
            continue
        if isinstance(value, str) and value.strip():
            return value
        findings.add(f"{place}.{key}", f"is {shown(value)}, not a name.", "Write it as a text.")
        return ""
    findings.add(f"{place}.{keys[0]}", "is missing.", f"Add {' or '.join(shown(key) for key in keys)}.")
    return ""


def read_objects(row: Mapping[str, Any], key: str, findings: RowFindings) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of the list under `key`, each with its place; none for null."""
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        findings.add(key, f"is {kind_of(value)}, not a list of objects.", "Write a list, an empty one for nothing.")
        return []
    found: list[tuple[str, Mapping[str, Any]]] = []
    for index, entry in enumerate(value):
        if isinstance(entry, dict):
            found.append((f"{key}[{index}]", entry))
        else:
            findings.add(f"{key}[{index}]", f"is {kind_of(entry)}, not an object.", "Write one object per entry.")
    return found
