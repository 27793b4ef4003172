"""Messages: who said what in a conversation, which tools were called, and in which order the turns may stand.

Knows no chat format and no tokens: how a family writes a message is the renderer's business (`render/`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
"""Who speaks; ``tool`` is what a called tool gave back (others say observation)."""

_WHOSE: dict[Role, str] = {
    "system": "the system's",
    "user": "the user's",
    "assistant": "the assistant's",
    "tool": "a tool's",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A tool that the assistant asks for: its name and its arguments by name."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation; `text` is verbatim, never stripped or normalised."""

    role: Role
    text: str
    calls: tuple[ToolCall, ...] = ()
    """The assistant's tool calls; `text` is then what it says before them, often nothing."""
    learn: bool = True
    """Whether training may learn this turn; looked at in the assistant's turns only."""


def write_calls(text: str, calls: Sequence[ToolCall]) -> str:
    r"""The reply as plain text: `text`, then each call in tags, as Hermes and Qwen write it.

    >>> write_calls("", [ToolCall(name="weather", arguments={"city": "北京"})])
    '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    """
    written = [
        "<tool_call>\n"
        + json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        + "\n</tool_call>"
        for call in calls
    ]
    return "\n".join([text, *written] if text else written)


def check_order(messages: Sequence[Message]) -> None:
    """Return when the turns stand in order: an optional system message, then user, assistant, user, …

    A reply that calls tools is followed by their results, one or more, and these by another reply. A result may also
    follow a reply without `calls`, which then asked for the tool in words of its own. Anyone may have the last word.
    Texts are not looked at.

        system, user, assistant, user                    in order
        user, assistant (calls), tool, tool, assistant   in order
        assistant, user                                  ValueError: messages[0] is the assistant's, but …

    Raises ValueError with one sentence about the first message that is out of order, counted from 0.
    """
    if not messages:
        raise ValueError("the conversation has no messages; it needs at least one of the user's.")
    first = 1 if messages[0].role == "system" else 0
    if first == len(messages):
        raise ValueError("the conversation has only a system message; it needs at least one of the user's.")
    for index in range(first, len(messages)):
        before = messages[index - 1] if index > first else None
        found = messages[index].role
        expected = _may_follow(before)
        if found in expected:
            continue
        if found == "system":
            reason = "a system message may only stand first"
        elif before is None:
            reason = "a conversation starts with the user's"
        else:
            what = "which calls a tool, " if before.role == "assistant" and before.calls else ""
            whose = " or ".join(_WHOSE[role] for role in expected)
            reason = f"after {_WHOSE[before.role]} messages[{index - 1}]{', ' if what else ' '}{what}comes {whose}"
        raise ValueError(f"messages[{index}] is {_WHOSE[found]}, but {reason}.")


def _may_follow(before: Message | None) -> tuple[Role, ...]:
    if before is None:
        return ("user",)
    if before.role == "assistant":
        return ("tool",) if before.calls else ("user", "tool")
    return ("tool", "assistant") if before.role == "tool" else ("assistant",)
