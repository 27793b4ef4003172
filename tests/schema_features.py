"""The features of JSON Schema that answers can be held to, each with answers that follow it and answers that do not.

    python tests/schema_features.py        writes docs/reference/json-schema.md

tests/test_declared_forms.py tries every row against the engine and the standard, and the page against this table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weitiao.tasks.schema import ANNOTATIONS, FORMATS, MAX_ITEMS, MAX_LENGTH

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "json-schema.md"


@dataclass(frozen=True)
class Feature:
    """A feature that is held to, or refused with a sentence that holds `refused`."""

    name: str
    schema: Mapping[str, Any]
    valid: Sequence[Any] = ()
    invalid: Sequence[Any] = ()
    refused: str = ""
    note: str = ""


_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "sub": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["v"],
        }
    },
    "$ref": "#/$defs/node",
}
_PAIR = {"a": {"type": "integer"}, "b": {"type": "integer"}}


def _object(**keywords: Any) -> dict[str, Any]:
    return {"type": "object", **keywords}


FEATURES = (
    Feature("type", {"type": "string"}, ["a", "", '中\n"\\'], [1, None, ["a"], True]),
    Feature("type: integer", {"type": "integer"}, [0, -12, 10**12], [1.5, "1", None]),
    Feature("type: number", {"type": "number"}, [0, -1.5, 1e300], ["1", True]),
    Feature("type: boolean", {"type": "boolean"}, [True, False], [0, "true", None]),
    Feature("type: null", {"type": "null"}, [None], [0, "", False]),
    Feature("type: array", {"type": "array"}, [[], [1, "a", [None]]], [{}, "[]"]),
    Feature("type: object", {"type": "object"}, [{}, {"a": {"b": [1]}}], [[], "{}"]),
    Feature("several types", {"type": ["string", "null"]}, ["a", None], [1, []]),
    Feature("enum", {"enum": ["甲", 1, None, [1, 2], {"a": 1}]}, ["甲", 1, None, [1, 2], {"a": 1}], ["乙", 2, [1], {}]),
    Feature("const", {"const": {"a": [1, 2]}}, [{"a": [1, 2]}], [{"a": [1]}, None]),
    Feature("required", _object(properties=_PAIR, required=["a"]), [{"a": 1}, {"a": 1, "b": 2}], [{}, {"b": 2}]),
    Feature(
        "properties",
        _object(properties=_PAIR),
        [{}, {"b": 2}, {"a": 1, "b": 2}],
        [{"a": "x"}],
        note="written in the order of the schema",
    ),
    Feature(
        "additionalProperties",
        _object(properties=_PAIR, additionalProperties={"type": "string"}),
        [{"a": 1, "c": "x"}, {"c": "x", "d": "y"}],
        [{"c": 1}],
        note="left out beside `properties`: the model writes no others",
    ),
    Feature(
        "additionalProperties: false", _object(properties=_PAIR, additionalProperties=False), [{"a": 1}], [{"c": 1}]
    ),
    Feature(
        "patternProperties",
        _object(patternProperties={"^n_": {"type": "integer"}}, additionalProperties=False),
        [{"n_1": 1, "n_2": 2}],
        [{"n_1": "x"}, {"m": 1}],
    ),
    Feature(
        "minProperties",
        _object(additionalProperties={"type": "integer"}, minProperties=2),
        [{"a": 1, "b": 2}],
        [{}, {"a": 1}],
    ),
    Feature(
        "maxProperties",
        _object(additionalProperties={"type": "integer"}, maxProperties=1),
        [{}, {"a": 1}],
        [{"a": 1, "b": 2}],
    ),
    Feature(
        "minProperties beside optional properties",
        _object(properties=_PAIR, minProperties=2),
        refused='min/maxProperties only supported when all keys listed in "properties" are required',
    ),
    Feature("propertyNames", _object(propertyNames={"maxLength": 2}), refused="$.propertyNames"),
    Feature(
        "dependentRequired", _object(properties=_PAIR, dependentRequired={"a": ["b"]}), refused="$.dependentRequired"
    ),
    Feature("dependentSchemas", _object(dependentSchemas={"a": {"required": ["b"]}}), refused="$.dependentSchemas"),
    Feature("dependencies", _object(dependencies={"a": ["b"]}), refused="$.dependencies"),
    Feature("unevaluatedProperties", _object(unevaluatedProperties=False), refused="$.unevaluatedProperties"),
    Feature("minLength", {"type": "string", "minLength": 2}, ["ab", "中文", "😀😀"], ["", "中"]),
    Feature("maxLength", {"type": "string", "maxLength": 2}, ["", "ab", "😀😀"], ["abc", "中文字"]),
    Feature("pattern", {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"}, ["AB1", "ZZ999"], ["A1", "AB", "xAB1"]),
    Feature("pattern within the text", {"type": "string", "pattern": "元"}, ["12元", "元宵"], ["12", ""]),
    Feature("pattern with look-around", {"type": "string", "pattern": "^(?=a)b"}, refused="look-around"),
    Feature("format: date", {"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "1. Mai"]),
    Feature(
        "format: date-time", {"type": "string", "format": "date-time"}, ["2024-05-01T12:00:00Z"], ["2024-05-01 noon"]
    ),
    Feature("format: time", {"type": "string", "format": "time"}, ["12:00:00Z"], ["noon"]),
    Feature("format: duration", {"type": "string", "format": "duration"}, ["P3D"], ["3 days"]),
    Feature("format: email", {"type": "string", "format": "email"}, ["a@b.cn"], ["a.b.cn"]),
    Feature("format: hostname", {"type": "string", "format": "hostname"}, ["example.org"], ["-a-"]),
    Feature("format: ipv4", {"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["127.0.0.256"]),
    Feature("format: ipv6", {"type": "string", "format": "ipv6"}, ["::1"], ["1:2"]),
    Feature("format: uri", {"type": "string", "format": "uri"}, ["https://example.org/a"], ["no uri"]),
    Feature(
        "format: uuid", {"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]
    ),
    Feature("any other format", {"type": "string", "format": "iri"}, refused="the format 'iri' is not known"),
    Feature("minimum", {"type": "integer", "minimum": 3}, [3, 400], [2, -5]),
    Feature("maximum", {"type": "number", "maximum": 2.5}, [2.5, -100, 0.1], [2.6, 3]),
    Feature("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": 3}, [4], [3]),
    Feature("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 3}, [2.99], [3, 3.5]),
    Feature("multipleOf", {"type": "integer", "multipleOf": 3}, [0, 3, 300], [1, 4]),
    Feature("items", {"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"], [1, None]]),
    Feature(
        "prefixItems",
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [[], [1], [1, "a"]],
        [["a"], [1, 2], [1, "a", 3]],
    ),
    Feature("minItems", {"type": "array", "items": {"type": "integer"}, "minItems": 2}, [[1, 2]], [[], [1]]),
    Feature("maxItems", {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [[], [1, 2]], [[1, 2, 3]]),
    Feature("uniqueItems", {"type": "array", "uniqueItems": True}, refused="$.uniqueItems"),
    Feature("uniqueItems: false", {"type": "array", "uniqueItems": False}, [[1, 1]], [{}]),
    Feature("contains", {"type": "array", "contains": {"const": 1}}, refused="$.contains"),
    Feature("minContains", {"type": "array", "minContains": 1}, refused="$.minContains"),
    Feature("maxContains", {"type": "array", "maxContains": 1}, refused="$.maxContains"),
    Feature("unevaluatedItems", {"type": "array", "unevaluatedItems": False}, refused="$.unevaluatedItems"),
    Feature("anyOf", {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]}, [1, "ab"], ["abc", None]),
    Feature("oneOf", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None, 1.5]),
    Feature(
        "oneOf that overlaps",
        {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]},
        refused="oneOf constraints are not supported",
    ),
    Feature("allOf", {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 5}]}, [2, 5], [1, 6]),
    Feature(
        "allOf of objects",
        {
            "allOf": [
                _object(properties={"a": {"type": "integer"}}, required=["a"]),
                _object(properties={"b": {"type": "string"}}),
            ]
        },
        [{"a": 1}, {"a": 1, "b": "x"}],
        [{"b": "x"}, {"a": 1, "b": 2}],
    ),
    Feature("not", {"not": {"type": "string"}}, refused="$.not"),
    Feature(
        "if, then, else", {"if": {"type": "string"}, "then": {"maxLength": 2}, "else": {"minimum": 1}}, refused="$.then"
    ),
    Feature(
        "$ref and $defs",
        {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}},
        [[1]],
        [["a"]],
    ),
    Feature(
        "$ref with other keywords beside it",
        {"$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s", "maxLength": 2},
        ["ab"],
        ["abc", 1],
    ),
    Feature(
        "recursive $ref",
        _TREE,
        [{"v": 1}, {"v": 1, "sub": [{"v": 2, "sub": []}]}],
        [{"sub": []}, {"v": 1, "sub": [{}]}],
    ),
    Feature("$ref to itself", {"$ref": "#"}, refused="refers to itself"),
    Feature("$ref to another document", {"$ref": "https://example.org/a.json"}, refused="nothing is fetched"),
    Feature("$dynamicRef", {"$dynamicRef": "#node"}, refused="$.$dynamicRef"),
    Feature("an unknown keyword", {"type": "object", "propertes": {}}, refused="Did you mean properties?"),
    Feature("a keyword of one's own", {"type": "integer", "x-source": "form 7"}, [1], ["a"]),
    Feature("no keyword at all", {}, [1, "a", None, [1], {"a": 1}], []),
    Feature("false", _object(properties={"a": False, "b": {"type": "integer"}}), [{}, {"b": 1}], [{"a": 1}]),
)


def page() -> str:
    """The text of docs/reference/json-schema.md."""
    held = [one for one in FEATURES if not one.refused]
    refused = [one for one in FEATURES if one.refused]
    rows = [f"| {one.name} | {_shown(one.valid)} | {_shown(one.invalid)} | {one.note} |" for one in held]
    return f"""# JSON Schema

Written by `tests/schema_features.py`; do not edit. Every row is tried in the tests: against the engine that holds
answers to the schema while they are written, and against the standard (2020-12) as the `jsonschema` package reads it.

A task of the recipe may give its answers' form as a JSON Schema (`json_schema`, written out or as the path of a .json
file). Answers are then written on one line, in the separators and the code fence of the labels, or of JSON as Python
writes it where there are none; spaces are free in labels, not in answers. What cannot be enforced while an answer is
written is refused when the recipe is used, with its place.

## Held to

| feature | such as | never | |
|---|---|---|---|
{chr(10).join(rows)}

Known formats: {", ".join(FORMATS)}. Annotations are read over: {", ".join(f"`{name}`" for name in ANNOTATIONS)}.

## Refused

{chr(10).join(f"- {one.name}" for one in refused)}

## Where answers are narrower than the schema

- Keys are written in the order of `properties`, then of `required`; others follow. Labels are rewritten so.
- An object that names its `properties` gets no others unless `additionalProperties` or `patternProperties` is there. A
  schema that joins objects (`allOf`, or `$ref`, `anyOf`, `oneOf` beside `properties`) is left as it is.
- A `string` without `maxLength` has at most {MAX_LENGTH:,} characters, an `array` without `maxItems` at most
  {MAX_ITEMS} items.
- In patterns, `\\d` and `\\w` mean ASCII characters, as the standard recommends.
- No key stands twice in an object. Where keys are free, one that does is found when the answer is read, and refused.
"""


def _shown(values: Sequence[Any]) -> str:
    return " · ".join(f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|") for value in values)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
