"""What the routes need of whoever computes the answers: the worker in this process, or a vLLM server elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .rates import Stats
from .requests import Request, Ticket


class Backend(Protocol):
    """Takes requests on and tells of them through their tickets."""

    def submit_all(self, requests: Sequence[Request]) -> list[Ticket]:
        """Take on all of `requests` or none. Raises BusyError, ClosedError or UnfitError."""

    def stats(self) -> Stats:
        """The backend at this moment."""

    @property
    def alive(self) -> bool:
        """Whether requests can be run."""

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that are there finish for `drain_s` seconds, then fail the rest; waits."""
