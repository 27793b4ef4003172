"""Rows as people keep them → `Record`: one function per input format, named by both ends.

    context_target   {"context": "Instruction: …\\nInput: question\\n\\ntext\\nAnswer: ", "target": "…"}
    messages         {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

A new format is one function here and one entry in `FORMATS`. Each function reports *all* problems of its row.
Nothing here knows of files (records.py), of tokens, or of what an answer looks like (tasks/forms.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from weitiao.data.record import (
    Parts,
    Record,
    RowFindings,
    Target,
    build_record,
    did_you_mean,
    kind_of,
    nearest,
    read_target,
    read_task,
    read_text,
    shown,
)
from weitiao.errors import Problem
from weitiao.messages import Message, Role, check_order

# --- {"context", "target"} -------------------------------------------------------------------------------------------


def context_target_to_record(row: Mapping[str, Any], source: str, *, require_target: bool) -> Record | list[Problem]:
    """The record of a ``{"context", "target"[, "task"]}`` row, or all its problems.

    The context becomes one user message, verbatim. A context that does not follow `split_context`'s grammar is
    accepted whole, with `text_span` None.
    """
    findings = RowFindings(source)
    context = read_text(row, "context", "context", findings)
    target = read_target(row, "target", "target", findings, require_target=require_target)
    task = read_task(row, findings)
    if findings.problems:
        return findings.problems
    return build_record((Message(role="user", text=context),), _split_context(context), target, task, row, source)


def _split_context(context: str) -> Parts:
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
        return Parts(instruction="", question="", text=context, text_span=None)
    if context[end - 1] == "\r":  # a context written with Windows line ends
        end -= 1
    input_at = context.find(input_line, 0, end)
    if input_at < 0:
        return Parts(instruction=context[len(opening) : end].strip(), question="", text="", text_span=None)
    start = input_at + len(input_line)
    if context.startswith(" ", start, end):
        start += 1
    return _split_input(context, start, end, instruction=context[len(opening) : input_at].strip())


_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def _split_input(prompt: str, start: int, end: int, *, instruction: str) -> Parts:
    """Question and text of ``prompt[start:end]``, which part at the first blank line; without one all of it is text."""
    blank = _BLANK_LINES.search(prompt, start, end)
    question = prompt[start : blank.start()].strip() if blank else ""
    text_start = blank.end() if blank else start
    return Parts(instruction=instruction, question=question, text=prompt[text_start:end], text_span=(text_start, end))


# --- {"messages": [{"role", "content"}, …]} --------------------------------------------------------------------------

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES_ELSEWHERE = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_KEYS_THAT_CHANGE_MEANING = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "weight", "loss")


def messages_to_record(row: Mapping[str, Any], source: str, *, require_target: bool) -> Record | list[Problem]:
    """The record of a ``{"messages": [{"role", "content"}, …][, "task"]}`` row, or all its problems.

    The last message is the assistant's and its content the target; with ``require_target=False`` the user may have
    the last word. Earlier turns are kept. Other keys of the row (``label``, ``record_id``) stay in `raw` only.
    """
    findings = RowFindings(source)
    task = read_task(row, findings)
    entries = row.get("messages")
    if not isinstance(entries, list) or not entries:
        seen = "an empty list" if isinstance(entries, list) else kind_of(entries)
        findings.add("messages", f"is {seen}, not a conversation.", 'Write a list of {"role": …, "content": …}.')
        return findings.problems

    roles = [_read_role(entry, f"messages[{index}]", findings) for index, entry in enumerate(entries)]
    last = len(entries) - 1
    answered = roles[last] not in ("system", "user")  # a last role that cannot be read was meant for the answer
    turns: list[Message] = []
    for index, (entry, role) in enumerate(zip(entries, roles, strict=True)):
        if isinstance(entry, dict) and not (answered and index == last):
            text = read_text(entry, "content", f"messages[{index}].content", findings)
            turns.append(Message(role=role or "user", text=text))  # unknown: found, so never a record
    target: Target | None = None
    if answered and isinstance(entries[last], dict):
        place = f"messages[{last}].content"
        target = read_target(entries[last], "content", place, findings, require_target=require_target)

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
    return build_record(tuple(turns), parts, target, task, row, source)


def _read_role(entry: object, place: str, findings: RowFindings) -> Role | None:
    if not isinstance(entry, dict):
        findings.add(place, f"is {kind_of(entry)}, not an object.", 'Write {"role": "user", "content": "…"}.')
        return None
    for key in _KEYS_THAT_CHANGE_MEANING:
        if entry.get(key) is not None:
            findings.add(f"{place}.{key}", "cannot be learnt from yet.", f"Remove {shown(key)} or set it to null.")
    role = entry.get("role")
    if "role" not in entry:
        findings.add(f"{place}.role", "is missing.", did_you_mean("role", entry) or "Add who speaks: user, for one.")
    elif not isinstance(role, str) or role not in _ROLES:
        near = _ROLES_ELSEWHERE.get(str(role).lower()) or nearest(str(role), _ROLES)
        fix = f"Did you mean `{near}`?" if near else "Write system, user or assistant; tool turns are not read yet."
        findings.add(f"{place}.role", f"is {shown(role)}, not system, user or assistant.", fix)
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
    findings = RowFindings(source)
    if not isinstance(row, dict):
        findings.add("row", f"is {kind_of(row)}, not an object.", "Write one object with the keys of a known format.")
        return findings.problems
    fitting = _fitting_formats(row)
    if len(fitting) == 1:
        return fitting[0].to_record(row, source, require_target=require_target)
    if fitting:
        names = " and ".join(one.name for one in fitting)
        findings.add("row", f"fits several formats: {names}.", "Keep the keys of one of them.")
    else:
        expected = " or ".join(" + ".join(f"`{key}`" for key in one.keys) for one in FORMATS)
        keys = ", ".join(shown(key) for key in row)
        seen = f"has the keys {keys}" if row else "has no keys"
        advice = [did_you_mean(one.keys[0], row) for one in FORMATS]
        fix = next(filter(None, advice), "Rename the keys, or convert the file.")
        findings.add("row", f"{seen}; a known format has {expected}.", fix)
    return findings.problems


def _fitting_formats(row: Mapping[str, Any]) -> tuple[RowFormat, ...]:
    complete = tuple(one for one in FORMATS if all(key in row for key in one.keys))
    return complete or tuple(one for one in FORMATS if one.keys[0] in row)


