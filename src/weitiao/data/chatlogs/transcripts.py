"""Texts for reading → chat logs: the TXT export of both generations, and the AI-TXT export.

2023-05-01 20:00:00 小红          a head line with time and name, then what was said, then a blank line;
在吗                              a notice has its text in the head line (old) or no name there (new)

********************2023-05-01********************
                                  AI text: one block for each day; a name where the speaker changes, and after it
小红:在吗 周末去爬山吗              what was said, messages parted by a blank (old) or by a line end (new)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from weitiao.errors import Problem

from .kinds import read_labelled, read_named
from .messages import NOTICES, ChatMessage, ReadExport
from .settings import ImportSettings
from .speakers import build_log
from .tables import parse_time

_HEAD = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})(?: (.*))?")
_DAY = re.compile(r"\*{20}([0-9]{4}-[0-9]{2}-[0-9]{2})\*{20}")
_SPEAKER = re.compile(r"([^:]{1,64}):(.*)", re.DOTALL)


def is_text_export(text: str) -> bool:
    """Whether the first line that says something is a head line."""
    return _HEAD.fullmatch(_first_line(text)) is not None


def is_ai_text(text: str) -> bool:
    """Whether the first line that says something begins a day."""
    return _DAY.fullmatch(_first_line(text)) is not None


def _first_line(text: str) -> str:
    return next((line.strip("\r\ufeff ") for line in text.split("\n") if line.strip("\r\ufeff ")), "")


def _lines_of(text: str) -> list[str]:
    """The lines, without their ends."""
    return [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]


def read_text_export(text: str, path: Path, settings: ImportSettings, chat_name: str) -> ReadExport:
    """The log of a TXT export."""
    problems: list[Problem] = []
    messages: list[ChatMessage] = []
    heads: list[tuple[int, re.Match[str]]] = []
    lines = _lines_of(text)
    for number, line in enumerate(lines):
        head = _HEAD.fullmatch(line)
        if head and (number == 0 or not lines[number - 1].strip()):
            heads.append((number, head))
    for (number, head), end in zip(heads, [*(start for start, _ in heads[1:]), len(lines)], strict=True):
        source = f"{path}:{number + 1}"
        time = parse_time(head[1], settings.zone)
        if time is None:
            fix = "Correct the head line, or export the chat anew."
            problems.append(Problem(source=source, field="time", message=f"{head[1]} is no time.", fix=fix))
            continue
        body = "\n".join(lines[number + 1 : end]).rstrip("\n")
        sender, notice = (head[2] or "").strip(), not head[2] or not body.strip()
        if notice:
            sender, (kind, words) = "", read_named("系统消息", body or sender) or ("system", "")
        else:
            kind, words = read_labelled(body)
        messages.append(ChatMessage(source=source, from_me=False, sender=sender, kind=kind, text=words, time=time))
    log = build_log(messages, chat_name=chat_name, kind="text", settings=settings, source=str(path))
    if isinstance(log, Problem):
        return ReadExport(problems=problems or [log])  # a bad row may be why
    return ReadExport(logs=[log], problems=problems)


def read_ai_text(text: str, path: Path, settings: ImportSettings, chat_name: str) -> ReadExport:
    """The log of an AI-TXT export: a message for each line; its times are whole days."""
    lines = _lines_of(text)
    blank_before_names = not text.rstrip("\r\n").endswith(" ")  # the old exporter ends every message with a blank
    starts = [
        number
        for number, line in enumerate(lines)
        if number and (not blank_before_names or not lines[number - 1].strip()) and not _DAY.fullmatch(line.strip())
    ]
    named = {number: found for number in starts if (found := _SPEAKER.fullmatch(lines[number]))}
    speakers = _choose_speakers(Counter(found[1] for found in named.values()), settings, chat_name, str(path))
    if isinstance(speakers, Problem):
        return ReadExport(problems=[speakers])
    problems: list[Problem] = []
    messages: list[ChatMessage] = []
    day, sender = None, ""
    for number, line in enumerate(lines):
        source = f"{path}:{number + 1}"
        date = _DAY.fullmatch(line.strip())
        if date:
            day = parse_time(f"{date[1]} 00:00:00", settings.zone)
            if day is None:
                message, fix = f"{date[1]} is no date.", "Correct it, or export the chat anew."
                problems.append(Problem(source=source, field="date", message=message, fix=fix))
            continue
        if number in named and named[number][1] in speakers:
            sender, line = named[number][1], named[number][2]
        if not line.strip():
            continue
        if day is None or not sender:
            if not problems:
                message = "stands before the first day or the first speaker."
                problems.append(Problem(source=source, field="row", message=message, fix="Export the chat anew."))
            continue
        kind, words = read_labelled(line.rstrip(" "))
        who = "" if kind in NOTICES else sender
        messages.append(ChatMessage(source=source, from_me=False, sender=who, kind=kind, text=words, time=day))
    log = build_log(messages, chat_name=chat_name, kind="AI text", settings=settings, source=str(path))
    if isinstance(log, Problem):
        return ReadExport(problems=problems or [log])  # a bad row may be why
    note = f"{path} has days but no times of day, and its messages are not parted surely: prefer the CSV export."
    return ReadExport(logs=[log], problems=problems, notes=[note])


def _choose_speakers(
    seen: Counter[str], settings: ImportSettings, chat_name: str, source: str
) -> Collection[str] | Problem:
    """Which of the words `seen` before colons are names. "明天:三点" looks like one, so they must be known or few."""
    if settings.members:
        return {*settings.members, *settings.me}
    if chat_name in seen and any(name in seen for name in settings.me):
        return {chat_name, *settings.me}
    if len(seen) <= 2:
        return set(seen)
    shown = ", ".join(name for name, _ in seen.most_common(8))
    message = f"does not say where a name ends and speech begins; these stand where names do: {shown}."
    fix = "Name all who speak with --members A,B,C, yourself included, or use the CSV export."
    return Problem(source=source, field="speakers", message=message, fix=fix)
