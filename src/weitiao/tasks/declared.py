"""A task's form as the user declares it, resting on what the labels show for everything left out.

Every wrong declaration is a RecipeError that names the key of the recipe. Knows forms; nothing of recipes or rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import RecipeError
from .forms import AnswerForm, Field, Shape
from .rules import check_rule
from .schema import check_schema

_ANY_KIND = "boolean|list|list of strings|null|number|object|string"
_LISTS = ("object list", "label list", "string list")


def declared_form(
    name: str,
    known: AnswerForm | None,
    *,
    shape: Shape | None = None,
    keys: Sequence[str] = (),
    labels: Sequence[str] = (),
    json_schema: Mapping[str, Any] | str | None = None,
    regex: str | None = None,
    lark: str | None = None,
    fence: str | None = None,
    min_items: int | None = None,
    max_items: int | None = None,
    ground: bool = True,
) -> AnswerForm:
    """The form of the task `name`.

    Args:
        name: of the task, for messages.
        known: what the labels show, None when the task has no rows or none without this declaration.
        shape: what an answer is; None: as keys or labels say, else as known.
        keys, labels, json_schema, regex, lark, fence, min_items, max_items, ground: as the recipe's DeclaredTask.

    Raises:
        RecipeError: parts that contradict each other or are missing, a schema, expression or grammar that answers
            cannot be held to.
    """
    own: dict[Shape, Any] = {"json": json_schema, "pattern": regex, "grammar": lark}
    given: list[Shape] = [one for one, definition in own.items() if definition is not None]
    if not given:
        form = _from_parts(name, known, shape=shape, keys=keys, labels=labels, fence=fence)
        form = _with_bounds(name, form, min_items=min_items, max_items=max_items)
        return replace(form, ground=ground)
    spoken: dict[str, Any] = {
        "shape": shape,
        "keys": keys,
        "labels": labels,
        "min_items": min_items,
        "max_items": max_items,
    }
    spoken |= {"json_schema": json_schema, "regex": regex, "lark": lark}
    spoken |= {} if given == ["json"] else {"fence": fence}
    key = {"json": "json_schema", "pattern": "regex", "grammar": "lark"}[given[0]]
    others = [one for one, value in spoken.items() if value not in ((), None) and one != key]
    if others:
        raise RecipeError(f"tasks: {name}: {key} says all of an answer. Leave out {', '.join(others)}.")
    if json_schema is not None:
        return _from_schema(name, known, json_schema, fence)
    if regex is not None:
        return AnswerForm(shape="pattern", definition=_checked(name, "pattern", regex))
    assert lark is not None, "one of the three is given"
    return AnswerForm(shape="grammar", definition=_checked(name, "grammar", lark))


def _from_parts(
    name: str,
    known: AnswerForm | None,
    *,
    shape: Shape | None,
    keys: Sequence[str],
    labels: Sequence[str],
    fence: str | None,
) -> AnswerForm:
    told = shape or _told_shape(known, keys=keys, labels=labels)
    if told is None:
        raise RecipeError(f"tasks: {name} has no rows to tell its shape from. Give shape, keys, labels or json_schema.")
    form = known if known is not None and known.shape == told else _of_shape(told, known)
    if keys:
        fields = {field.key: field for field in form.fields}
        form = replace(form, fields=tuple(fields.get(key, Field(key=key, kind=_ANY_KIND)) for key in keys))
    if labels:
        form = replace(form, labels=tuple(sorted(labels)))
    form = _with_fence(form, fence)
    lacks_keys = told in ("object", "object list") and not form.fields
    if lacks_keys or (told in ("label", "label list") and not form.labels):
        missing = "keys" if lacks_keys else "labels"
        raise RecipeError(f"tasks: {name} of shape {told!r} needs {missing}: list them in the recipe.")
    return form


def _told_shape(known: AnswerForm | None, *, keys: Sequence[str], labels: Sequence[str]) -> Shape | None:
    if keys:
        return "object list" if known is not None and known.shape == "object list" else "object"
    if labels:
        return "label list" if known is not None and known.shape in ("label list", "string list") else "label"
    return None if known is None else known.shape


def _of_shape(shape: Shape, known: AnswerForm | None) -> AnswerForm:
    """A form of `shape` with the spelling, and for lists the bounds, of a known form of another shape."""
    form = AnswerForm(shape=shape)
    if known is None or known.is_plain or form.is_plain:
        return form
    form = replace(form, style=known.style, fence_open=known.fence_open, fence_close=known.fence_close)
    if shape in _LISTS and known.shape in _LISTS:
        form = replace(form, min_items=known.min_items, max_items=known.max_items, repeats=known.repeats)
    return form


def _with_fence(form: AnswerForm, fence: str | None) -> AnswerForm:
    if fence is None:
        return form
    opening, closing = (f"```{fence}\n", "\n```") if fence else ("", "")
    return replace(form, fence_open=opening, fence_close=closing)


def _with_bounds(name: str, form: AnswerForm, *, min_items: int | None, max_items: int | None) -> AnswerForm:
    if min_items is None and max_items is None:
        return form
    if form.shape not in _LISTS:
        raise RecipeError(f"tasks: {name}: min_items and max_items are for lists, but an answer is {form.describe()}.")
    least = form.min_items if min_items is None else min_items
    most = form.max_items if max_items is None else max_items
    if most and least > most:
        raise RecipeError(f"tasks: {name}: min_items {least} is more than max_items {most}.")
    return replace(form, min_items=least, max_items=most)


def _from_schema(name: str, known: AnswerForm | None, schema: Mapping[str, Any] | str, fence: str | None) -> AnswerForm:
    place = f"tasks: {name}: json_schema"
    if isinstance(schema, str):
        place += f" {schema}"
        schema = _read_schema(place, Path(schema))
    try:
        definition = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{place} holds a value that JSON has not: {error}.") from None
    problems = check_schema(schema)
    if problems:
        raise RecipeError(f"{place} cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
    form = _of_shape("json", known)
    return _with_fence(replace(form, style=replace(form.style, indent=None), definition=definition), fence)


def _read_schema(place: str, path: Path) -> Mapping[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{place}: there is no such file. Paths are relative to {Path.cwd()}.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{place} cannot be read: {error}.") from None
    if not isinstance(schema, Mapping):
        raise RecipeError(f"{place} must hold a JSON object, but holds {schema!r:.60}.")
    return schema


def _checked(name: str, kind: Literal["pattern", "grammar"], definition: str) -> str:
    reason = check_rule(kind, definition)
    if reason:
        key = "regex" if kind == "pattern" else "lark"
        raise RecipeError(f"tasks: {name}: {key} {definition[:60]!r} cannot be used: {reason}.")
    return definition
