"""Records as bytes, and rows that become records again one by one when they are asked for.

What a record holds beside its raw row is kept, so that it can be shown to a model again; `raw` comes back empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, overload

from ..messages import Message, ToolCall
from .record import Record

_PLAIN = ("target", "source", "task", "instruction", "question", "text", "text_span", "says", "tools", "left_out")


def pack_record(record: Record) -> bytes:
    """`record` less its raw row, as JSON."""
    values: dict[str, Any] = {name: getattr(record, name) for name in _PLAIN}
    values["messages"] = [asdict(message) for message in record.messages]
    values["calls"] = [asdict(call) for call in record.calls]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def unpack_record(data: bytes) -> Record:
    """The record that `pack_record` wrote."""
    values = json.loads(data.decode("utf-8", "surrogatepass"))
    span = values["text_span"]
    return Record(
        messages=tuple(
            Message(role=turn["role"], text=turn["text"], calls=_calls(turn["calls"]), learn=turn["learn"])
            for turn in values["messages"]
        ),
        target=values["target"],
        source=values["source"],
        task=values["task"],
        instruction=values["instruction"],
        question=values["question"],
        text=values["text"],
        text_span=None if span is None else (span[0], span[1]),
        raw={},
        calls=_calls(values["calls"]),
        says=values["says"],
        tools=tuple(values["tools"]),
        left_out=values["left_out"],
    )


def _calls(values: list[dict[str, Any]]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(name=call["name"], arguments=call["arguments"]) for call in values)


class StoredRows(Sequence[Record]):
    """Packed records; each is unpacked when it is asked for, which takes about ten microseconds."""

    def __init__(self, packed: Sequence[bytes]) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return StoredRows(self._packed[place])
        return unpack_record(self._packed[place])

    def __iter__(self) -> Iterator[Record]:
        return map(unpack_record, self._packed)
