"""What is read from an exported chat: messages, each of a kind, and logs, each the messages of one chat.

Knows no file format; the readers (`tables.py`, `transcripts.py`, `samples.py`) make these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from weitiao.errors import Problem

MessageKind = Literal[
    "text", "quote", "voice", "image", "video", "sticker", "file", "link", "music", "location", "card", "transfer",
    "red_packet", "mini_program", "forwarded", "note", "call", "pat", "recall", "system", "unknown",
]  # fmt: skip
"""What was sent. A `quote` is a reply that quotes another message; a `card` is somebody's business card; a `pat` is
WeChat's 拍一拍; a `recall` is the notice that a message was withdrawn; `system` is every other notice."""

MESSAGE_KINDS: tuple[MessageKind, ...] = (
    "text", "quote", "voice", "image", "video", "sticker", "file", "link", "music", "location", "card", "transfer",
    "red_packet", "mini_program", "forwarded", "note", "call", "pat", "recall", "system", "unknown",
)  # fmt: skip

NOTICES: frozenset[MessageKind] = frozenset({"system", "recall", "pat"})
"""What WeChat says, not a person; whose name stands beside it means nothing."""

ExportKind = Literal["table", "later table", "text", "samples", "AI text"]
"""The exports that hold messages, from the one that says most to the one that says least."""

EXPORT_KINDS: tuple[ExportKind, ...] = ("table", "later table", "text", "samples", "AI text")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """One message of a chat."""

    source: str
    """Where it stands, such as ``小红.csv:37``."""
    from_me: bool
    """Whether the owner of the export wrote it."""
    sender: str
    """The writer's name as the export shows it; "" where it does not say."""
    kind: MessageKind
    text: str
    """What was written: of a quote only the reply, of a voice message what was recognised; else ""."""
    time: datetime | None
    """When, with its time zone; None where the export does not say."""
    block: int = 0
    """The conversation it belongs to, where the export has cut the chat into conversations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatLog:
    """The messages of one chat, in the order of time."""

    contact: str
    """The name of the person or group."""
    me: str
    """The name of the export's owner; "" where it is not known."""
    is_group: bool
    kind: ExportKind
    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadExport:
    """What one file holds: its logs, or what is wrong with it."""

    logs: Sequence[ChatLog] = ()
    problems: Sequence[Problem] = ()
    notes: Sequence[str] = ()
