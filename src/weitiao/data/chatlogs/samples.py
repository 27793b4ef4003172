"""Ready-made conversations → chat logs: the JSON exports, whose chats are cut, shuffled and without times.

    [{"conversations": [{"role": "system", …}, {"role": "user", …}, {"role": "assistant", …}]}]
    [{"messages": […the same…]}]
    [{"system": "…", "instruction": "…", "input": "", "output": "…", "history": [["…", "…"]]}]

Their system prompts are not kept: the import writes its own. Knows nothing of what the exporter left out before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weitiao.errors import Problem

from .messages import ChatLog, ChatMessage, ReadExport
from .settings import ImportSettings

_OWN_NAME = re.compile(r"你是(.{1,30}?)，一个聪明")
_FIX = "Export the chat anew, or correct the row."


def is_samples(value: object) -> bool:
    """Whether the JSON value is a list of conversations as the exports write them."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    row = value[0]
    return (
        any(isinstance(row.get(key), list) for key in ("conversations", "messages"))
        or {
            "instruction",
            "output",
        }
        <= row.keys()
    )


def read_samples(value: list[Any], path: Path, settings: ImportSettings, chat_name: str) -> ReadExport:
    """The log of a JSON export: each conversation is a block of its own."""
    problems: list[Problem] = []
    messages: list[ChatMessage] = []
    owner = ""
    own_system: set[str] = set()
    for number, row in enumerate(value, start=1):
        source = f"{path}:row {number}"
        turns = list(_turns_of(row, source, problems))
        for role, text in turns:
            if role == "system":
                own_system.add(text)
                named = _OWN_NAME.match(text)
                owner = owner or (named[1] if named else "")
                continue
            from_me = (role == "assistant") == (settings.samples_assistant == "me")
            messages.append(
                ChatMessage(source=source, from_me=from_me, sender="", kind="text", text=text, time=None, block=number)
            )
    notes = [f"{path} has no times: what is held out shares no messages with the rest, but need not be the latest."]
    if own_system:
        notes.append(f"{path}: {len(own_system)} system prompts of the export were not taken over.")
    log = ChatLog(
        contact=chat_name,
        me=settings.me[0] if settings.me else owner,
        is_group=False,
        kind="samples",
        messages=tuple(messages),
    )
    return ReadExport(logs=[log], problems=problems, notes=notes)


def _turns_of(row: object, source: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Role and text of each turn of one row; what cannot be read becomes a problem."""
    if not isinstance(row, dict):
        problems.append(Problem(source=source, field="row", message="is not an object.", fix=_FIX))
        return
    key = next((key for key in ("conversations", "messages") if key in row), None)
    if key is None:
        yield from _alpaca_turns(row, source, problems)
        return
    entries = row[key]
    if not isinstance(entries, list) or not entries:
        problems.append(Problem(source=source, field=key, message="is not a list of turns.", fix=_FIX))
        return
    for index, entry in enumerate(entries):
        place = f"{key}[{index}]"
        role = entry.get("role") if isinstance(entry, dict) else None
        text = entry.get("content") if isinstance(entry, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            message = 'is not {"role": "system", "user" or "assistant", "content": text}.'
            problems.append(Problem(source=source, field=place, message=message, fix=_FIX))
        else:
            yield role, text


def _alpaca_turns(row: Mapping[str, Any], source: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    history = row.get("history") or []
    texts = {key: row.get(key) or "" for key in ("system", "instruction", "input", "output")}
    wrong = [key for key, text in texts.items() if not isinstance(text, str)]
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if wrong or not pairs:
        where = ", ".join([*wrong, *([] if pairs else ["history"])])
        message = "is not text." if pairs else "is not a list of [question, reply]."
        problems.append(Problem(source=source, field=where, message=message, fix=_FIX))
        return
    if texts["system"]:
        yield "system", texts["system"]
    for question, reply in history:
        yield "user", question
        yield "assistant", reply
    yield "user", "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    yield "assistant", texts["output"]


def parse_json(text: str) -> Any:
    """The JSON value of a file. Raises ValueError, with line and column, when it is none."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("too many lists inside each other") from None
