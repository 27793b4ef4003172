r"""A row's fields → the user's message, and which part of a message is question and which is text.

A template is text with the row's fields in single braces:

    "判断下面的评论属于哪一类。\n可选类别：{category}\n\n{text}"

Knows neither formats nor files. ``{{name}}`` in double braces is none of this module's: see placeholders.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from weitiao.data.record import Parts, RowFindings, kind_of, shown

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_FIELD = re.compile(r"(?<!\{)\{(\w[\w.-]*)\}(?!\})")


def split_prompt(prompt: str, start: int, end: int, *, instruction: str) -> Parts:
    """Question and text of ``prompt[start:end]``, which part at the first blank line; without one all of it is text."""
    blank = _BLANK_LINES.search(prompt, start, end)
    question = prompt[start : blank.start()].strip() if blank else ""
    text_start = blank.end() if blank else start
    return Parts(instruction=instruction, question=question, text=prompt[text_start:end], text_span=(text_start, end))


def fill_template(
    template: str, fields: Mapping[str, Any], *, main: str, instruction: str, findings: RowFindings
) -> tuple[str, Parts]:
    """The prompt that `template` makes of `fields`, and its parts: `main` names the field that is the text proper.

    What stands before the text is the question, or what follows it where nothing stands before. Without `main` in the
    template nothing is known to be safe to shorten. Adds a finding for a field that the row lacks.

        fill_template("类别？\\n\\n{text}", {"text": "苹果很甜"}, main="text", …)
        → "类别？\\n\\n苹果很甜", question "类别？", text "苹果很甜"
    """
    pieces = _pieces(template)
    if len(pieces) == 1:
        findings.add(
            "prompt",
            f"the prompt template {shown(template)} names no field, so every row would ask the same.",
            f"Name fields of the row in braces, such as {{{main}}}.",
        )
    written: list[str] = []
    span: tuple[int, int] | None = None
    length = 0
    for index, piece in enumerate(pieces):
        text = _field_text(piece, fields, findings) if index % 2 else piece
        if index % 2 and piece == main and span is None:
            span = (length, length + len(text))
        written.append(text)
        length += len(text)
    prompt = "".join(written)
    if not prompt.strip() and not findings.problems:
        findings.add("prompt", "is empty: every field that the prompt is made of is empty.", "Fill one, or remove it.")
    if span is None or span[0] == span[1]:
        return prompt, Parts(instruction=instruction, question=prompt.strip(), text="", text_span=None)
    question = prompt[: span[0]].strip() or prompt[span[1] :].strip()
    return prompt, Parts(instruction=instruction, question=question, text=prompt[slice(*span)], text_span=span)


@lru_cache(maxsize=256)
def _pieces(template: str) -> tuple[str, ...]:
    """The template's own words and its field names in turn, words first."""
    return tuple(_FIELD.split(template))


def _field_text(name: str, fields: Mapping[str, Any], findings: RowFindings) -> str:
    if name not in fields:
        known = ", ".join(shown(key) for key in fields)
        findings.add(
            name,
            f"the prompt template asks for {{{name}}}, which the row lacks.",
            f"Use one of the row's fields: {known}.",
        )
        return ""
    value = fields[name]
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "、".join(value)
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False)
    findings.add(name, f"is {kind_of(value)}, which has no one spelling as text.", "Write it as a string.")
    return ""
