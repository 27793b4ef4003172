"""YAML as recipes are written in, read strictly, and single values set over it from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import RecipeError


class _StrictLoader(yaml.SafeLoader):
    """Reads YAML whose mappings hold no key twice; PyYAML alone would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What the YAML in `text` says, no key twice. Raises yaml.YAMLError."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def deep_copy(value: Any) -> Any:
    """`value` with mappings and lists of its own, all the way down."""
    if isinstance(value, Mapping):
        return {key: deep_copy(item) for key, item in value.items()}
    return [deep_copy(item) for item in value] if isinstance(value, list | tuple) else value


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set in `values` what `override` says, such as ``train.epochs=3``. Raises RecipeError when it says nothing."""
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise RecipeError(f"The override {override!r} is not of the form part.key=value, such as train.epochs=3.")
    *parts, last = dotted.split(".")
    place: Any = values
    for part in parts:
        key = _key_in(place, part, override)
        inner = place[key] if isinstance(place, list) else place.get(key)
        if isinstance(inner, str):  # the short form of a model or a source
            inner = {"path": inner}
        place[key] = inner if isinstance(inner, dict | list) else {}
        place = place[key]
    try:
        place[_key_in(place, last, override)] = read_yaml(text)
    except yaml.YAMLError:
        raise RecipeError(f"The value of the override {override!r} is not YAML.") from None


def _key_in(place: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """`part` as a key of `place`: itself, or its number where `place` is a list."""
    if isinstance(place, dict):
        return part
    if not part.isdecimal() or int(part) >= len(place):
        raise RecipeError(f"The override {override!r} asks for entry {part} of {len(place)} entries, counted from 0.")
    return int(part)
