"""Work that is done for a client, and dropped when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from .problems import RefusedError

T = TypeVar("T")


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Raises RefusedError, `work` cancelled, when the client closes the connection first."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_closed(http))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise RefusedError(499, "The client closed the connection.", code="client_closed_request")
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _closed(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
