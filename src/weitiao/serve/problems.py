"""Everything a client may be told instead of an answer, in the error shape of OpenAI's protocol.

    {"error": {"message": "…", "type": "invalid_request_error", "param": "messages[0].content", "code": null}}

Knows no HTTP framework: `RefusedError` carries the status, the app writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Kind = Literal[
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error", "timeout"
]


class RefusedError(Exception):
    """A request that gets no answer; `message` is a sentence with what was seen and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: Kind = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What is sent along: how many seconds to wait, where that is known."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return headers


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> RefusedError:
    """400: the request cannot be answered as it is."""
    return RefusedError(400, message, param=param, code=code)


def no_model(name: str, served: Sequence[str]) -> RefusedError:
    """404 in the words of the protocol: clients look at the code."""
    return RefusedError(
        404,
        f"There is no model {name[:80]!r} here. Served are: {', '.join(served)}.",
        param="model",
        code="model_not_found",
    )


def no_key(*, given: bool) -> RefusedError:
    """401: no key, or one that is not known."""
    said = "The API key is not known here." if given else "An API key is needed: send Authorization: Bearer KEY."
    return RefusedError(401, said, kind="authentication_error", code="invalid_api_key")


def too_busy(waiting: int, retry_after: float) -> RefusedError:
    """429: the queue is full."""
    return RefusedError(
        429,
        f"{waiting} requests are waiting already. Try again in {max(1, math.ceil(retry_after))} seconds.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after=retry_after,
    )


def shutting_down() -> RefusedError:
    """503: no new requests are taken."""
    return RefusedError(503, "The server is shutting down.", kind="server_error", code="shutting_down", retry_after=5)


def from_complaints(complaints: Sequence[Mapping[str, Any]]) -> RefusedError:
    """400 for what pydantic says of a body: every complaint a sentence, the first one's place as `param`."""
    told = [(_place(one["loc"]), _sentence(one)) for one in complaints]
    # of a union each alternative complains: the same place is told once
    by_place: dict[str, str] = {}
    for place, said in told:
        by_place.setdefault(place, said)
    lines = [f"{place}: {said}" if place else said for place, said in by_place.items()]
    return RefusedError(400, " ".join(lines[:20]), param=next(iter(by_place)) or None)


def _place(location: Sequence[str | int]) -> str:
    """``messages[0].content`` of ("body", "messages", 0, "content"); the names of a union's members are left out."""
    text = ""
    for part in location:
        if (part == "body" and not text) or (text == "response_format" and part in _FORMATS):
            continue
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in _UNION_WORDS:
            text += f".{part}" if text else part
    return text


_UNION_WORDS = {"str", "int", "float", "bool", "none"}
_FORMATS = {"text", "json_object", "json_schema"}
"""Names of a union's members too; ``response_format.json_schema.json_schema.name`` would be one too many."""


def _sentence(complaint: Mapping[str, Any]) -> str:
    kind, message, seen = complaint["type"], str(complaint["msg"]), complaint.get("input")
    if kind == "extra_forbidden":
        return "is not a field that is known here. Leave it out."
    if kind == "missing":
        return "is missing."
    if kind == "json_invalid":
        return f"The body is not JSON: {complaint.get('ctx', {}).get('error', message)}."
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    shown = f"{seen!r:.60}"
    return f"{message} (seen: {shown})." if not isinstance(seen, dict | list) else f"{message}."
