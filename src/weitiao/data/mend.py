"""Mended copies of files: applies the edits of findings to rows, writes them as JSON lines and lists what was done.

The file that is mended is never changed. A row that cannot be read, and so cannot be mended, is left out of the copy
and listed; nothing else is left out but what an edit drops. Knows edits and rows; what is wrong is found elsewhere.
"""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .findings import Edit, Finding
from .record import Record

_ANSWER_KEYS = ("target", "output", "response", "summary", "answer", "completion", "label")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that was done to one row."""

    source: str
    what: str
    """``dropped``, ``answer`` or ``text``; ``not mended`` where the place of the answer could not be told."""
    why: str
    before: Any = None
    after: Any = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {"row": self.source, "what": self.what, "why": self.why, "before": self.before, "after": self.after}


def mend_rows(
    items: Iterable[Record | str], findings: Iterable[Finding], write_line: Callable[[str], object]
) -> tuple[int, tuple[Change, ...]]:
    """Pass every row on to `write_line`, as JSON on one line, with the edits of `findings` made.

    Args:
        items: the records of one file in order, and in the place of a row that cannot be read its source.
        findings: whose edits to make.
        write_line: takes each line, without its end.

    Returns:
        The number of rows passed on, and what was done.
    """
    edits: defaultdict[str, list[Edit]] = defaultdict(list)
    for finding in findings:
        for edit in finding.edits:
            edits[edit.source].append(edit)
    num_rows, changes = 0, []
    for item in items:
        source = item if isinstance(item, str) else item.source
        dropped = next((edit for edit in edits[source] if edit.action == "drop"), None)
        if dropped is not None or isinstance(item, str):
            changes.append(Change(source=source, what="dropped", why=dropped.why if dropped else "it cannot be used"))
            continue
        row, done = mend_row(item, edits[source])
        changes += done
        write_line(json.dumps(row, ensure_ascii=False))
        num_rows += 1
    return num_rows, tuple(changes)


def mend_row(record: Record, edits: Iterable[Edit]) -> tuple[dict[str, Any], list[Change]]:
    """The row of `record` with `edits` made, and what was done. The record's own row stays as it is.

    {"context": "…\u200b…", "target": "体育 "}   →   {"context": "……", "target": "体育"}, two changes
    """
    row: Any = _copy(record.raw)
    changes = []
    answers = [edit for edit in edits if edit.action == "answer"]
    if answers:
        edit = answers[0]  # each rests on the answer as it was: a second one would undo the first
        place = find_answer(row, record.target)
        if place is None:
            changes.append(
                Change(source=record.source, what="not mended", why=edit.why, before=record.target, after=edit.new)
            )
        else:
            _put(row, place, edit.new)
            changes.append(
                Change(source=record.source, what="answer", why=edit.why, before=record.target, after=edit.new)
            )
    for edit in edits:
        if edit.action == "text":
            row = _replace_text(row, edit.old, edit.new)
            changes.append(
                Change(source=record.source, what="text", why=edit.why, before=_visible(edit.old), after=edit.new)
            )
    assert isinstance(row, dict)
    return row, changes


Place = tuple[str | int, ...]
"""Keys and list places that lead to a value inside a row."""


def find_answer(row: Mapping[str, Any], target: Any) -> Place | None:
    """Where the answer stands in the row: the keys and list places that lead to it; None when that cannot be told.

    >>> find_answer({"messages": [{"content": "好"}, {"content": "好"}], "id": 1}, "好")
    ('messages', 1, 'content')
    """
    places = [place for place, value in _walk(row, ()) if value == target and type(value) is type(target)]
    named = [place for place in places if len(place) == 1 and place[0] in _ANSWER_KEYS]
    if named:
        return min(named, key=lambda place: _ANSWER_KEYS.index(str(place[0])))
    turns = [place for place in places if any(isinstance(step, int) for step in place)]
    if turns:
        return turns[-1]
    return places[0] if len(places) == 1 else None


def _walk(value: Any, place: Place) -> Iterable[tuple[Place, Any]]:
    yield place, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _walk(item, (*place, key))


def _put(row: Any, place: Place, value: Any) -> None:
    *way, last = place
    for step in way:
        row = row[step]
    row[last] = value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _replace_text(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {_replace_text(key, old, new): _replace_text(item, old, new) for key, item in value.items()}
    return [_replace_text(item, old, new) for item in value] if isinstance(value, list) else value


def _visible(text: str) -> str:
    """Invisible characters as their names, so that the list can be read."""
    return "".join(c if c.isprintable() else f"<{unicodedata.name(c, f'U+{ord(c):04X}').lower()}>" for c in text)
