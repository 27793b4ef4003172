"""Who wrote what, in exports that name the speakers but do not say which of them owns the export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weitiao.errors import Problem

from .messages import ChatLog, ChatMessage, ExportKind
from .settings import ImportSettings

_I = "我"


def build_log(
    messages: Sequence[ChatMessage], *, chat_name: str, kind: ExportKind, settings: ImportSettings, source: str
) -> ChatLog | Problem:
    """The log of `messages`, those of the export's owner marked; or the problem that they cannot be told.

    The owner is who bears a name of ``settings.me``, or 我; else, where two people speak and the chat is named after
    one of them, the other. Messages without a sender are notices.
    """
    names = list(dict.fromkeys(message.sender for message in messages if message.sender))
    mine = {name for name in names if name in settings.me or (name == _I and not settings.me)}
    if not mine and len(names) <= 2 and chat_name in names:
        mine = set(names) - {chat_name}
    elif not mine and names and not (settings.member in names and len(names) > 1):
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        message = f"does not say which speaker you are; there are: {shown}."
        if settings.me:
            message = f"has no speaker named {' or '.join(settings.me)}; there are: {shown}."
        return Problem(
            source=source, field="speakers", message=message, fix="Give your name in this chat with --me NAME."
        )
    others = [name for name in names if name not in mine]
    return ChatLog(
        contact=others[0] if len(others) == 1 else chat_name,
        me=settings.me[0] if settings.me else next(iter(sorted(mine)), ""),
        is_group=len(others) > 1,
        kind=kind,
        messages=tuple(replace(message, from_me=message.sender in mine) for message in messages),
    )
