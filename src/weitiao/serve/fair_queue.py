"""Tickets that wait: first come, first served for each key, and keys in turn.

Whoever sends a hundred requests at once does not keep waiting who sends one. Not safe for threads by itself.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import zip_longest

from .requests import Ticket


class FairQueue:
    """Waiting tickets."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Ticket]:
        """All tickets in the order of their turns, as of now."""
        for rank in zip_longest(*[tuple(line) for line in self._lines.values()]):
            yield from (ticket for ticket in rank if ticket is not None)

    def push(self, ticket: Ticket) -> None:
        """Let `ticket` wait behind those of its key."""
        self._lines.setdefault(ticket.request.key, deque()).append(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Take `ticket` out without its key losing a turn: it was cancelled."""
        line = self._lines[ticket.request.key]
        line.remove(ticket)
        if not line:
            del self._lines[ticket.request.key]

    def serve(self, ticket: Ticket) -> None:
        """Take `ticket` out; its key goes behind the others."""
        self.remove(ticket)
        if ticket.request.key in self._lines:
            self._lines.move_to_end(ticket.request.key)
