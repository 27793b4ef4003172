"""The server process: uvicorn with deadlines for clients that dawdle, and an end that breaks nothing off unsaid."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RunError
from .backend import Backend

HEADER_SECONDS = 20.0
"""For the head of a request to come in, from its first byte, or from when the connection was made."""
IDLE_SECONDS = 15
"""So long a connection may stay open between two requests."""
_AFTER_DRAIN = 10
"""Seconds for what is cancelled to be told and sent."""


class _TimelyProtocol(H11Protocol):
    """Closes connections on which no whole request head arrives in time: half-open sockets, headers byte by byte."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Listener(uvicorn.Server):
    """Serves an app; told to end, it has the worker finish what runs, and cancel the rest with a reason."""

    def __init__(self, app: FastAPI, worker: Backend, *, drain_seconds: float = 30.0) -> None:
        """
        Args:
            app: what `app.make_app` made.
            worker: the worker behind it.
            drain_seconds: how long requests may go on after the end was asked for.
        """
        config = uvicorn.Config(
            app,
            http=_TimelyProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(drain_seconds) + _AFTER_DRAIN,
        )
        super().__init__(config)
        self._worker, self._drain_seconds = worker, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal waits for nothing any more."""
        seconds = 0.0 if self.should_exit else self._drain_seconds
        threading.Thread(target=self._worker.close, args=(seconds,), daemon=True).start()
        super().handle_exit(sig, frame)


def listen(app: FastAPI, worker: Backend, *, host: str, port: int, drain_seconds: float = 30.0) -> None:
    """Serve `app` until a signal ends it.

    Raises:
        RunError: the address is taken, or not one of this machine's.
    """
    with socket_for(host, port) as bound:
        # uvicorn hands the signals on when it is done: they have been obeyed then
        before: list[tuple[int, Any]] = [
            (number, signal.signal(number, lambda *_: None)) for number in (signal.SIGINT, signal.SIGTERM)
        ]
        try:
            Listener(app, worker, drain_seconds=drain_seconds).run(sockets=[bound])
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def socket_for(host: str, port: int) -> socket.socket:
    """A bound socket. Raises RunError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise RunError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}. Take another port with --port, or end "
            f"what listens there."
        ) from None
    return bound


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server on `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")
