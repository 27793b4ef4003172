"""What is asked of the worker, what it tells of it, and the ticket that joins the two.

Knows tokens, threads and asyncio; knows nothing of HTTP, text or how a batch is run.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import WeitiaoError
from ..generate.constraint import Constraint
from ..generate.row import Finish, Generation
from ..generate.sampling import Choice, Sampling, Steering

FailKind = Literal["cancelled", "shutdown", "error", "busy", "unfit"]
"""Why there is no answer: the client went away, the server closes, the model could not be run; or a server behind this
one is too busy, or cannot run such a request."""


class BusyError(WeitiaoError):
    """No more requests are taken for the moment: the queue is full (429)."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """After how many seconds there will probably be room: from the requests that wait and the measured rate."""


class ClosedError(WeitiaoError):
    """No requests are taken any more: the worker closes, or has ended (503)."""


class UnfitError(WeitiaoError):
    """The request can never be run by this worker: too long, an adapter or token it does not have (400)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer that is asked for; n answers to one prompt are n requests, submitted together."""

    prompt_ids: Sequence[int]
    """As `Renderer.render_prompt` gives them."""
    stop_ids: Collection[int]
    """`Renderer.stop_ids`; with a constraint, those of its compiler."""
    limit: int
    """Most tokens of the answer; forced ones and the stop token count."""
    sampling: Sampling = field(default_factory=Sampling)
    """Temperature, top-p, top-k and seed; its own limit is not looked at."""
    steering: Steering = field(default_factory=Steering)
    """Penalties, bias, min-p, and how many alternatives of each token are told."""
    constraint: Constraint | None = None
    """Compiled by the caller (`compiler_of(…).compile(…)`); it is not changed, so one may serve many requests."""
    grammar: str | None = None
    """What `constraint` was compiled from, for those who have it compiled elsewhere."""
    before: str = ""
    """What the answer's tokens spell before the text of `grammar` (`Renderer.before_answer`)."""
    adapter: str | None = None
    """Name of the adapter (`AdapterSet`); None: the base model."""
    choice: int = 0
    """Which of several answers to one prompt: with the seed, it makes the random numbers, as a prompt's index does in
    `generate`. So a request of choice 0 draws what `generate` draws for a single prompt of the same seed."""
    key: str = ""
    """Whose request it is: those who wait take turns by this."""

    @property
    def num_positions(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.prompt_ids) + self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request took, in tokens."""

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were copied from another's beginning."""
    completion_tokens: int
    """Tokens of the answer, a stop token that was written included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next tokens of an answer: one, or several where a constraint forced some."""

    tokens: tuple[Choice, ...]
    """Each with its log-probability and, as far as asked for, the alternatives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The answer is complete. `generate.chat.reply_of` makes of `generation` the reply that evaluation gets."""

    finish: Finish
    usage: Usage
    generation: Generation
    """The answer as offline generation gives it; its index means nothing here."""
    tokens: tuple[Choice, ...]
    """All tokens of the answer, without the stop token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """There will be no answer."""

    reason: str
    """A sentence."""
    kind: FailKind


Event = Piece | Done | Failed


class Ticket:
    """A request on its way. The last of its events is `Done` or `Failed`; there is always one.

    Events are read once: by `events`, by `result`, or by iterating in a thread without asyncio.
    """

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        """`wake`: tells the worker that the ticket was cancelled."""
        self.request = request
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        """When the first token came, on the clock of `time.monotonic`."""
        self.ended: float | None = None
        self.cached_tokens = 0
        """Tokens of the prompt that were copied from another's beginning; known once the request has a row."""
        self.cancelled = False
        self._wake = wake
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._bell: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Ask the worker to let the request go; its row is free in the next step. From any thread, at any time."""
        if self.ended is None and not self.cancelled:
            self.cancelled = True
            self._wake()

    async def events(self) -> AsyncGenerator[Event]:
        """Yield the events as they come. Closing the generator early, or cancelling its task, cancels the request.

        Use it within ``contextlib.aclosing``, so that it is closed at once when the client goes away.
        """
        loop, bell = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._bell = loop, bell
        try:
            while True:
                bell.clear()
                for event in self._take():
                    yield event
                    if not isinstance(event, Piece):
                        return
                await bell.wait()
        finally:
            with self._changed:
                self._bell = None
            self.cancel()

    async def result(self) -> Done | Failed:
        """The last event; the pieces are dropped. Cancelling the task cancels the request."""
        events = self.events()
        try:
            async for event in events:
                if not isinstance(event, Piece):
                    return event
        finally:
            await events.aclose()
        raise AssertionError("a ticket's last event is Done or Failed")

    def __iter__(self) -> Iterator[Event]:
        """The events as they come, in a thread that may wait; breaking off does not cancel."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
            for event in self._take():
                yield event
                if not isinstance(event, Piece):
                    return

    def wait(self) -> Done | Failed:
        """The last event, in a thread that may wait."""
        return next(event for event in self if not isinstance(event, Piece))

    def put(self, event: Event) -> None:
        """Tell an event; the worker's."""
        now = time.monotonic()
        if isinstance(event, Piece):
            self.first_token = self.first_token or now
        else:
            self.ended = now
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            if self._bell is not None:
                loop, bell = self._bell
                try:
                    loop.call_soon_threadsafe(bell.set)
                except RuntimeError:  # the loop is closed: nobody can be listening any more
                    self.cancelled = True

    def _take(self) -> Iterator[Event]:
        while self._events:
            yield self._events.popleft()
