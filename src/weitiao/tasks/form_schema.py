"""An answer form as JSON Schema: what programs are told of the answers they get.

Every answer that `AnswerForm.parse` gives is valid under it. What the labels show but the form does not demand, such as
the values a field had so far, stands under ``examples``.

    >>> answer_schema(AnswerForm(shape="label list", labels=("手机", "水果"), min_items=1, max_items=1))["items"]
    {'type': 'string', 'enum': ['手机', '水果']}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .fields import Field
from .forms import AnswerForm

_KINDS: Mapping[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "list of strings": {"type": "array", "items": {"type": "string"}},
    "list": {"type": "array"},
    "object": {"type": "object"},
}


def answer_schema(form: AnswerForm) -> dict[str, Any]:
    """The JSON Schema (2020-12) of parsed answers of `form`."""
    if form.shape == "json":
        return dict(json.loads(form.definition))
    if form.shape == "label":
        return {"type": "string", "enum": list(form.labels)}
    if form.shape == "text":
        return {"type": "string"}
    if form.shape == "pattern":
        return {"type": "string", "description": f"Matches the regular expression {form.definition}"}
    if form.shape == "grammar":
        return {"type": "string", "description": f"Follows the Lark grammar:\n{form.definition}"}
    if form.shape == "object":
        return _object(form)
    if form.shape == "object list":
        return {"type": "array", "items": _object(form)}
    if form.shape == "string list":
        return {"type": "array", "items": {"type": "string"}}
    return {"type": "array", "items": {"type": "string", "enum": list(form.labels)}}


def _object(form: AnswerForm) -> dict[str, Any]:
    keys = [field.key for field in form.fields]
    return {
        "type": "object",
        "properties": {field.key: _value(field) for field in form.fields},
        "required": keys,
        "additionalProperties": False,
    }


def _value(field: Field) -> dict[str, Any]:
    kinds = [_KINDS[kind] for kind in field.kind.split("|") if kind in _KINDS]
    schema: dict[str, Any] = dict(kinds[0]) if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}
    if field.values:
        schema["examples"] = list(field.values)
    told = ["copied from the text"] if field.copied else []
    told += [f"{field.absent} where the text has none"] if field.absent is not None else []
    if told:
        schema["description"] = "; ".join(told)
    return schema
