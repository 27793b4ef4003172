"""What is wrong with a recipe, in sentences: pydantic's errors told by the keys that the user wrote."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


def complaints(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """A sentence for every place that is wrong, with the nearest known key for an unknown one.

    Args:
        error: what pydantic found.
        root: the model that was to be validated.
    """
    reasons: dict[str, list[str]] = {}  # a value that may be of several types has an error for each of them
    found: dict[str, str] = {}
    for problem in error.errors():
        keys, known = _walk(problem["loc"], root)
        place = ".".join(str(key) for key in keys)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
            reasons[place] = [f"there is no such key. {hint}"]
        elif problem["type"] == "missing":
            reasons[place] = ["this key is required."]
        elif problem["type"] == "union_tag_invalid":
            context = problem["ctx"]
            reasons[f"{place}.name"] = [f"{context['tag']!r} is none of {context['expected_tags']}."]
        elif problem["type"] != "too_short" or not problem["input"]:  # else its entries are wrong, and named themselves
            told = reasons.setdefault(place, [])
            told += [] if problem["msg"] in told else [problem["msg"]]
            if problem["type"] != "secret":  # a password must not be shown either
                found.setdefault(place, f" (found {problem['input']!r:.80}).")
    return [f"{place}: {'; or '.join(told)}{found.get(place, '')}" for place, told in reasons.items()]


def _walk(loc: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str | int], list[str]]:
    """The keys of `loc` that the user wrote, and those known where the last of them stands.

    Pydantic puts the names of types between keys and behind them, for values that may be of several types.
    """
    parts = [root]
    keys: list[str | int] = []
    known = list(root.model_fields)
    for step in loc:
        if isinstance(step, int):
            keys.append(step)
            continue
        tagged = [part for part in parts if _tag_of(part) == step]
        if len(parts) > 1 and tagged:
            parts = tagged
            continue
        if not parts:
            break
        known = [name for part in parts for name in part.model_fields]
        keys.append(step)
        fields = [part.model_fields[step] for part in parts if step in part.model_fields]
        if not fields:
            break
        parts = [model for field in fields for model in _inner_models(field.annotation)]
    return keys, known


def _tag_of(part: type[BaseModel]) -> Any:
    """The name by which one of several models is chosen; None for models that are not chosen so."""
    return part.model_fields["name"].default if "name" in part.model_fields else None


def _inner_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The model classes inside an annotation such as `tuple[Annotated[Source, …], ...]`."""
    plain = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    if plain and issubclass(annotation, BaseModel):
        yield annotation
        return
    for inner in typing.get_args(annotation):
        yield from _inner_models(inner)
