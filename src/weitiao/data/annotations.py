"""Rows of annotation tools and of extraction data sets → `Record`: one function per format, named by both ends.

    doccano_relations  {"text", "entities": [{"id", "label", "start_offset", "end_offset"}], "relations": […]}
    doccano_entities   the same without relations
    text_spans         {"text", "label": [[start, end, "地名"], …]}                           doccano, Label Studio
    text_label         {"text", "label": "体育" or ["体育", "财经"]}                          doccano
    text_entities      {"text", "entities": [{"entity_text", "entity_names"}, …]}             named entities
    uie                {"content", "result_list": [{"text", "start", "end"}], "prompt"}       PaddleNLP's UIE
    spo_list           {"text", "spo_list": [{"predicate", "subject", "object", …}]}          DuIE

Where a row says what is marked but not how to ask for it, the prompt is this module's own unless the source names one.
Label Studio's export has a module of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weitiao.data.instructions import Asking, answer_record
from weitiao.data.options import ReadOptions
from weitiao.data.record import Record, RowFindings, Target, kind_of, read_target, read_text, shown
from weitiao.data.spans import (
    ENTITIES,
    TRIPLES,
    Span,
    check_span,
    read_name,
    read_objects,
    write_entities,
    write_triple,
)
from weitiao.errors import Problem

Row = Mapping[str, Any]


def _answer(
    row: Row, source: str, options: ReadOptions, findings: RowFindings, *, template: str, target: Target | None
) -> Record | list[Problem]:
    asking = Asking(main="text", template=template)
    return answer_record(row, source, options, asking=asking, fields=row, target=target, findings=findings)


def _has_list(row: Row, key: str, findings: RowFindings, *, require_target: bool) -> bool:
    """Whether the row has its answers under `key`; a finding when it must and does not. An empty list is an answer."""
    if row.get(key) is None and require_target:
        findings.add(key, "is missing.", "Add the list; an empty one where there is nothing to find.")
    return row.get(key) is not None


# --- doccano ---------------------------------------------------------------------------------------------------------


def doccano_relations_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a doccano row with relations: its target is the list of triples, in the row's order."""
    findings = RowFindings(source)
    text = read_text(row, "text", "text", findings)
    spans = _read_doccano_spans(row, text, findings)
    triples = []
    for place, relation in read_objects(row, "relations", findings):
        predicate = read_name(relation, ("type", "label"), place, findings)
        ends = [_read_end(relation, key, spans, place, findings) for key in ("from_id", "to_id")]
        if ends[0] is not None and ends[1] is not None:
            triples.append(write_triple(predicate=predicate, subject=ends[0], object=ends[1]))
    target = triples if _has_list(row, "relations", findings, require_target=require_target) else None
    return _answer(row, source, options, findings, template=TRIPLES, target=target)


def doccano_entities_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a doccano row without relations: its target is the list of entities."""
    findings = RowFindings(source)
    text = read_text(row, "text", "text", findings)
    spans = list(_read_doccano_spans(row, text, findings).values())
    if row.get("relations") not in (None, []):
        fix = "Name the format doccano_relations, or remove the relations."
        findings.add("relations", "stand in the row, but it is read as doccano_entities.", fix)
    target = write_entities(spans) if _has_list(row, "entities", findings, require_target=require_target) else None
    return _answer(row, source, options, findings, template=ENTITIES, target=target)


def _read_doccano_spans(row: Row, text: str, findings: RowFindings) -> dict[object, Span]:
    spans: dict[object, Span] = {}
    for place, entity in read_objects(row, "entities", findings):
        label = read_name(entity, ("label",), place, findings)
        start, end = entity.get("start_offset"), entity.get("end_offset")
        found = check_span(text, start, end, entity.get("text"), place=place, findings=findings) if text else None
        key = entity.get("id")
        if key is None or isinstance(key, list | dict) or key in spans:
            if row.get("relations"):
                seen = "has no id" if key is None else f"has the id {shown(key)} twice or as a list"
                findings.add(f"{place}.id", f"{seen}, so relations cannot point at it.", "Give each entity an id.")
            key = place
        if found is not None:
            spans[key] = Span(text=found[0], label=label, start=found[1])
        else:
            spans[key] = Span(text="", label=label)  # reported, so never a record; keeps its id known
    return spans


def _read_end(relation: Row, key: str, spans: Mapping[object, Span], place: str, findings: RowFindings) -> Span | None:
    end = relation.get(key)
    if not isinstance(end, list | dict) and end in spans:
        return spans[end]
    findings.add(f"{place}.{key}", f"is {shown(end)}, the id of no entity of the row.", "Write an entity's id.")
    return None


LABELS = "判断下面的文本属于哪一类，只回答类名。\n\n{text}"
"""How a label is asked for when the recipe gives no prompt."""


def text_label_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"text", "label"}`` row whose label is a text or a list of texts."""
    findings = RowFindings(source)
    read_text(row, "text", "text", findings)
    target = read_target(row, "label", "label", findings, require_target=require_target)
    labels = target if isinstance(target, list) else []
    if isinstance(target, dict) or not all(isinstance(label, str) and label.strip() for label in labels):
        findings.add("label", f"is {shown(target)}, not a label or a list of labels.", "Write texts.")
    return _answer(row, source, options, findings, template=LABELS, target=target)


def text_spans_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"text", "label": [[start, end, "地名"], …]}`` row: its target is the list of entities."""
    findings = RowFindings(source)
    text = read_text(row, "text", "text", findings)
    label = row.get("label")
    if not isinstance(label, list):
        if label is not None or require_target:
            findings.add("label", f"is {kind_of(label)}, not a list of spans.", 'Write [[start, end, "label"], …].')
        return _answer(row, source, options, findings, template=ENTITIES, target=None)
    spans = [_read_label_span(entry, f"label[{i}]", text, findings) for i, entry in enumerate(label)]
    entities = write_entities([span for span in spans if span is not None])
    return _answer(row, source, options, findings, template=ENTITIES, target=entities)


def _read_label_span(entry: object, place: str, text: str, findings: RowFindings) -> Span | None:
    fix = 'Write [start, end, "label"].'
    if isinstance(entry, dict):
        name = _read_labels(entry, place, findings)
        found = check_span(
            text, entry.get("start"), entry.get("end"), entry.get("text"), place=place, findings=findings
        )
        if len(name) > 1:
            findings.add(place, f"has {len(name)} labels.", "Write one entry for each.")
        return Span(text=found[0], label=name[0], start=found[1]) if found and name else None
    if not isinstance(entry, list) or len(entry) != 3:
        findings.add(place, f"is {shown(entry)}, not a span.", fix)
        return None
    found = check_span(text, entry[0], entry[1], None, place=place, findings=findings)
    if not isinstance(entry[2], str) or not entry[2].strip():
        findings.add(place, f"has the label {shown(entry[2])}, which is no text.", fix)
        return None
    return Span(text=found[0], label=entry[2], start=found[1]) if found else None


# --- {"text", "entities": [{"entity_text", …}]} ----------------------------------------------------------------------


def text_entities_to_record(
    row: Row, source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of a ``{"text", "entities": [{"entity_text" or "text", "entity_label" or "label", …}]}`` row.

    ``entity_names`` lists names of one label, synonyms: the first counts. ``labels`` lists labels that all hold: each
    becomes an entity. Offsets (``start_idx``, ``end_idx`` or ``start``, ``end``) are checked where they are given.
    """
    findings = RowFindings(source)
    text = read_text(row, "text", "text", findings)
    spans: list[Span] = []
    for place, entity in read_objects(row, "entities", findings):
        stated = read_name(entity, ("entity_text", "text", "entity", "word"), place, findings)
        labels = _read_labels(entity, place, findings)
        start: int | None = None
        for first, last in (("start_idx", "end_idx"), ("start", "end"), ("start_offset", "end_offset")):
            if entity.get(first) is not None and stated and text:
                found = check_span(text, entity[first], entity.get(last), stated, place=place, findings=findings)
                start = found[1] if found else None
                break
        spans += [Span(text=stated, label=label, start=start) for label in labels]
    target = write_entities(spans) if _has_list(row, "entities", findings, require_target=require_target) else None
    return _answer(row, source, options, findings, template=ENTITIES, target=target)


def _read_labels(entity: Row, place: str, findings: RowFindings) -> list[str]:
    for key in ("entity_names", "labels"):
        names = entity.get(key)
        if isinstance(names, list) and names and entity.get("entity_label") is None:
            if not all(isinstance(name, str) and name.strip() for name in names):
                findings.add(f"{place}.{key}", f"is {shown(names)}, not a list of names.", "Write names as texts.")
                return []
            return names[:1] if key == "entity_names" else names
    keys = ("entity_label", "label", "type", "entity_type", "entity_names", "labels")
    name = read_name(entity, keys, place, findings)
    return [name] if name else []


# --- UIE and DuIE ----------------------------------------------------------------------------------------------------

UIE = "从下面的文本中找出“{prompt}”，用 JSON 列表回答。\n\n{content}"
"""How one kind of entity, or one relation of an entity, is asked for when the recipe gives no prompt."""


def uie_to_record(row: Row, source: str, options: ReadOptions, *, require_target: bool) -> Record | list[Problem]:
    """The record of a ``{"content", "result_list", "prompt"}`` row: its target is the list of the texts found."""
    findings = RowFindings(source)
    content = read_text(row, "content", "content", findings)
    read_text(row, "prompt", "prompt", findings)
    results: list[Any] = []
    for place, result in read_objects(row, "result_list", findings):
        stated = result.get("text")
        found = check_span(content, result.get("start"), result.get("end"), stated, place=place, findings=findings)
        results += [found[0]] if found is not None else []
    target = results if _has_list(row, "result_list", findings, require_target=require_target) else None
    asking = Asking(main="content", template=UIE)
    return answer_record(row, source, options, asking=asking, fields=row, target=target, findings=findings)


def spo_list_to_record(row: Row, source: str, options: ReadOptions, *, require_target: bool) -> Record | list[Problem]:
    """The record of a DuIE row: its target is the list of triples.

    DuIE 2.0's objects with several slots, ``{"@value": "…", "inWork": "…"}``, become one triple for each slot, whose
    predicate is ``predicate_slot``.
    """
    findings = RowFindings(source)
    read_text(row, "text", "text", findings)
    triples: list[Any] = []
    for place, spo in read_objects(row, "spo_list", findings):
        predicate = read_name(spo, ("predicate",), place, findings)
        subject = Span(
            text=read_name(spo, ("subject",), place, findings),
            label=read_name(spo, ("subject_type",), place, findings),
        )
        objects, types = _read_slots(spo, "object", place, findings), _read_slots(spo, "object_type", place, findings)
        for slot, value in objects.items():
            if slot not in types:
                findings.add(f"{place}.object_type", f"has no type for {shown(slot)}.", "Add it.")
                continue
            name = predicate if slot == "@value" else f"{predicate}_{slot}"
            found = Span(text=value, label=types[slot])
            triples.append(write_triple(predicate=name, subject=subject, object=found))
    target = triples if _has_list(row, "spo_list", findings, require_target=require_target) else None
    return _answer(row, source, options, findings, template=TRIPLES, target=target)


def _read_slots(spo: Row, key: str, place: str, findings: RowFindings) -> dict[str, str]:
    value = spo.get(key)
    if not isinstance(value, dict):
        return {"@value": read_name(spo, (key,), place, findings)}
    slots = {}
    for slot, text in value.items():
        if isinstance(text, str) and text.strip():
            slots[slot] = text
        elif text not in (None, ""):
            findings.add(f"{place}.{key}.{slot}", f"is {kind_of(text)}, not text.", "Write it as a string.")
    if not slots:
        findings.add(f"{place}.{key}", "is an object without a text in it.", 'Write a text, or {"@value": "…"}.')
    return slots
