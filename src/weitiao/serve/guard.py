"""What stands before the app: keys, sizes and time. A request that is stopped here reaches nothing else.

Plain ASGI, so that bodies are counted as they come in and a client that stops sending, or reading, is let go.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .keys import Keys
from .problems import RefusedError, no_key

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready")
"""What is told without a key; the page too, which asks for one."""
PAGE = "/page/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How much a client may send, and how long it may take."""

    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    """For the whole body to come in."""
    send_seconds: float = 60.0
    """For a client to take one piece of a reply."""


class Guard:
    """Wraps an ASGI app."""

    def __init__(self, app: App, *, keys: Keys, bounds: Bounds) -> None:
        self.app, self.keys, self.bounds = app, keys, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with the reason why not."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        send_in_time = self._in_time(send)
        try:
            scope["weitiao.key"] = self._owner(scope)
            body = await self._read_body(scope, receive)
        except RefusedError as refused:
            await _answer(refused, send_in_time)
            return
        except _GoneError:
            return
        await self.app(scope, _replaying(body, receive), send_in_time)

    def _owner(self, scope: Scope) -> str:
        """Whose key came with the request; "" where none is needed. Raises RefusedError (401)."""
        path = scope["path"]
        if not self.keys.needed or path in OPEN_PATHS or path.startswith(PAGE):
            return ""
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, key = given[0].decode("latin-1").partition(" ") if given else ("", "", "")
        owner = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise no_key(given=bool(given))
        return owner

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises RefusedError when it is too long or too slow."""
        limit = self.bounds.max_body_bytes
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and value.isdigit() and int(value) > limit:
                raise _too_long(limit)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.bounds.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise _too_long(limit)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise RefusedError(
                408,
                f"The body of the request did not come in within {self.bounds.body_seconds:g} seconds.",
                kind="timeout",
                code="request_timeout",
            ) from None

    def _in_time(self, send: Send) -> Send:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self.bounds.send_seconds):
                    await send(message)
            except TimeoutError:
                # as a connection that broke: whoever writes the reply ends with it
                raise OSError(f"The client took nothing for {self.bounds.send_seconds:g} seconds.") from None

        return send_in_time


class _GoneError(Exception):
    """The client closed the connection."""


def _too_long(limit: int) -> RefusedError:
    return RefusedError(413, f"The body of the request is longer than {limit:,} bytes.", code="request_too_large")


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body that was read put before what is still to come."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _answer(refused: RefusedError, send: Send) -> None:
    body = json.dumps(refused.body, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    headers |= refused.headers
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
