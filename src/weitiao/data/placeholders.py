"""``{{name}}``, ``{{ author }}``, ``<NAME>`` and ``<AUTHOR>`` in rows: filled, kept as text, or found unfilled.

Data sets that teach a model who it is come with such places for the name and the maker. Knows no format and no file.

    >>> fill_placeholders({"output": "我是 {{name}}，由 <AUTHOR> 开发。"}, {"name": "小微", "author": "我们"})
    {'output': '我是 小微，由 我们 开发。'}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from weitiao.data.record import Record

# <name> in small letters is a tag of HTML and XML; only the capitals are a placeholder in the known data sets.
_PLACEHOLDER = re.compile(r"\{\{[ \t]*([^\W\d]\w*)[ \t]*\}\}|<(NAME|AUTHOR)>")


def may_hold_placeholders(text: str) -> bool:
    """A cheap no for nearly every row: whether `text` holds what every placeholder begins with."""
    return "{{" in text or "<NAME>" in text or "<AUTHOR>" in text


def by_small_letters(placeholders: Mapping[str, str | None]) -> dict[str, str | None]:
    """`placeholders` under names in small letters, by which they are looked up."""
    return {name.lower(): text for name, text in placeholders.items()}


def fill_placeholders(value: Any, known: Mapping[str, str | None]) -> Any:
    """A copy of `value` with every placeholder that `known` gives a text replaced in its texts, keys left alone."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda found: known.get(_name(found)) or found[0], value)
    if isinstance(value, list):
        return [fill_placeholders(item, known) for item in value]
    if isinstance(value, dict):
        return {key: fill_placeholders(item, known) for key, item in value.items()}
    return value


def find_unfilled(record: Record, known: Mapping[str, str | None]) -> list[str]:
    """The placeholders as written that the record's conversation and answer still hold, less those kept as text."""
    found: dict[str, None] = {}
    for text in _texts([*(message.text for message in record.messages), record.target]):
        for match in _PLACEHOLDER.finditer(text):
            if _name(match) not in known:
                found[match[0]] = None
    return list(found)


def _name(found: re.Match[str]) -> str:
    return (found[1] or found[2]).lower()


def _texts(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(value)
        elif isinstance(value, dict):
            yield from _texts(value.values())
