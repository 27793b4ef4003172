"""Answers that a user's JSON Schema describes: what of a schema can be held to, and how it is held to.

A schema is checked once, when the recipe is read: every keyword that the engine cannot enforce while an answer is
written is refused with its place. A schema that passes becomes a rule of the grammar (`rule_of_schema`), reads answers
(`validate`) and gives the order of keys (`ordered`). docs/reference/json-schema.md lists the features.

The grammar is never wider than the schema, but narrower where the schema leaves answers without end: strings and lists
without a greatest length get one, and an object that names its properties has no others unless the schema says so.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import FormError
from .byte_matcher import complaint

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

MAX_ITEMS = 64
"""Longest list where the schema gives none."""
MAX_LENGTH = 1_000
"""Longest string, in characters, where the schema gives none."""

ENFORCED = (
    "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems",
    "properties", "required", "type",
)  # fmt: skip
REFUSED = (
    "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "contains", "dependencies",
    "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains", "not", "propertyNames",
    "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
)  # fmt: skip
ANNOTATIONS = (
    "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "default", "definitions",
    "deprecated", "description", "examples", "id", "readOnly", "title", "writeOnly",
)  # fmt: skip
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")

Place = tuple[str | int, ...]


def check_schema(schema: Mapping[str, Any]) -> list[str]:
    """What keeps `schema` from being held to, a sentence each with the place; empty when nothing does."""
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        return [f"{_path(tuple(error.absolute_path))} is no JSON Schema: {error.message}."]
    problems = [problem for place, inner in _subschemas(schema, ()) for problem in _unsupported(place, inner)]
    problems += [
        f"{_path(place)} refers to itself without an object or list between, so no answer ever follows it."
        for place, inner in _subschemas(schema, ())
        if not problems and _is_circle(schema, inner, ())
    ]
    return problems or _engine_complaints(schema)


def _engine_complaints(schema: Mapping[str, Any]) -> list[str]:
    """What the engine itself cannot hold answers to, at the innermost place where it says the same."""
    reason = _reason(schema)
    if not reason:
        return []
    inmost = max((place for place, inner in _subschemas(schema, ()) if _reason(inner) == reason), key=len, default=())
    return [f"{_path(inmost)} cannot be held to while an answer is written: {reason}."]


def _reason(schema: Mapping[str, Any]) -> str:
    return complaint(f"start: answer\nanswer: {rule_of_schema(schema)}").rpartition("JSON schema: ")[2]


def _unsupported(place: Place, schema: Mapping[str, Any]) -> Iterator[str]:
    for keyword, value in schema.items():
        if keyword in REFUSED and not (keyword == "uniqueItems" and value is False):
            yield (
                f"{_path((*place, keyword))}: the keyword {keyword} cannot be enforced while an answer is written. "
                "Leave it out, and check it when the answer is used."
            )
        elif keyword == "x-guidance" or (
            keyword not in (*ENFORCED, *ANNOTATIONS, *REFUSED) and not keyword.startswith("x-")
        ):
            near = difflib.get_close_matches(keyword, ENFORCED, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Leave it out; names of your own begin with x-."
            yield f"{_path((*place, keyword))}: there is no keyword {keyword}. {hint}"
    if schema.get("format", FORMATS[0]) not in FORMATS:
        yield (
            f"{_path((*place, 'format'))}: the format {schema['format']!r} is not known. "
            f"Known formats: {', '.join(FORMATS)}; or give a pattern."
        )
    if not str(schema.get("$ref", "#")).startswith("#"):
        yield (
            f"{_path((*place, '$ref'))}: {schema['$ref']!r} lies outside of the schema, and nothing is fetched. "
            "Copy what it refers to into $defs."
        )


def _is_circle(root: Any, schema: Any, above: tuple[int, ...]) -> bool:
    """Whether what `schema` says of an answer depends on what it says of the same answer."""
    if not isinstance(schema, Mapping):
        return False
    if id(schema) in above:
        return True
    inner = [_resolved(root, schema["$ref"])] if "$ref" in schema else []
    inner += [one for keyword in ("allOf", "anyOf", "oneOf") for one in schema.get(keyword, ())]
    return any(_is_circle(root, one, (*above, id(schema))) for one in inner)


def _subschemas(schema: Any, place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """`schema` and all schemas inside it, each with its place."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for inside, inner in _children(schema):
        yield from _subschemas(inner, (*place, *inside))


def _children(schema: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    for keyword in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
        for name, inner in _mapping(schema.get(keyword)).items():
            yield (keyword, name), inner
    for keyword in ("items", "prefixItems", "anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(keyword), list):
            for number, inner in enumerate(schema[keyword]):
                yield (keyword, number), inner
    for keyword in ("items", "additionalItems", "additionalProperties"):
        yield (keyword,), schema.get(keyword)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _path(place: Place) -> str:
    """``$.properties.name.items[0]``, as JSONPath writes it."""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)


# ---- grammar --------------------------------------------------------------------------------------------------


def rule_of_schema(
    schema: Mapping[str, Any], *, item_separator: str = ", ", key_separator: str = ": ", ensure_ascii: bool = False
) -> str:
    """What stands on the right of a grammar's rule for answers of `schema`, on one line, without free white space."""
    spelling = {
        "item_separator": item_separator,
        "key_separator": key_separator,
        "whitespace_flexible": False,
        "json_allow_general_unicode_escapes": ensure_ascii,
    }
    joined = any("allOf" in inner or _combines(inner) for _, inner in _subschemas(schema, ()))
    return f"%json {json.dumps({**_bounded(schema, closing=not joined), 'x-guidance': spelling})}"


def _combines(schema: Mapping[str, Any]) -> bool:
    """Whether properties come from several schemas at once, so that none of them may exclude the others'."""
    return bool({"$ref", "anyOf", "oneOf"} & schema.keys()) and bool({"properties", "required"} & schema.keys())


def _bounded(schema: Any, *, closing: bool) -> Any:
    """`schema` with a greatest length for strings and lists that have none, and its objects closed."""
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {key: value for key, value in schema.items() if key != "uniqueItems"}
    for place, inner in _children(schema):
        if isinstance(inner, Mapping):
            _put(made, place, _bounded(inner, closing=closing))
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    free = not ({"const", "enum"} & schema.keys())
    if "string" in kinds and free and "format" not in schema:
        made.setdefault("maxLength", max(MAX_LENGTH, schema.get("minLength", 0)))
    if "array" in kinds and free:
        made.setdefault("maxItems", max(MAX_ITEMS, schema.get("minItems", 0), len(schema.get("prefixItems", ()))))
    if closing and schema.get("properties") and "patternProperties" not in schema:
        made.setdefault("additionalProperties", False)
    return made


def _put(made: dict[str, Any], place: Place, value: Any) -> None:
    keyword, *rest = place
    if not rest:
        made[str(keyword)] = value
        return
    outer = made[str(keyword)]
    copy: Any = dict(outer) if isinstance(outer, Mapping) else list(outer)
    copy[rest[0]] = value
    made[str(keyword)] = copy


# ---- reading and ordering -------------------------------------------------------------------------------------


def validate(definition: str, answer: Any) -> None:
    """Raise FormError, with the place, unless `answer` follows the schema that `definition` is the JSON text of."""
    error = next(iter(_validator(definition).iter_errors(answer)), None)
    if error is not None:
        raise FormError(f"{_path(tuple(error.absolute_path))} does not follow the schema: {error.message[:200]}.")


@lru_cache(maxsize=32)
def _validator(definition: str) -> Validator:
    import jsonschema

    schema = json.loads(definition)
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    made: Validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    return made


def ordered(definition: str, answer: Any) -> Any:
    """`answer` with the keys of its objects as the grammar writes them: `properties`, `required`, then the others."""
    schema = json.loads(definition)
    return _ordered(schema, schema, answer)


def _ordered(root: Any, schema: Any, answer: Any) -> Any:
    parts = list(_parts(root, schema, answer, depth=0))
    if isinstance(answer, list):
        return [_ordered(root, _item_schema(parts, number), item) for number, item in enumerate(answer)]
    if not isinstance(answer, Mapping):
        return answer
    named = [key for part in parts for key in _mapping(part.get("properties"))]
    named += [key for part in parts for key in part.get("required", ())]
    keys = [key for key in dict.fromkeys(named) if key in answer]
    keys += [key for key in answer if key not in keys]
    return {key: _ordered(root, _member_schema(parts, key), answer[key]) for key in keys}


def _parts(root: Any, schema: Any, answer: Any, *, depth: int) -> Iterator[Mapping[str, Any]]:
    """The schemas that speak of `answer` at this place, references followed, the first fitting alternative chosen."""
    if not isinstance(schema, Mapping) or depth > 16:
        return
    yield schema
    inner = list(schema.get("allOf", ()))
    if isinstance(schema.get("$ref"), str):
        inner.append(_resolved(root, schema["$ref"]))
    for keyword in ("anyOf", "oneOf"):
        fitting = (one for one in schema.get(keyword, ()) if _fits(root, one, answer))
        inner += [one for one in [next(fitting, None)] if one is not None]
    for one in inner:
        yield from _parts(root, one, answer, depth=depth + 1)


def _fits(root: Any, schema: Any, answer: Any) -> bool:
    return bool(_validator(json.dumps(root)).evolve(schema=schema).is_valid(answer))


def _resolved(root: Any, reference: str) -> Any:
    found = root
    for step in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            found = _mapping(found).get(step.replace("~1", "/").replace("~0", "~"))
    return found


def _item_schema(parts: list[Mapping[str, Any]], number: int) -> Any:
    for part in parts:
        first = part.get("prefixItems", ())
        if number < len(first):
            return first[number]
        if isinstance(part.get("items"), Mapping):
            return part["items"]
    return None


def _member_schema(parts: list[Mapping[str, Any]], key: str) -> Any:
    for part in parts:
        if key in _mapping(part.get("properties")):
            return part["properties"][key]
    return next((part["additionalProperties"] for part in parts if "additionalProperties" in part), None)
