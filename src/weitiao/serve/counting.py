"""Counts and logs every request: method, route, status and seconds, nothing of what was said."""

from __future__ import annotations

import logging
import time

from .figures import Figures
from .guard import App, Message, Receive, Scope, Send

_LOG = logging.getLogger("weitiao.serve")


class Counting:
    """Wraps an ASGI app."""

    def __init__(self, app: App, *, figures: Figures) -> None:
        self.app, self.figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it when its reply is complete."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # what is counted of a client that went away before anything was said

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            # a route's path, not the one asked for: strangers' paths would be figures without end
            route = getattr(scope.get("route"), "path", "elsewhere")
            seconds = time.monotonic() - started
            self.figures.requests.labels(route, str(status)).inc()
            self.figures.seconds.labels(route).observe(seconds)
            _LOG.info("%s %s %d %.3f s", scope["method"], route, status, seconds)
