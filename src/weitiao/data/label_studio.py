"""Label Studio's JSON export → `Record`.

    {"data": {"text": "…"}, "annotations": [{"result": [
        {"id": "a", "type": "labels",   "value": {"start": 0, "end": 2, "text": "…", "labels": ["人物"]}},
        {"type": "relation", "from_id": "a", "to_id": "b", "labels": ["作者"]},
        {"type": "choices",  "from_name": "topic", "value": {"choices": ["体育"]}},
        {"type": "textarea", "value": {"text": ["…"]}}]}]}

Spans become entities, or triples where relations join them; choices a list of labels; a text area the answer itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weitiao.data.annotations import LABELS
from weitiao.data.instructions import Asking, answer_record
from weitiao.data.options import ReadOptions
from weitiao.data.record import Record, RowFindings, Target, kind_of, shown
from weitiao.data.spans import ENTITIES, TRIPLES, Span, check_span, read_objects, write_entities, write_triple
from weitiao.errors import Problem

Row = Mapping[str, Any]


def label_studio_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of one task of the export, or all its problems.

    The text is ``data.text``, or the only text in ``data``. Several annotators must agree; a skipped task is a problem.
    """
    findings = RowFindings(source)
    key = _find_text_key(row.get("data"), findings)
    data = row["data"] if isinstance(row.get("data"), dict) else {}
    text = data[key] if key else ""
    answers = [
        _read_annotation(annotation, place, text, findings)
        for place, annotation in read_objects(row, "annotations", findings)
        if not annotation.get("was_cancelled")
    ]
    target, template = answers[0] if answers else (None, ENTITIES)
    if not answers and require_target and not findings.problems:
        findings.add(
            "annotations", "holds no finished annotation.", "Annotate the task, or leave it out of the export."
        )
    other = next((index for index, answer in enumerate(answers) if answer[0] != target), None)
    if other is not None:
        findings.add("annotations", "disagree: two annotators give different answers.", "Keep the right one.")
    asking = Asking(main="text", template=template)
    fields = {"text": text, **data}
    return answer_record(row, source, options, asking=asking, fields=fields, target=target, findings=findings)


def _find_text_key(data: object, findings: RowFindings) -> str:
    """The key of the text in the task's data; "" after a finding."""
    if not isinstance(data, dict):
        findings.add("data", f"is {kind_of(data)}, not the task's data.", 'Write {"text": "…"}.')
        return ""
    texts = [key for key, value in data.items() if isinstance(value, str) and value.strip()]
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return str(texts[0])
    known = ", ".join(shown(key) for key in texts) or "none"
    findings.add("data", f"has no `text`, and its texts are {known}.", "Rename the text that was annotated to `text`.")
    return ""


def _read_annotation(annotation: Row, place: str, text: str, findings: RowFindings) -> tuple[Target | None, str]:
    """The answer of one annotation, and how it is asked for."""
    spans: dict[str, Span] = {}
    relations: list[tuple[str, Row]] = []
    choices: dict[str, list[str]] = {}
    written: list[str] = []
    if annotation.get("result") is None:
        findings.add(f"{place}.result", "is missing.", "Export the task with its results; an empty list for none.")
    for where, result in read_objects(annotation, "result", findings):
        here = f"{place}.{where}"
        kind, value = result.get("type"), result.get("value")
        if kind == "relation":
            relations.append((here, result))
        elif kind in ("labels", "hypertextlabels") and isinstance(value, dict):
            _read_span(result, value, here, text, spans, findings)
        elif kind == "choices" and isinstance(value, dict):
            choices.setdefault(str(result.get("from_name", "")), []).extend(_names(value, "choices", here, findings))
        elif kind == "textarea" and isinstance(value, dict):
            written += _names({"text": _as_list(value.get("text"))}, "text", here, findings)
        else:
            known = "labels, relation, choices or textarea"
            findings.add(f"{here}.type", f"is {shown(kind)}, not {known} with a value.", "Remove this result.")
    kinds = [bool(spans), bool(choices), bool(written)]
    if sum(kinds) > 1:
        findings.add(place, "mixes spans, choices and texts in one annotation.", "Export each kind on its own.")
    if relations:
        return [triple for triple in (_triple(*one, spans, findings) for one in relations) if triple], TRIPLES
    if choices:
        return (next(iter(choices.values())) if len(choices) == 1 else dict(choices)), LABELS
    if written:
        return "\n".join(written), "{text}"
    return write_entities(list(spans.values())), ENTITIES


def _read_span(result: Row, value: Row, place: str, text: str, spans: dict[str, Span], findings: RowFindings) -> None:
    labels = _names(value, "labels" if "labels" in value else "hypertextlabels", place, findings)
    found = check_span(text, value.get("start"), value.get("end"), value.get("text"), place=place, findings=findings)
    if len(labels) != 1:
        if labels:
            findings.add(place, f"has {len(labels)} labels.", "Mark the span once for each label.")
        return
    key = result.get("id")
    name = key if isinstance(key, str) and key not in spans else place
    spans[name] = Span(text=found[0] if found else "", label=labels[0], start=found[1] if found else None)


def _names(holder: Row, key: str, place: str, findings: RowFindings) -> list[str]:
    names = holder.get(key)
    if isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names):
        return names
    findings.add(f"{place}.value.{key}", f"is {shown(names)}, not a list of names.", 'Write ["…"].')
    return []


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _triple(place: str, relation: Row, spans: Mapping[str, Span], findings: RowFindings) -> Mapping[str, Any] | None:
    ends = []
    for key in ("from_id", "to_id"):
        end = relation.get(key)
        if isinstance(end, str) and end in spans:
            ends.append(spans[end])
        else:
            fix = "Write the id of a marked span."
            findings.add(f"{place}.{key}", f"is {shown(end)}, the id of no span of the annotation.", fix)
    labels = relation.get("labels")
    if not isinstance(labels, list) or len(labels) != 1 or not isinstance(labels[0], str) or not labels[0].strip():
        findings.add(f"{place}.labels", f"is {shown(labels)}, not one name.", "Give the relation one label.")
        return None
    if len(ends) != 2:
        return None
    if relation.get("direction") == "left":
        ends.reverse()
    elif relation.get("direction") == "bi":
        findings.add(f"{place}.direction", "is both ways, which is two triples.", "Draw one relation each way.")
    return write_triple(predicate=labels[0], subject=ends[0], object=ends[1])
