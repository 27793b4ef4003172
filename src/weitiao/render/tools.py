"""Tools in conversations: in the shape that chat templates read, and as plain text for models that know no tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..messages import Message, write_calls
from .base import Tools

_OFFER = """You may call these tools:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON in tags, and nothing after them:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>"""


def describe_tools(tools: Tools) -> list[dict[str, Any]]:
    """`tools` in OpenAI's shape, ``{"type": "function", "function": …}``, which chat templates expect."""
    return [{"type": "function", "function": dict(tool)} for tool in tools]


def tools_as_text(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """The same conversation in text alone, for models that were never taught tools.

    The offer joins the system message, calls become text (`messages.write_calls`), and what tools gave back becomes a
    message of the user's in ``<tool_response>`` tags, one for all the results of a reply. A conversation without tools
    comes back as it is.
    """
    told: list[Message] = []
    for message in messages:
        if message.role == "tool":
            text = f"<tool_response>\n{message.text}\n</tool_response>"
            if told and told[-1].role == "user":
                told[-1] = replace(told[-1], text=f"{told[-1].text}\n{text}")
            else:
                told.append(Message(role="user", text=text))
        elif message.calls:
            told.append(replace(message, text=write_calls(message.text, message.calls), calls=()))
        else:
            told.append(message)
    if tools:
        written = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        offer = _OFFER.format(tools=written)
        if told and told[0].role == "system":
            told[0] = replace(told[0], text=f"{told[0].text}\n\n{offer}")
        else:
            told.insert(0, Message(role="system", text=offer))
    return told
