"""`Record`, one validated row, and what every format function needs to make one or to say what is wrong with it.

Stands below the formats and the reader, so that imports point one way; `data.records` exports `Record` too.
Knows no format and no file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weitiao.errors import Problem
from weitiao.messages import Message, ToolCall

Target = str | list[Any] | dict[str, Any]
"""An answer as given; lists and objects are later written in the task's form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One validated row: a conversation up to the answer, and the answer."""

    messages: tuple[Message, ...]
    """The conversation up to the answer; the last message is the user's, or what a tool gave back."""
    target: Target | None
    """The answer; None only for unlabelled rows read with ``require_target=False``. Where the answer calls tools, it is
    the plain text that `messages.write_calls` makes of them."""
    source: str
    """Where the row stands, such as ``train.jsonl:37``: the path as given and the physical line from 1."""
    task: str | None
    """The row's optional ``task`` field."""
    instruction: str
    """Text of the Instruction line, or the system message; "" when absent."""
    question: str
    """The first paragraph of the input when a blank line follows it, else ""."""
    text: str
    """The input text proper: what may be shortened and what values are copied from."""
    text_span: tuple[int, int] | None
    """Where `text` stands in `prompt`; None when it cannot be told apart and so must not be shortened."""
    raw: Mapping[str, Any]
    """The row as read, with every key."""
    calls: tuple[ToolCall, ...] = ()
    """The tools that the answer calls."""
    says: str = ""
    """What an answer that calls tools says before the calls."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools on offer, each ``{"name", "description", "parameters"}``."""
    left_out: str = ""
    """What of the row is not used, as a phrase for the report (``the last question, which has no reply``); else ""."""

    def __post_init__(self) -> None:
        assert self.messages and self.messages[-1].role in ("user", "tool"), "an answer follows a user or a tool"
        assert self.text_span is None or self.prompt[slice(*self.text_span)] == self.text, "text_span is not of text"

    @property
    def prompt(self) -> str:
        """The last message before the answer, verbatim."""
        return self.messages[-1].text

    def with_text(self, new_text: str) -> Record:
        """This record with `text` replaced where it stands; every character outside `text_span` stays (as does `raw`).

        Raises ValueError when `text_span` is None: there is no place known to be safe to change.
        """
        if self.text_span is None:
            raise ValueError(f"{self.source}: the input text cannot be told apart from the prompt, so it stays whole.")
        start, end = self.text_span
        last = replace(self.messages[-1], text=self.prompt[:start] + new_text + self.prompt[end:])
        span = (start, start + len(new_text))
        return replace(self, messages=(*self.messages[:-1], last), text=new_text, text_span=span)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What stands in a prompt; fields as in `Record`."""

    instruction: str
    question: str
    text: str
    text_span: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class RowFindings:
    """Collects the problems of one row."""

    source: str
    problems: list[Problem] = field(default_factory=list)

    def add(self, field: str, message: str, fix: str) -> None:
        self.problems.append(Problem(source=self.source, field=field, message=message, fix=fix))


# --- Shared by the formats -------------------------------------------------------------------------------------------


def build_record(
    messages: tuple[Message, ...],
    parts: Parts,
    target: Target | None,
    task: str | None,
    row: Mapping[str, Any],
    source: str,
    *,
    calls: tuple[ToolCall, ...] = (),
    says: str = "",
    tools: tuple[Mapping[str, Any], ...] = (),
    left_out: str = "",
) -> Record:
    return Record(
        messages=messages,
        target=target,
        source=source,
        task=task,
        instruction=parts.instruction,
        question=parts.question,
        text=parts.text,
        text_span=parts.text_span,
        raw=row,
        calls=calls,
        says=says,
        tools=tools,
        left_out=left_out,
    )


def read_text(holder: Mapping[str, Any], key: str, place: str, findings: RowFindings) -> str:
    """The text under `key`, verbatim; "" after a finding when there is none."""
    value = holder.get(key)
    if isinstance(value, str) and value.strip():
        return value
    if key not in holder:
        findings.add(place, "is missing.", did_you_mean(key, holder) or f"Add `{key}` as a string.")
    elif isinstance(value, str):
        findings.add(place, "is empty.", "Write the text: an empty one teaches nothing.")
    elif isinstance(value, list | dict):
        findings.add(place, f"is {kind_of(value)}, not text.", "Write it as a string.")
    else:
        written = json.dumps(value)
        findings.add(place, f"is {kind_of(value)} (`{written[:40]}`), not text.", f'Write it as a string: "{written}".')
    return ""


def read_target(
    holder: Mapping[str, Any], key: str, place: str, findings: RowFindings, *, require_target: bool
) -> Target | None:
    """The answer under `key`. An empty list or object is an answer ("nothing found"); an empty text is none."""
    value = holder.get(key)
    if isinstance(value, list | dict):
        return value
    if not require_target and (value is None or (isinstance(value, str) and not value.strip())):
        return None
    return read_text(holder, key, place, findings) or None


def read_task(row: Mapping[str, Any], findings: RowFindings) -> str | None:
    return read_text(row, "task", "task", findings) or None if row.get("task") is not None else None


def kind_of(value: object) -> str:
    """A JSON value's kind in a reader's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):  # before numbers: True is an int
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """The value in backticks: one line, printable, at most 40 characters."""
    written = repr(value)[1:-1] if isinstance(value, str) else repr(value)
    return f"`{written if len(written) <= 40 else written[:39] + '…'}`"


def nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.75)), None)


def did_you_mean(key: str, row: Mapping[str, Any]) -> str | None:
    """A question when some key of the row looks like `key` misspelt."""
    misspelt = next((seen for seen in row if nearest(seen, (key,))), None)
    return f"Did you mean `{key}` instead of {shown(misspelt)}?" if misspelt is not None else None
