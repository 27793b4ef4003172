r"""Messages of the protocol → a conversation as the chat formats know it, and a reply with calls → the protocol's.

Everything that cannot be understood is refused with its place; nothing is dropped and nothing merged.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..messages import Message, ToolCall, check_order
from ..tasks.strict_json import loads
from .problems import bad_request
from .protocol import ChatRequest, FunctionCall, FunctionShape, MessageShape

_CALL = re.compile(r"<tool_call>\n(?P<call>\{.*?\})\n</tool_call>", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What is asked."""

    messages: tuple[Message, ...]
    """The last one is the user's, or what a tool gave back."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Those on offer, each ``{"name", "description", "parameters"}``."""


def read_conversation(request: ChatRequest) -> Conversation:
    """The conversation of a request. Raises RefusedError with the place of what cannot be read."""
    known_ids: dict[str, int] = {}
    messages = []
    for place, shape in enumerate(request.messages):
        messages.append(_read_message(shape, f"messages[{place}]", known_ids))
        for call in shape.tool_calls or ():
            known_ids[call.id] = place
    try:
        check_order(messages)
    except ValueError as error:
        raise bad_request(f"{error}", param="messages") from None
    last = messages[-1]
    if last.role == "assistant":
        raise bad_request(
            "The last message is the assistant's, so there is nothing to answer. End with the user's or a tool's.",
            param=f"messages[{len(messages) - 1}].role",
        )
    offered = [tool.function for tool in request.tools or ()] or list(request.functions or ())
    choice = request.tool_choice or request.function_call
    tools = () if choice == "none" else tuple(_read_tool(one) for one in offered)
    return Conversation(messages=tuple(messages), tools=tools)


def _read_message(shape: MessageShape, place: str, known_ids: Mapping[str, int]) -> Message:
    for key in _MISPLACED[shape.role]:
        if getattr(shape, key) not in (None, []):
            raise bad_request(f"A message of role {shape.role} has no {key}. Leave it out.", param=f"{place}.{key}")
    text = shape.text
    if shape.role == "assistant":
        calls = tuple(_read_call(call.function, f"{place}.tool_calls") for call in shape.tool_calls or ())
        if shape.function_call is not None:
            calls = (*calls, _read_call(shape.function_call, f"{place}.function_call"))
        if text is None and not calls:
            # what the server itself sends for a refused answer
            text = shape.refusal
            if text is None:
                raise bad_request("The message has neither content nor calls.", param=f"{place}.content")
        return Message(role="assistant", text=text or "", calls=calls)
    if text is None:
        raise bad_request("The message has no content. Write a text.", param=f"{place}.content")
    if shape.role == "tool":
        if shape.tool_call_id is None:
            raise bad_request("A tool's message needs the id of the call it answers.", param=f"{place}.tool_call_id")
        if shape.tool_call_id not in known_ids:
            raise bad_request(f"No call before has the id {shape.tool_call_id[:60]!r}.", param=f"{place}.tool_call_id")
    role = {"developer": "system", "function": "tool"}.get(shape.role, shape.role)
    return Message(role=role, text=text)  # type: ignore[arg-type]


_MISPLACED: Mapping[str, tuple[str, ...]] = {
    "developer": ("tool_calls", "tool_call_id", "function_call", "refusal"),
    "system": ("tool_calls", "tool_call_id", "function_call", "refusal"),
    "user": ("tool_calls", "tool_call_id", "function_call", "refusal"),
    "assistant": ("tool_call_id",),
    "tool": ("tool_calls", "function_call", "refusal"),
    "function": ("tool_calls", "tool_call_id", "function_call", "refusal"),
}


def _read_call(call: FunctionCall, place: str) -> ToolCall:
    try:
        arguments = loads(call.arguments) if call.arguments.strip() else {}
    except ValueError as error:
        raise bad_request(f"The arguments of {call.name} are not JSON: {error}.", param=place) from None
    if not isinstance(arguments, dict):
        raise bad_request(f"The arguments of {call.name} are no JSON object.", param=place)
    return ToolCall(name=call.name, arguments=arguments)


def _read_tool(shape: FunctionShape) -> Mapping[str, Any]:
    described = {"name": shape.name}
    if shape.description is not None:
        described["description"] = shape.description
    return {**described, "parameters": shape.parameters or {"type": "object", "properties": {}}}


# ---- replies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A reply with its calls told apart."""

    text: str
    calls: tuple[ToolCall, ...]


def read_said(reply: str, names: Sequence[str]) -> Said:
    r"""What a reply in the plain text of `messages.write_calls` says, and which of the tools `names` it calls.

    A call that cannot be read, or of a tool that was not offered, stays text: nothing that was written is lost.

    >>> read_said('<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>', ["weather"]).calls
    (ToolCall(name='weather', arguments={'city': '北京'}),)
    """
    calls, kept, end = [], "", 0
    for found in _CALL.finditer(reply):
        call = _call_of(found["call"], names)
        if call is None:
            continue
        kept += reply[end : found.start()]
        end = found.end()
        calls.append(call)
    rest = kept + reply[end:]
    return Said(text=rest.strip("\n") if calls else reply, calls=tuple(calls))


def _call_of(text: str, names: Sequence[str]) -> ToolCall | None:
    try:
        call = loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or call["name"] not in names:
        return None
    return ToolCall(name=call["name"], arguments=call["arguments"]) if isinstance(call["arguments"], dict) else None


def describe_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """`calls` as the protocol has them, each with an id of its own."""
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]
