"""One choice of a reply: what the worker tells of it, turned into text as it comes, and what it is in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ..generate.chat import Reply, reply_of
from ..generate.sampling import Choice
from ..render.base import Renderer
from .problems import RefusedError, bad_request, shutting_down
from .requests import Done, Failed, Piece, Ticket, Usage
from .served import Ask
from .streaming import TextStream

_RETRY_AFTER_S = 5
"""Where a server behind this one is too busy and does not say for how long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class More:
    """The next text of a choice; "" where tokens have come whose text is still open."""

    index: int
    text: str
    tokens: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The whole choice."""

    index: int
    text: str
    """Everything that `More` has told; cut before a stop text."""
    finish: str
    """``stop`` or ``length``, as the protocol has it."""
    refusal: str
    """Why there is no answer; "" as a rule."""
    usage: Usage
    reply: Reply | None
    """The answer as evaluation gets it; None where a stop text cut it off."""


async def follow(
    ticket: Ticket, ask: Ask, renderer: Renderer, *, index: int, stops: Sequence[str]
) -> AsyncGenerator[More | Ended]:
    """Yield the texts of a choice, then the whole of it. Closing the generator early cancels the request.

    Raises RefusedError when the worker could not finish it.
    """
    stream = TextStream(renderer, tools=ask.tools, held=ask.constraint is not None, stops=stops)
    parts: list[str] = []
    async with aclosing(ticket.events()) as events:
        async for event in events:
            if isinstance(event, Piece):
                text = stream.push([choice.token for choice in event.tokens])
                parts.append(text)
                yield More(index=index, text=text, tokens=event.tokens)
                if stream.stopped:
                    usage = Usage(
                        prompt_tokens=len(ask.prompt_ids), cached_tokens=0, completion_tokens=stream.num_tokens
                    )
                    whole = "".join(parts)
                    yield Ended(index=index, text=whole, finish="stop", refusal="", usage=usage, reply=None)
                    return
            elif isinstance(event, Done):
                rest = stream.finish(event.generation)
                parts.append(rest)
                if rest:
                    yield More(index=index, text=rest, tokens=())
                cut = stream.stopped
                reply = reply_of(event.generation, renderer, ask.tools, held=ask.constraint is not None)
                yield Ended(
                    index=index,
                    text="".join(parts),
                    finish="length" if _was_cut(event, ask) and not cut else "stop",
                    refusal=event.generation.reason,
                    usage=event.usage,
                    reply=None if cut else reply,
                )
                return
            else:
                raise _failure(event)


def _was_cut(done: Done, ask: Ask) -> bool:
    """Whether the limit ended the answer, at a place where it may end or not."""
    return done.finish == "length" or (done.finish == "refused" and len(done.generation.token_ids) >= ask.limit)


def _failure(event: Failed) -> RefusedError:
    if event.kind == "shutdown":
        return shutting_down()
    if event.kind == "cancelled":
        return RefusedError(499, event.reason, code="cancelled")
    if event.kind == "unfit":
        return bad_request(event.reason, param="messages")
    if event.kind == "busy":
        return RefusedError(
            429, event.reason, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=_RETRY_AFTER_S
        )
    return RefusedError(500, event.reason, kind="server_error", code="model_error")


async def follow_all(
    tickets: Sequence[Ticket], ask: Ask, renderer: Renderer, *, stops: Sequence[str]
) -> AsyncGenerator[More | Ended]:
    """The texts and ends of all choices, as they come. Closing it early cancels them all. Raises as `follow`."""
    if len(tickets) == 1:
        async with aclosing(follow(tickets[0], ask, renderer, index=0, stops=stops)) as only:
            async for one in only:
                yield one
        return
    told: asyncio.Queue[More | Ended | Exception] = asyncio.Queue()

    async def pump(index: int, ticket: Ticket) -> None:
        try:
            async with aclosing(follow(ticket, ask, renderer, index=index, stops=stops)) as events:
                async for event in events:
                    told.put_nowait(event)
        except RefusedError as refused:
            told.put_nowait(refused)

    pumps = [asyncio.create_task(pump(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(pumps)
        while left:
            event = await told.get()
            if isinstance(event, Exception):
                raise event
            yield event
            left -= isinstance(event, Ended)
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
