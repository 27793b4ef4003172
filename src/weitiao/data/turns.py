"""The turns of a conversation → `Record`: which reply is learnt, what stands before it, what is left out.

A record ends at the last reply that may be learnt: that reply is the target, all before it the messages, earlier
replies included with their `learn` flag. Turns after it are not used and `left_out` says so.

    user, assistant, user                        → target: the reply;  left out: the last question
    user, assistant, user, assistant (no loss)   → target: the first reply;  left out: two turns

The formats fill a `Turns`; nothing here knows how any of them spells a role.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from weitiao.data.options import ReadOptions
from weitiao.data.prompts import split_prompt
from weitiao.data.record import Parts, Record, RowFindings, Target, build_record, kind_of, read_task
from weitiao.data.tool_calls import looks_like_calls, read_calls_in_text, read_tools
from weitiao.errors import Problem
from weitiao.messages import Message, Role, ToolCall, check_order, write_calls


@dataclass(kw_only=True, slots=True)
class Turn:
    """One turn as read, before it is known which reply is the target."""

    place: str
    role: Role
    text: str
    learn: bool = True
    calls: tuple[ToolCall, ...] = ()
    answer: list[Any] | dict[str, Any] | None = None
    """The reply where it was given as a value instead of text."""


@dataclass(kw_only=True, slots=True)
class Turns:
    """The turns of one row, added in order, and the tools on offer."""

    key: str
    """The row's key of the conversation, for what is wrong with it as a whole."""
    findings: RowFindings
    task: str | None
    turns: list[Turn] = field(default_factory=list)
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def start(cls, row: Mapping[str, Any], key: str, source: str) -> Turns:
        """No turns yet, with the row's task read."""
        findings = RowFindings(source)
        return cls(key=key, findings=findings, task=read_task(row, findings))

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)

    def add_calls(self, calls: tuple[ToolCall, ...], *, place: str, learn: bool | None) -> None:
        """Add calls to the reply just before them, which is then what the assistant says first, or as a new turn."""
        last = self.turns[-1] if self.turns else None
        if last is None or last.role != "assistant" or last.calls or last.answer is not None:
            self.add(Turn(place=place, role="assistant", text="", calls=calls, learn=learn is not False))
            return
        if learn is not None and learn != last.learn:
            self.findings.add(
                place, f"is learnt or not unlike {last.place}, which it continues.", "Give both the same flag."
            )
        last.calls = calls

    def offer_tools(self, value: object, place: str) -> None:
        """Note the tools under `place`; a row may give them in two places if they are the same."""
        tools = read_tools(value, place, self.findings)
        if tools and self.tools and tools != self.tools:
            self.findings.add(place, "offers other tools than another place of the row.", "Keep one of the two lists.")
        self.tools = self.tools or tools


def turns_to_record(
    conversation: Turns, row: Mapping[str, Any], source: str, options: ReadOptions, *, require_target: bool
) -> Record | list[Problem]:
    """The record of the turns read from `row`, or all its problems."""
    findings, turns = conversation.findings, conversation.turns
    if options.prompt is not None:
        findings.add(
            conversation.key,
            "holds the whole conversation, but the source names a prompt template, which would change nothing.",
            'Remove prompt from this source in the recipe; on the command line: --prompt "".',
        )
    if findings.problems:
        return findings.problems
    _find_written_calls(turns, findings)
    _check_order(conversation)
    if findings.problems:
        return findings.problems
    if options.system is not None and turns[0].role != "system":
        turns.insert(0, Turn(place="system", role="system", text=options.system))

    target_at: int | None = None
    if require_target or turns[-1].role == "assistant":
        target_at = next(
            (i for i in reversed(range(len(turns))) if turns[i].role == "assistant" and turns[i].learn), None
        )
        if target_at is None:
            _explain_no_target(conversation)
    end = len(turns) if target_at is None else target_at
    for turn in turns[:end]:
        if turn.answer is not None:
            fix = "Write it as a string: only the last reply may be a value."
            findings.add(f"{turn.place}.content", f"is {kind_of(turn.answer)}, not text.", fix)
    if findings.problems:
        return findings.problems
    return _build(conversation, end, target_at, row, source)


def _build(conversation: Turns, end: int, target_at: int | None, row: Mapping[str, Any], source: str) -> Record:
    turns = conversation.turns
    messages = tuple([
        Message(role=turn.role, text=turn.text, calls=turn.calls, learn=turn.learn) for turn in turns[:end]
    ])  # fmt: skip
    instruction = messages[0].text if messages[0].role == "system" else ""
    prompt = messages[-1].text
    if messages[-1].role == "user":
        parts = split_prompt(prompt, 0, len(prompt), instruction=instruction)
    else:  # what a tool gave back is the basis of the answer and never shortened
        parts = Parts(instruction=instruction, question="", text=prompt, text_span=None)
    if target_at is None:
        return build_record(messages, parts, None, conversation.task, row, source, tools=conversation.tools)
    reply = turns[target_at]
    target: Target = write_calls(reply.text, reply.calls) if reply.calls else reply.text
    return build_record(
        messages,
        parts,
        reply.answer if reply.answer is not None else target,
        conversation.task,
        row,
        source,
        calls=reply.calls,
        says=reply.text if reply.calls else "",
        tools=conversation.tools,
        left_out=_describe_left_out(turns[target_at + 1 :]),
    )


def _find_written_calls(turns: list[Turn], findings: RowFindings) -> None:
    """Read a reply that is followed by a tool's result, and is itself the JSON of a call, as that call."""
    for turn, following in pairwise(turns):
        asks = turn.role == "assistant" and following.role == "tool" and not turn.calls and turn.answer is None
        if asks and looks_like_calls(turn.text):
            turn.calls, turn.text = read_calls_in_text(turn.text, f"{turn.place}.content", findings), ""


def _check_order(conversation: Turns) -> None:
    turns = conversation.turns
    try:
        check_order([Message(role=turn.role, text="", calls=turn.calls) for turn in turns])
    except ValueError as error:
        sentence = re.sub(r"messages\[(\d+)\]", lambda found: turns[int(found[1])].place, str(error))
        fix = "Order the turns as: system (optional), user, assistant, user, …; results follow the call of a tool."
        conversation.findings.add(conversation.key, sentence, fix)


def _explain_no_target(conversation: Turns) -> None:
    turns = conversation.turns
    if any(turn.role == "assistant" for turn in turns):
        message = "has no reply that may be learnt: each of them is flagged not to be."
        fix = "Set the flag (loss or weight) of one reply to true, or remove the row."
    else:
        message = f"ends with the user's {turns[-1].place}, so there is no answer to learn."
        fix = "Add the answer as the last turn, the assistant's."
    conversation.findings.add(conversation.key, message, fix)


def _describe_left_out(turns: list[Turn]) -> str:
    if not turns:
        return ""
    unflagged = any(turn.role == "assistant" for turn in turns)
    why = "which hold no reply that may be learnt" if unflagged else "which no reply follows"
    if len(turns) == 1:
        who = {"user": "question", "tool": "tool result"}.get(turns[0].role, "reply")
        return (
            f"the last {who}, which is flagged not to be learnt" if unflagged else f"the last {who}, which has no reply"
        )
    return f"the last {len(turns)} turns, {why}"


def read_plain(value: object, place: str, findings: RowFindings) -> str:
    """A tool's result as text: any JSON value, for a tool may give back nothing, a number or an object."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float | list | dict):
        return "" if value is None else json.dumps(value, ensure_ascii=False)
    findings.add(place, f"is {kind_of(value)}, which has no one spelling as text.", "Write it as a string.")
    return ""
