"""Messages: who said what in a conversation, and in which order the turns may stand.

Knows no chat format and no tokens: how a family writes a message is the renderer's business (`render/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
"""Who speaks."""

_WHOSE: dict[Role, str] = {"system": "the system's", "user": "the user's", "assistant": "the assistant's"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation; `text` is verbatim, never stripped or normalised."""

    role: Role
    text: str


def check_order(messages: Sequence[Message]) -> None:
    """Return when the turns stand in order: an optional system message, then user, assistant, user, …

    Either side may have the last word. Texts are not looked at.

        system, user, assistant, user     in order
        assistant, user                   ValueError: messages[0] is the assistant's, but …

    Raises ValueError with one sentence about the first message that is out of order, counted from 0.
    """
    if not messages:
        raise ValueError("the conversation has no messages; it needs at least one of the user's.")
    first = 1 if messages[0].role == "system" else 0
    if first == len(messages):
        raise ValueError("the conversation has only a system message; it needs at least one of the user's.")
    for index in range(first, len(messages)):
        expected: Role = "user" if (index - first) % 2 == 0 else "assistant"
        found = messages[index].role
        if found == expected:
            continue
        if found == "system":
            reason = "a system message may only stand first"
        elif index == first:
            reason = "a conversation starts with the user's"
        else:
            reason = f"after {_WHOSE[found]} messages[{index - 1}] comes {_WHOSE[expected]}"
        raise ValueError(f"messages[{index}] is {_WHOSE[found]}, but {reason}.")
