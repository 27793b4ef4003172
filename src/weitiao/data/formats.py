"""Rows as people keep them → `Record`: one function per input format, named by both ends.

    context_target   {"context": "Instruction: …\\nInput: question\\n\\ntext\\nAnswer: ", "target": "…"}
    messages         {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

A new format is one function here and one entry in `FORMATS`. Each function reports *all* problems of its row.
Nothing here knows of files (records.py), of tokens, or of what an answer looks like (tasks/forms.py).
`Record` stands here, below its reader, so that imports point one way; `data.records` exports it too.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from weitiao.errors import Problem
from weitiao.messages import Message, Role, check_order

Target = str | list[Any] | dict[str, Any]
"""An answer as given; lists and objects are later written in the task's form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One validated row: a conversation up to the answer, and the answer."""

    messages: tuple[Message, ...]
    """The conversation up to the answer; the last message is the user's."""
    target: Target | None
    """The answer; None only for unlabelled rows read with ``require_target=False``."""
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

    def __post_init__(self) -> None:
        assert self.messages and self.messages[-1].role == "user", "a record's last message is the user's"
        assert self.text_span is None or self.prompt[slice(*self.text_span)] == self.text, "text_span is not of text"

    @property
    def prompt(self) -> str:
        """The user's last message, verbatim."""
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
class _Parts:
    """What stands in a prompt; fields as in `Record`."""

    instruction: str
    question: str
    text: str
    text_span: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Findings:
    """Collects the problems of one row."""

    source: str
    problems: list[Problem] = field(default_factory=list)

    def add(self, field: str, message: str, fix: str) -> None:
        self.problems.append(Problem(source=self.source, field=field, message=message, fix=fix))


# --- {"context", "target"} -------------------------------------------------------------------------------------------


def context_target_to_record(row: Mapping[str, Any], source: str, *, require_target: bool) -> Record | list[Problem]:
    """The record of a ``{"context", "target"[, "task"]}`` row, or all its problems.

    The context becomes one user message, verbatim. A context that does not follow `split_context`'s grammar is
    accepted whole, with `text_span` None.
    """
    findings = _Findings(source)
    context = _read_text(row, "context", "context", findings)
    target = _read_target(row, "target", "target", findings, require_target=require_target)
    task = _read_task(row, findings)
    if findings.problems:
        return findings.problems
    return _build((Message(role="user", text=context),), _split_context(context), target, task, row, source)


def _split_context(context: str) -> _Parts:
    r"""The parts of ``Instruction: …\nInput: question\n\ntext\nAnswer: ``.

    The Input line is optional (the instruction then says everything, `text` is "" and nothing may be shortened).
    The first ``\nInput:`` and the last ``\nAnswer:`` count, so the text may hold either, and blank lines too.

        "Instruction: I\nInput: Q1\nQ2\n\nT1\n\nT2\nAnswer: "   → instruction "I", question "Q1\nQ2", text "T1\n\nT2"
        "Instruction: I\nInput: T\nAnswer: "                    → instruction "I", question "",       text "T"
        "Instruction: I\nAnswer: "                              → instruction "I", question "",       text ""
        "Tell me a story"                                       → instruction "",  question "",       text is all of it
    """
    opening, input_line, cue = "Instruction:", "\nInput:", "\nAnswer:"
    end = context.rfind(cue)
    if not context.startswith(opening) or end < 0 or context[end + len(cue) :].strip():
        return _Parts(instruction="", question="", text=context, text_span=None)
    if context[end - 1] == "\r":  # a context written with Windows line ends
        end -= 1
    input_at = context.find(input_line, 0, end)
    if input_at < 0:
        return _Parts(instruction=context[len(opening) : end].strip(), question="", text="", text_span=None)
    start = input_at + len(input_line)
    if context.startswith(" ", start, end):
        start += 1
    return _split_input(context, start, end, instruction=context[len(opening) : input_at].strip())


_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def _split_input(prompt: str, start: int, end: int, *, instruction: str) -> _Parts:
    """Question and text of ``prompt[start:end]``, which part at the first blank line; without one all of it is text."""
    blank = _BLANK_LINES.search(prompt, start, end)
    question = prompt[start : blank.start()].strip() if blank else ""
    text_start = blank.end() if blank else start
    return _Parts(instruction=instruction, question=question, text=prompt[text_start:end], text_span=(text_start, end))


# --- {"messages": [{"role", "content"}, …]} --------------------------------------------------------------------------

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES_ELSEWHERE = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_KEYS_THAT_CHANGE_MEANING = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "weight", "loss")


def messages_to_record(row: Mapping[str, Any], source: str, *, require_target: bool) -> Record | list[Problem]:
    """The record of a ``{"messages": [{"role", "content"}, …][, "task"]}`` row, or all its problems.

    The last message is the assistant's and its content the target; with ``require_target=False`` the user may have
    the last word. Earlier turns are kept. Other keys of the row (``label``, ``record_id``) stay in `raw` only.
    """
    findings = _Findings(source)
    task = _read_task(row, findings)
    entries = row.get("messages")
    if not isinstance(entries, list) or not entries:
        seen = "an empty list" if isinstance(entries, list) else _kind(entries)
        findings.add("messages", f"is {seen}, not a conversation.", 'Write a list of {"role": …, "content": …}.')
        return findings.problems

    roles = [_read_role(entry, f"messages[{index}]", findings) for index, entry in enumerate(entries)]
    last = len(entries) - 1
    answered = roles[last] not in ("system", "user")  # a last role that cannot be read was meant for the answer
    turns: list[Message] = []
    for index, (entry, role) in enumerate(zip(entries, roles, strict=True)):
        if isinstance(entry, dict) and not (answered and index == last):
            text = _read_text(entry, "content", f"messages[{index}].content", findings)
            turns.append(Message(role=role or "user", text=text))  # unknown: found, so never a record
    target: Target | None = None
    if answered and isinstance(entries[last], dict):
        place = f"messages[{last}].content"
        target = _read_target(entries[last], "content", place, findings, require_target=require_target)

    if None not in roles:
        try:
            check_order([*turns, Message(role="assistant", text="")] if answered else turns)
        except ValueError as error:
            findings.add("messages", str(error), "Order the turns as: system (optional), user, assistant, user, ….")
        else:
            if require_target and not answered:
                findings.add(
                    "messages",
                    f"ends with the user's messages[{last}], so there is no answer to learn.",
                    'Add the answer as the last message: {"role": "assistant", "content": …}.',
                )
    if findings.problems:
        return findings.problems
    instruction = turns[0].text if turns[0].role == "system" else ""
    prompt = turns[-1].text
    parts = _split_input(prompt, 0, len(prompt), instruction=instruction)
    return _build(tuple(turns), parts, target, task, row, source)


def _read_role(entry: object, place: str, findings: _Findings) -> Role | None:
    if not isinstance(entry, dict):
        findings.add(place, f"is {_kind(entry)}, not an object.", 'Write {"role": "user", "content": "…"}.')
        return None
    for key in _KEYS_THAT_CHANGE_MEANING:
        if entry.get(key) is not None:
            findings.add(f"{place}.{key}", "cannot be learnt from yet.", f"Remove {_shown(key)} or set it to null.")
    role = entry.get("role")
    if "role" not in entry:
        findings.add(f"{place}.role", "is missing.", _did_you_mean("role", entry) or "Add who speaks: user, for one.")
    elif not isinstance(role, str) or role not in _ROLES:
        near = _ROLES_ELSEWHERE.get(str(role).lower()) or _nearest(str(role), _ROLES)
        fix = f"Did you mean `{near}`?" if near else "Write system, user or assistant; tool turns are not read yet."
        findings.add(f"{place}.role", f"is {_shown(role)}, not system, user or assistant.", fix)
    else:
        return _ROLES[role]
    return None


# --- The table of formats --------------------------------------------------------------------------------------------


class RowReader(Protocol):
    """What every format function is."""

    def __call__(self, row: Mapping[str, Any], source: str, *, require_target: bool) -> Record | list[Problem]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """One row of the table: a row with all `keys` has this format; so has one with the first, if no other fits."""

    name: str
    keys: tuple[str, ...]
    to_record: RowReader


FORMATS: tuple[RowFormat, ...] = (
    RowFormat(name="context_target", keys=("context", "target"), to_record=context_target_to_record),
    RowFormat(name="messages", keys=("messages",), to_record=messages_to_record),
)


def recognise_format(row: Mapping[str, Any]) -> str | None:
    """The name of the one format that the row's keys fit; None when none fits, or several do equally well."""
    fitting = _fitting_formats(row)
    return fitting[0].name if len(fitting) == 1 else None


def row_to_record(row: object, source: str, *, require_target: bool) -> Record | list[Problem]:
    """The record of a row in any known format, or all its problems; `row` is any JSON value."""
    findings = _Findings(source)
    if not isinstance(row, dict):
        findings.add("row", f"is {_kind(row)}, not an object.", "Write one object with the keys of a known format.")
        return findings.problems
    fitting = _fitting_formats(row)
    if len(fitting) == 1:
        return fitting[0].to_record(row, source, require_target=require_target)
    if fitting:
        names = " and ".join(one.name for one in fitting)
        findings.add("row", f"fits several formats: {names}.", "Keep the keys of one of them.")
    else:
        expected = " or ".join(" + ".join(f"`{key}`" for key in one.keys) for one in FORMATS)
        keys = ", ".join(_shown(key) for key in row)
        seen = f"has the keys {keys}" if row else "has no keys"
        advice = [_did_you_mean(one.keys[0], row) for one in FORMATS]
        fix = next(filter(None, advice), "Rename the keys, or convert the file.")
        findings.add("row", f"{seen}; a known format has {expected}.", fix)
    return findings.problems


def _fitting_formats(row: Mapping[str, Any]) -> tuple[RowFormat, ...]:
    complete = tuple(one for one in FORMATS if all(key in row for key in one.keys))
    return complete or tuple(one for one in FORMATS if one.keys[0] in row)


# --- Shared by the formats -------------------------------------------------------------------------------------------


def _build(
    messages: tuple[Message, ...],
    parts: _Parts,
    target: Target | None,
    task: str | None,
    row: Mapping[str, Any],
    source: str,
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
    )


def _read_text(holder: Mapping[str, Any], key: str, place: str, findings: _Findings) -> str:
    """The text under `key`, verbatim; "" after a finding when there is none."""
    value = holder.get(key)
    if isinstance(value, str) and value.strip():
        return value
    if key not in holder:
        findings.add(place, "is missing.", _did_you_mean(key, holder) or f"Add `{key}` as a string.")
    elif isinstance(value, str):
        findings.add(place, "is empty.", "Write the text: an empty one teaches nothing.")
    elif isinstance(value, list | dict):
        findings.add(place, f"is {_kind(value)}, not text.", "Write it as a string.")
    else:
        written = json.dumps(value)
        findings.add(place, f"is {_kind(value)} (`{written[:40]}`), not text.", f'Write it as a string: "{written}".')
    return ""


def _read_target(
    holder: Mapping[str, Any], key: str, place: str, findings: _Findings, *, require_target: bool
) -> Target | None:
    """The answer under `key`. An empty list or object is an answer ("nothing found"); an empty text is none."""
    value = holder.get(key)
    if isinstance(value, list | dict):
        return value
    if not require_target and (value is None or (isinstance(value, str) and not value.strip())):
        return None
    return _read_text(holder, key, place, findings) or None


def _read_task(row: Mapping[str, Any], findings: _Findings) -> str | None:
    return _read_text(row, "task", "task", findings) or None if row.get("task") is not None else None


def _kind(value: object) -> str:
    """A JSON value's kind in a reader's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):  # before numbers: True is an int
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    """The value in backticks: one line, printable, at most 40 characters."""
    written = repr(value)[1:-1] if isinstance(value, str) else repr(value)
    return f"`{written if len(written) <= 40 else written[:39] + '…'}`"


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.75)), None)


def _did_you_mean(key: str, row: Mapping[str, Any]) -> str | None:
    """A question when some key of the row looks like `key` misspelt."""
    misspelt = next((seen for seen in row if _nearest(seen, (key,))), None)
    return f"Did you mean `{key}` instead of {_shown(misspelt)}?" if misspelt is not None else None
