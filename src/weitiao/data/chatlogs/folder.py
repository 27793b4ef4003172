"""Files and folders of exports → chat logs, one for each chat, whatever mixture of exports it came in.

Each file is recognised by its content. What an import wrote earlier is never read again. A chat that was exported in
several ways is read once, from the export that says most; exports of one kind are joined, and messages that stand in
several of them count once. Every file that is not used is named with the reason.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weitiao.errors import DataError, Problem

from .messages import EXPORT_KINDS, ChatLog, ChatMessage, ExportKind, ReadExport
from .samples import is_samples, parse_json, read_samples
from .settings import ImportSettings
from .summary import is_own_output
from .tables import (
    CONTACT_COLUMNS,
    LATER_COLUMNS,
    OLD_COLUMNS,
    OLD_NAME_COLUMNS,
    Contact,
    header_of,
    read_contacts,
    read_later_table,
    read_old_table,
)
from .transcripts import is_ai_text, is_text_export, read_ai_text, read_text_export

_ENDINGS = (".csv", ".txt", ".json", ".jsonl")
_KIND_IN_NAME = re.compile(r"(?:_utf8|_chat|_train|_dev)?(?:\s?\([0-9]+\))?$")
_MERGED = ("train", "dev")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileReport:
    """What became of one file."""

    path: str
    kind: str
    """The kind of export; "" for a file that was not read."""
    messages: int
    note: str = ""
    """Why it was not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSet:
    """All that was read."""

    logs: tuple[ChatLog, ...]
    """One for each chat, its messages in the order of time."""
    files: tuple[FileReport, ...]
    dropped: Counter[str]
    """Messages that were read and are in no log, by reason."""
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A file's text and what it was recognised as."""

    path: Path
    text: str
    kind: ExportKind | str


def read_chats(paths: Sequence[str | Path], settings: ImportSettings) -> ChatSet:
    """The chats of files and folders; folders are searched to any depth.

    Raises:
        DataError: with every row of every file that cannot be understood; for a file given by name that is no export,
            or is what an import wrote; and when there are no messages at all.
    """
    reports: list[FileReport] = []
    problems: list[Problem] = []
    sources = [source for path in paths for source in _open_all(Path(path), settings, reports, problems)]
    contacts: dict[str, Contact] = {}
    for source in sources:
        if source.kind == "contacts":
            found = read_contacts(source.text, source.path, problems)
            contacts |= found
            reports.append(FileReport(path=str(source.path), kind="contacts", messages=0, note=f"{len(found)} names"))
    logs: list[ChatLog] = []
    notes: list[str] = []
    for source in sources:
        if source.kind == "contacts":
            continue
        read = _read_source(source, settings, contacts)
        problems += read.problems
        notes += read.notes
        logs += [log for log in read.logs if log.messages]
        count = sum(len(log.messages) for log in read.logs)
        reports.append(FileReport(path=str(source.path), kind=source.kind, messages=count))
    if problems:
        raise DataError(f"{len(problems)} things in the chat logs cannot be understood.", problems)
    if not logs:
        looked = ", ".join(str(path) for path in paths)
        seen = "".join(f" {report.path}: {report.note}." for report in reports[:10] if report.note)
        raise DataError(f"There are no messages in {looked}. Export the chats as CSV, best of all.{seen}")
    dropped: Counter[str] = Counter()
    joined = _join_chats(logs, dropped, notes)
    return ChatSet(logs=joined, files=tuple(reports), dropped=dropped, notes=tuple(notes))


# --- Finding and recognising -----------------------------------------------------------------------------------------


def _open_all(
    path: Path, settings: ImportSettings, reports: list[FileReport], problems: list[Problem]
) -> list[_Source]:
    """The exports at `path`; what is none of them is reported, or an error if it was given by name."""
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path} does not exist. Give the folder that the exporter wrote, or files in it.")
        found = _open(path, settings, problems)
        if isinstance(found, str):
            raise DataError(f"{path} cannot be imported: it {found}.")
        return [found] if found else []
    sources = []
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        if file.suffix.lower() not in _ENDINGS:
            note = f"is no {', '.join(_ENDINGS)} file"
            reports.append(FileReport(path=str(file), kind="", messages=0, note=note))
            continue
        found = _open(file, settings, problems)
        if isinstance(found, str):
            reports.append(FileReport(path=str(file), kind="", messages=0, note=found))
        elif found:
            sources.append(found)
    return sources


def _open(path: Path, settings: ImportSettings, problems: list[Problem]) -> _Source | str | None:
    """The export at `path`; why it is none; or None after a problem with its bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        text = data.decode(settings.encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"holds the byte 0x{data[error.start]:02x}, which is not {settings.encoding}."
        other = "gb18030" if settings.encoding == "utf-8-sig" else "utf-8-sig"
        fix = f"Try --encoding {other}, or save the file as UTF-8."
        problems.append(Problem(source=f"{path}:{line}", field="row", message=message, fix=fix))
        return None
    kind = recognise_export(text)
    if kind == "own output":
        return "is the result of an earlier import"
    if kind == "empty":
        return "is empty"
    if kind is None:
        return "is no chat log that is known"
    return _Source(path=path, text=text, kind=kind)


def recognise_export(text: str) -> ExportKind | str | None:
    """Which export the text is: an `ExportKind`, ``contacts``, ``own output`` or ``empty``; None for anything else."""
    start = text.removeprefix("\ufeff").lstrip()
    if not start:
        return "empty"
    if start[0] in "[{":
        return _recognise_json(text)
    if is_ai_text(text):
        return "AI text"
    if is_text_export(text):
        return "text"
    header = header_of(text)
    if header in (OLD_COLUMNS, OLD_COLUMNS + OLD_NAME_COLUMNS):
        return "table"
    if header[:5] == LATER_COLUMNS[:5]:
        return "later table"
    return "contacts" if header[:5] == CONTACT_COLUMNS else None


def _recognise_json(text: str) -> ExportKind | str | None:
    first = text.removeprefix("\ufeff").lstrip().partition("\n")[0]
    for piece in (first, text):  # a line of JSON lines, or the whole file
        try:
            value = parse_json(piece)
        except ValueError:
            continue
        if is_own_output(value):
            return "own output"
        if is_samples(value):
            return "samples"
    return None


def _read_source(source: _Source, settings: ImportSettings, contacts: dict[str, Contact]) -> ReadExport:
    chat_name = _KIND_IN_NAME.sub("", source.path.stem) or source.path.stem
    if source.kind == "table":
        return read_old_table(source.text, source.path, settings, contacts, chat_name)
    if source.kind == "later table":
        return read_later_table(source.text, source.path, settings, chat_name)
    if source.kind == "text":
        return read_text_export(source.text, source.path, settings, chat_name)
    if source.kind == "AI text":
        return read_ai_text(source.text, source.path, settings, chat_name)
    return read_samples(json.loads(source.text.removeprefix("\ufeff")), source.path, settings, chat_name)


# --- Joining what belongs to one chat --------------------------------------------------------------------------------


def _join_chats(logs: Sequence[ChatLog], dropped: Counter[str], notes: list[str]) -> tuple[ChatLog, ...]:
    """One log for each chat; what is in it twice counts once."""
    chats: dict[str, list[ChatLog]] = {}
    for log in _drop_copies(logs, dropped, notes):
        chats.setdefault(log.contact, []).append(log)
    joined = []
    for contact, its in chats.items():
        best = min((log.kind for log in its), key=EXPORT_KINDS.index)
        for log in its:
            if log.kind != best:
                reason = "in a fuller export of the chat"
                dropped[reason] += len(log.messages)
                where = log.messages[0].source.rpartition(":")[0]
                notes.append(f"{where} was left out: {best!r} of the same chat says more than {log.kind!r}.")
        joined.append(_join([log for log in its if log.kind == best], contact, dropped))
    return tuple(joined)


def _drop_copies(logs: Sequence[ChatLog], dropped: Counter[str], notes: list[str]) -> list[ChatLog]:
    """The logs, each ready-made conversation once: train.json and dev.json are mostly others' files merged."""
    others = [log for log in logs if log.kind != "samples"]
    kept = list(others)
    known: set[tuple[tuple[bool, str], ...]] = set()
    for log in sorted((log for log in logs if log.kind == "samples"), key=lambda log: log.contact in _MERGED):
        file = log.messages[0].source.rpartition(":")[0]
        if log.contact in _MERGED and others:
            dropped["in a merged file beside its chats"] += len(log.messages)
            notes.append(f"{file} was left out: it does not say whose chats it holds, and chats lie beside it.")
            continue
        messages: list[ChatMessage] = []
        for _, block in itertools.groupby(log.messages, key=lambda message: message.block):
            turns = list(block)
            key = tuple((message.from_me, message.text) for message in turns)
            if key in known:
                dropped["repeated"] += len(turns)
            else:
                messages += turns
            known.add(key)
        if messages:
            kept.append(replace(log, messages=tuple(messages)))
    return kept


def _join(logs: Sequence[ChatLog], contact: str, dropped: Counter[str]) -> ChatLog:
    """The logs of one chat and kind as one; of a message that several hold, the one that holds it most often counts."""
    kept: list[ChatMessage] = []
    known: Counter[tuple[object, ...]] = Counter()
    for log in logs:
        if log.kind == "samples":
            kept += _renumber(log.messages, first=kept[-1].block + 1 if kept else 0)
            continue
        here: Counter[tuple[object, ...]] = Counter()
        for message in log.messages:
            key = (message.time, message.from_me, message.sender, message.kind, message.text)
            here[key] += 1
            if here[key] > known[key]:
                kept.append(message)
            else:
                dropped["repeated"] += 1
        known |= here
    if logs[0].kind != "samples":
        kept.sort(key=lambda message: (message.time is not None, message.time))
    return replace(
        logs[0],
        contact=contact,
        me=next((log.me for log in logs if log.me), ""),
        is_group=any(log.is_group for log in logs),
        messages=tuple(kept),
    )


def _renumber(messages: Sequence[ChatMessage], *, first: int) -> list[ChatMessage]:
    """The messages of ready-made conversations, these counted from `first`."""
    return [replace(message, block=first + message.block) for message in messages]
