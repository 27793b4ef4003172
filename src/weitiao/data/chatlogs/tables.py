"""Tables of messages → chat logs: both generations of CSV exports, and the table of contacts.

    localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,StrTime[,Remark,NickName,Sender]
    消息ID,类型,发送人,时间,内容,备注,昵称,更多信息
    UserName,Alias,Type,Remark,NickName,…

The first kind holds one chat, or all of them (messages.csv), told apart by TalkerId. In a private chat the last columns
name the writer of the row, in a group likewise. Every row that cannot be understood is a problem with file and line.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path

from weitiao.errors import Problem

from .kinds import read_named, read_numbered
from .messages import NOTICES, ChatLog, ChatMessage, ReadExport
from .settings import ImportSettings
from .speakers import build_log

OLD_COLUMNS = ("localId", "TalkerId", "Type", "SubType", "IsSender", "CreateTime", "Status", "StrContent", "StrTime")
OLD_NAME_COLUMNS = ("Remark", "NickName", "Sender")
LATER_COLUMNS = ("消息ID", "类型", "发送人", "时间", "内容", "备注", "昵称", "更多信息")
CONTACT_COLUMNS = ("UserName", "Alias", "Type", "Remark", "NickName")

_LONGEST_CELL = 1 << 30
_MEND = "Export the chat anew, or correct the row."
_SENDER_IN_TEXT = re.compile(r"(wxid_[A-Za-z0-9]+):\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contact:
    """A row of the table of contacts."""

    remark: str
    nickname: str

    @property
    def name(self) -> str:
        """How the owner of the export calls them."""
        return self.remark or self.nickname


@dataclass(frozen=True, slots=True)
class _Row:
    """One row under the names of its columns."""

    source: str
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells.get(column, "")


def header_of(text: str) -> tuple[str, ...]:
    """The cells of the first line."""
    first = text.lstrip("\ufeff\r\n").partition("\n")[0].rstrip("\r")
    return tuple(cell.strip() for cell in next(iter(csv.reader([first])), ()))


def _read_rows(text: str, name: str, problems: list[Problem]) -> Iterator[_Row]:
    """Each row below the header; one that has another number of cells, or a broken quote, is a problem."""
    before = csv.field_size_limit(_LONGEST_CELL)  # the module's own limit, 128 KiB, is less than some cards' XML
    try:
        reader = csv.reader(_lines(text), strict=True)
        header: Sequence[str] | None = None
        while True:
            source = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                message = f"is no row of cells: {error}."
                if "unexpected end" in str(error):
                    message = f"opens a quote that is not closed until the file ends in line {reader.line_num}."
                fix = 'Close the quote; a quote inside a cell is written twice: "".'
                problems.append(Problem(source=source, field="row", message=message, fix=fix))
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                message = f"has {len(cells)} cells, but the first line names {len(header)} columns."
                fix = "Put a cell that holds a comma in double quotes, or export the chat anew."
                problems.append(Problem(source=source, field="row", message=message, fix=fix))
            else:
                yield _Row(source, dict(zip(header, cells)))
    finally:
        csv.field_size_limit(before)


def _lines(text: str) -> list[str]:
    """The lines of `text`, ended by line feeds alone: what else Python takes for a line end may stand in a message."""
    return re.findall(r"[^\n]*\n|[^\n]+\Z", text.removeprefix("\ufeff"))


# --- localId,TalkerId,Type,… -----------------------------------------------------------------------------------------


def read_old_table(
    text: str, path: Path, settings: ImportSettings, contacts: Mapping[str, Contact], chat_name: str
) -> ReadExport:
    """The logs of a table of the first generation: one for each TalkerId."""
    problems: list[Problem] = []
    chats: defaultdict[str, list[tuple[_Row, ChatMessage]]] = defaultdict(list)
    names: dict[str, str] = {}
    shifts: set[int] = set()
    for row in _read_rows(text, str(path), problems):
        problem = _check_numbers(row)
        time = _read_time(row, "StrTime", "CreateTime", settings.zone)
        if problem or isinstance(time, Problem):
            problems += [*problem, *([time] if isinstance(time, Problem) else [])]
            continue
        shifts.update(_shift_of(row, time))
        content = row["StrContent"]
        sender_id = row["Sender"].strip()
        announced = _SENDER_IN_TEXT.match(content) if not sender_id else None
        if announced:
            sender_id, content = announced[1], content[announced.end() :]
        known = contacts.get(sender_id)
        name = row["Remark"].strip() or row["NickName"].strip() or (known.name if known else "")
        if not name and sender_id:
            name = names.setdefault(sender_id, f"成员{len(names) + 1}")
        kind, words = read_numbered(int(row["Type"]), int(row["SubType"] or 0), content)
        message = ChatMessage(
            source=row.source,
            from_me=row["IsSender"].strip() == "1",
            sender=name,
            kind=kind,
            text=words,
            time=time,
        )
        chats[row["TalkerId"].strip()].append((row, message))
    logs = [_old_log(talker, rows, chat_name if len(chats) == 1 else None, settings) for talker, rows in chats.items()]
    notes = []
    if shifts:
        hours = ", ".join(f"{shift / 3600:+g} h" for shift in sorted(shifts)[:5])
        notes.append(f"{path}: StrTime and CreateTime differ by {hours}; StrTime was used. Is the UTC offset right?")
    return ReadExport(logs=logs, problems=problems, notes=notes)


def _check_numbers(row: _Row) -> list[Problem]:
    found = []
    for column, pattern, what in (
        ("Type", r"-?[0-9]+", "a number"),
        ("SubType", r"-?[0-9]*", "a number"),
        ("IsSender", r"[01]", "0 or 1"),
    ):
        if not re.fullmatch(pattern, row[column].strip(), re.ASCII):
            message = f"is {row[column][:40]!r}, not {what}."
            found.append(Problem(source=row.source, field=column, message=message, fix=_MEND))
    return found


def _shift_of(row: _Row, time: datetime) -> set[int]:
    """By how many seconds the written time is ahead of the counted one, where both are given and differ."""
    number = row["CreateTime"].strip()
    if not re.fullmatch(r"[0-9]{1,11}", number, re.ASCII):
        return set()
    return {round(time.timestamp()) - int(number)} - {0}


def _old_log(
    talker: str, rows: Sequence[tuple[_Row, ChatMessage]], chat_name: str | None, settings: ImportSettings
) -> ChatLog:
    theirs = {
        row["Sender"].strip() or message.sender: message.sender
        for row, message in rows
        if not message.from_me and message.kind not in NOTICES
    }
    mine = [message.sender for _, message in rows if message.from_me and message.sender]
    is_group = len(theirs) > 1
    only = next(iter(theirs.values()), "")
    contact = chat_name if is_group else (only or chat_name)
    return ChatLog(
        contact=contact or (f"群聊{talker}" if is_group else f"联系人{talker}"),
        me=settings.me[0] if settings.me else (mine[0] if mine else ""),
        is_group=is_group,
        kind="table",
        messages=tuple(message for _, message in rows),
    )


# --- 消息ID,类型,发送人,… ---------------------------------------------------------------------------------------------


def read_later_table(text: str, path: Path, settings: ImportSettings, chat_name: str) -> ReadExport:
    """The log of a table of the second generation, which names the writer of a row but not whether it was the owner."""
    problems: list[Problem] = []
    messages: list[ChatMessage] = []
    for row in _read_rows(text, str(path), problems):
        time = _read_time(row, "时间", None, settings.zone)
        read = read_named(row["类型"], row["内容"])
        if read is None:
            message = f"is {row['类型'][:40]!r}, which is no kind of message."
            problems.append(Problem(source=row.source, field="类型", message=message, fix=_MEND))
        if isinstance(time, Problem):
            problems.append(time)
        elif read is not None:
            kind, words = read
            sender = "" if kind in NOTICES else row["发送人"].strip()
            messages.append(
                ChatMessage(source=row.source, from_me=False, sender=sender, kind=kind, text=words, time=time)
            )
    log = build_log(messages, chat_name=chat_name, kind="later table", settings=settings, source=str(path))
    if isinstance(log, Problem):
        return ReadExport(problems=problems or [log])  # a bad row may be why
    return ReadExport(logs=[log], problems=problems)


# --- UserName,Alias,Type,Remark,NickName,… ---------------------------------------------------------------------------


def read_contacts(text: str, path: Path, problems: list[Problem]) -> dict[str, Contact]:
    """The people of a table of contacts by their WeChat id."""
    return {
        row["UserName"].strip(): Contact(remark=row["Remark"].strip(), nickname=row["NickName"].strip())
        for row in _read_rows(text, str(path), problems)
    }


# --- Times -----------------------------------------------------------------------------------------------------------


def _read_time(row: _Row, written: str, seconds: str | None, zone: tzinfo) -> datetime | Problem:
    """The time of a row: as written, else from its seconds since 1970."""
    text = row[written].strip()
    if text:
        time = parse_time(text, zone)
        if time is not None:
            return time
        message = f"is {text[:40]!r}, not a time like 2023-05-01 20:00:00."
        return Problem(source=row.source, field=written, message=message, fix=_MEND)
    if seconds is None:
        return Problem(source=row.source, field=written, message="is empty.", fix=_MEND)
    number = row[seconds].strip()
    if re.fullmatch(r"[0-9]{1,11}", number, re.ASCII):
        return datetime.fromtimestamp(int(number), UTC).astimezone(zone)
    message = f"is {number[:40]!r}, not seconds since 1970, and {written} is empty."
    return Problem(source=row.source, field=seconds, message=message, fix=_MEND)


def parse_time(text: str, zone: tzinfo) -> datetime | None:
    """``2023-05-01 20:00:00`` on the clock of `zone`; None for anything else."""
    if not re.fullmatch(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2} [0-9]{1,2}:[0-9]{2}(:[0-9]{2})?", text, re.ASCII):
        return None
    year, month, day, hour, minute, *second = (int(part) for part in re.split(r"[-/ :]", text))
    try:
        return datetime(year, month, day, hour, minute, second[0] if second else 0, tzinfo=zone)
    except ValueError:
        return None
