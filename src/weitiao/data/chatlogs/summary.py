"""What an import did: every message accounted for, as JSON and as rows of a table. Holds no personal data in clear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MADE_BY = "weitiao import-chats"
"""Stands in the JSON files of an import, by which they are known again."""


def is_own_output(value: object) -> bool:
    """Whether a JSON value is what an import wrote: its summary, its canaries, or a row of its conversations."""
    if not isinstance(value, dict):
        return False
    return value.get("made_by") == MADE_BY or {"messages", "contact", "start", "end"} <= value.keys()


@dataclass(frozen=True, kw_only=True, slots=True)
class ContactSummary:
    """What became of one chat."""

    contact: str
    is_group: bool
    messages: int
    train: int
    """Conversations to learn from."""
    dev: int
    """Conversations held out."""
    replies: int
    start: str | None
    end: str | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            "contact": self.contact,
            "group": self.is_group,
            "messages": self.messages,
            "train": self.train,
            "dev": self.dev,
            "replies": self.replies,
            "start": self.start,
            "end": self.end,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSummary:
    """What an import read, wrote and dropped: ``messages == used + merged + sum(dropped.values())``, always."""

    messages: int
    """Messages read."""
    used: int
    """Those that begin a turn."""
    merged: int
    """Those joined to the turn of the same side before them."""
    dropped: Mapping[str, int]
    """Those that are nowhere in the output, by reason."""
    train: int
    dev: int
    redacted: Mapping[str, int]
    """Pieces of personal data replaced in what was written, by kind."""
    canaries: int
    """Different pieces of personal data in all that was read."""
    contacts: Sequence[ContactSummary]
    files: Sequence[Mapping[str, Any]]
    """``path``, ``kind``, ``messages`` and ``note`` of every file that was looked at."""
    notes: Sequence[str]

    def __post_init__(self) -> None:
        accounted = self.used + self.merged + sum(self.dropped.values())
        assert self.messages == accounted, f"{self.messages} messages were read, but {accounted} are accounted for"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            "made_by": MADE_BY,
            "messages": self.messages,
            "used": self.used,
            "merged": self.merged,
            "dropped": dict(self.dropped),
            "train": self.train,
            "dev": self.dev,
            "redacted": dict(self.redacted),
            "canaries": self.canaries,
            "contacts": [contact.to_json() for contact in self.contacts],
            "files": [dict(file) for file in self.files],
            "notes": list(self.notes),
        }

    def to_rows(self) -> list[tuple[str, str]]:
        """The counts as rows of a table: what, how many."""
        rows = [("messages read", self.messages), ("used", self.used), ("merged", self.merged)]
        rows += [(f"dropped: {reason}", count) for reason, count in self.dropped.items()]
        rows += [("conversations to learn from", self.train), ("conversations held out", self.dev)]
        rows += [(f"replaced: {kind}", count) for kind, count in self.redacted.items()]
        return [(what, f"{count:,}") for what, count in rows]
