"""Where each value of an answer stands in its text: list items, fields of objects, labels, or the whole text.

Confidence per value and marks in a page both start here. Knows forms and texts; no tokens, no probabilities.

`AnswerForm.parse` judges the text first, so the walk over it only has to find places. It steps over brackets, commas
and colons itself and hands every string, number and literal to the standard library's own scanner
(`json.JSONDecoder.raw_decode`), which returns the value together with the place behind it: escapes are decoded by the
code that `parse` decodes them with, and the two cannot disagree about where a string ends.

    >>> form = AnswerForm(shape="label list", labels=("手机", "水果"))
    >>> [(span.path, span.value, span.start, span.end) for span in value_spans(form, '["水果"]')]
    [('[0]', '水果', 1, 5)]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .forms import Answer, AnswerForm

_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\n\r]*")
_PLAIN_KEY = re.compile(r"""[^\s.\[\]"']+""")


Step = str | int
"""A key of an object, or the place of an item in a list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueSpan:
    """One value of an answer and the characters that spell it."""

    steps: tuple[Step, ...]
    """The way to it from the answer as a whole: ``(0, "subject")``; empty when it is the answer."""
    value: Answer
    """The parsed value: a string, number, boolean or None; `[]` or `{}` where a field holds nothing."""
    start: int
    end: int
    """``text[start:end]`` is the value as JSON, quotation marks included; of labels and free text, the value itself."""

    @property
    def path(self) -> str:
        """`steps` as people write them: ``[0].subject``, ``skills[2]``; a key that could be misread: ``["a.b"]``."""
        return "".join(_written(step) for step in self.steps).removeprefix(".")


def _written(step: Step) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if _PLAIN_KEY.fullmatch(step) else f"[{json.dumps(step, ensure_ascii=False)}]"


@dataclass(slots=True)
class _Open:
    """A list or object whose end has not been reached."""

    steps: tuple[Step, ...]
    is_object: bool
    num_items: int = 0


def value_spans(form: AnswerForm, text: str) -> tuple[ValueSpan, ...]:
    """The values of the answer `text` in the order they are written; none where the answer is empty.

    Lists and objects inside a field are entered, so that each of their values has a place of its own; an empty one is
    a value itself, since a field can say "nothing" too.

    Raises:
        FormError: `text` is not an answer of this form.
    """
    answer = form.parse(text)
    if form.is_plain:
        start = 0 if answer == text else _blank_end(text, 0)
        return (ValueSpan(steps=(), value=answer, start=start, end=start + len(answer)),)
    start = _blank_end(text, 0)
    if form.fence_open:
        start = _blank_end(text, start + len(form.fence_open.strip()))
    return tuple(_leaves(text, start))


def _blank_end(text: str, start: int) -> int:
    """The place of the first character from `start` on that `str.strip` would leave."""
    return len(text) - len(text[start:].lstrip())


def _leaves(text: str, place: int) -> Iterator[ValueSpan]:
    """The values inside the JSON value at `place`, which is known to be whole."""
    opened: list[_Open] = []  # a stack, not recursion: the C scanner behind `parse` goes deeper than Python may
    steps: tuple[Step, ...] = ()
    while True:
        inside = _skip(text, place + 1)
        if text[place] in "[{" and text[inside] not in "]}":
            opened.append(_Open(steps, text[place] == "{"))
            place = inside
        else:
            value, end = _DECODER.raw_decode(text, place)
            if opened or not isinstance(value, list | dict):
                yield ValueSpan(steps=steps, value=value, start=place, end=end)
            place = _skip(text, end)
            while opened and text[place] != ",":
                opened.pop()
                place = _skip(text, place + 1)
            if not opened:
                return
            place = _skip(text, place + 1)
        step, place = _step_into(text, place, opened[-1])
        steps = (*opened[-1].steps, step)


def _step_into(text: str, place: int, container: _Open) -> tuple[Step, int]:
    """The step to the item or member at `place`, and where its value begins."""
    if container.is_object:
        key, place = _DECODER.raw_decode(text, place)
        return key, _skip(text, _skip(text, place) + 1)
    container.num_items += 1
    return container.num_items - 1, place


def _skip(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    assert match is not None, "the pattern matches nothing at all, too"
    return match.end()
