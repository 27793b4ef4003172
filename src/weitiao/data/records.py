"""Files of labelled rows → `Record`s, strictly: every bad row is reported with line, field and fix, none is skipped.

    read_records("train.jsonl")              all records, or one DataError with every problem
    iter_records_or_problems("big.jsonl")    the same one at a time, in memory of one line
    digest_records(records)                  the data's fingerprint

Reads JSON lines, and a ``.json`` file that holds one array of rows. A UTF-8 byte order mark, Windows line ends and
blank lines are accepted. Repeated keys, NaN, broken characters and anything else that a lenient reader would settle by
guessing are refused. Which keys a row may have is the business of formats.py.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weitiao.data.formats import row_to_record
from weitiao.data.record import Record, Target
from weitiao.errors import DataError, Problem

__all__ = ["Record", "Target", "digest_records", "iter_records_or_problems", "read_records"]


def read_records(path: str | os.PathLike[str], *, require_target: bool = True) -> list[Record]:
    """All records of a file, in order.

    With ``require_target=False`` (prediction input) a row may lack its answer. Raises one DataError with every
    problem of every row; also when the file is missing, unreadable or holds no rows.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    for item in iter_records_or_problems(path, require_target=require_target):
        if isinstance(item, Record):
            records.append(item)
        else:
            problems.append(item)
    if problems:
        num_bad = len({problem.source for problem in problems})
        raise DataError(f"{os.fspath(path)}: {num_bad} of {len(records) + num_bad} rows cannot be used.", problems)
    return records


def iter_records_or_problems(
    path: str | os.PathLike[str], *, require_target: bool = True
) -> Iterator[Record | Problem]:
    """Each row of a file in turn: its record, or each of its problems.

    Holds one line in memory (a ``.json`` array is read whole). Raises DataError, at the first step, when the file
    cannot be opened and, at the last, when it holds no rows.
    """
    name = os.fspath(path)
    empty = True
    try:
        with open(name, "rb") as file:
            for row in _iter_rows(file, name):
                empty = False
                if isinstance(row, Problem):
                    yield row
                else:
                    yield from _row_to_items(row, require_target=require_target)
    except OSError as error:
        raise DataError(_explain_unreadable(name, error)) from error
    if empty:
        raise DataError(f"{name} holds no rows. Write one JSON object per line.")


def digest_records(records: Iterable[Record]) -> str:
    """SHA-256 (hexadecimal) over messages, target and task of each record in order.

    The same for a file that was moved, saved with other line ends, or had its row keys reordered; another for any
    change of what is learnt, the key order inside a target included.
    """
    digest = hashlib.sha256()
    for record in records:
        turns = [[message.role, message.text] for message in record.messages]
        digest.update(json.dumps([turns, record.target, record.task], separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


# --- From bytes to JSON values ---------------------------------------------------------------------------------------

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One JSON value of a file; `repeated` names the keys that stand twice in one of its objects."""

    source: str
    value: Any
    repeated: tuple[str, ...]


def _iter_rows(file: BinaryIO, name: str) -> Iterator[_Row | Problem]:
    """Each row as read, in file order; a Problem for what is not JSON."""
    first_row = True
    for number, line in enumerate(file, start=1):
        bare = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).strip()
        if number == 1:
            _refuse_other_file_kinds(line, name)
        if not bare:
            continue
        if first_row and bare.startswith(b"[") and name.lower().endswith(".json"):
            yield from _iter_array_rows(b"\n" * (number - 1) + line + file.read(), name)
            return
        if first_row and bare in (b"[", b"{"):
            message = f"the line is only `{bare.decode()}`: one JSON value is spread over several lines."
            fix = "Write one JSON object per line, or name the file .json when it is one array of rows."
            yield Problem(source=f"{name}:{number}", field="row", message=message, fix=fix)
            return
        first_row = False
        yield _parse_line(line, name, number)


def _parse_line(line: bytes, name: str, number: int) -> _Row | Problem:
    source = f"{name}:{number}"
    text = _decode_utf8(line.removesuffix(b"\n").removesuffix(b"\r"), name, number)
    if isinstance(text, Problem):
        return text
    try:
        value, end, repeated = _decode_json(text, _skip_space(text, 0))
        end = _skip_space(text, end)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        return _json_problem(error, source)
    return _Row(source=source, value=value, repeated=repeated)


def _iter_array_rows(data: bytes, name: str) -> Iterator[_Row | Problem]:
    """The rows of a file that is one JSON array, which ends at the first syntax error: what follows has no places."""
    text = _decode_utf8(data, name, 1)
    if isinstance(text, Problem):
        yield text
        return
    try:
        at = _skip_space(text, text.index("[") + 1)
        number = 0
        while not (text.startswith("]", at) and number == 0):
            value, at, repeated = _decode_json(text, at)
            number += 1
            yield _Row(source=f"{name}:row {number}", value=value, repeated=repeated)
            at = _skip_space(text, at)
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip_space(text, at + 1)
        at = _skip_space(text, at + 1)
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        yield _json_problem(error, f"{name}:{error.lineno}")


def _decode_utf8(data: bytes, name: str, first_line: int) -> str | Problem:
    """The text without its byte order mark, or where the first byte stands that cannot be one."""
    message, start = "", data.find(b"\0")
    if start >= 0:
        message, fix = "is NUL", "The file was cut by a crash or is not text: write the line anew, or remove it."
    else:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            message, start = f"0x{data[error.start]:02x} is not UTF-8", error.start
            fix = "Save the file as UTF-8; from GBK: iconv -f GB18030 -t UTF-8."
        else:
            return text.removeprefix("\ufeff") if first_line == 1 else text
    line = first_line + data.count(b"\n", 0, start)
    place = start - (data.rfind(b"\n", 0, start) + 1)
    source = f"{name}:{line}"
    return Problem(source=source, field="row", message=f"the byte at offset {place} of the line {message}.", fix=fix)


def _decode_json(text: str, start: int) -> tuple[Any, int, tuple[str, ...]]:
    """The JSON value at `start`, where it ends, and the keys that stand twice in one object."""
    repeated: list[str] = []

    def note_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in pairs:
            if key in value:
                repeated.append(key)
            value[key] = item
        return value

    try:
        value, end = json.JSONDecoder(object_pairs_hook=note_repeated).raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("Too many lists or objects inside each other", text, start) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise json.JSONDecodeError("A number with too many digits", text, start) from None
    return value, end, tuple(repeated)


def _skip_space(text: str, start: int) -> int:
    found = _JSON_SPACE.match(text, start)
    return found.end() if found else start


_JSON_FIXES = (
    ("Extra data", "Write one JSON object per line."),
    ("Unterminated string", "Close the text with a double quote; a line break inside a text is written \\n."),
    ("Invalid control character", "Inside a text write a tab as \\t and a line break as \\n."),
    ("Invalid \\", "Inside a text write a backslash twice: \\\\."),
    ("Expecting property name", "Put keys in double quotes, and no comma after the last one."),
    ("", "Write complete JSON objects: double quotes around texts, commas between pairs, braces closed."),
)


def _json_problem(error: json.JSONDecodeError, source: str) -> Problem:
    there = error.doc[error.pos :].partition("\n")[0]
    seen = f"`{repr(there[:24])[1:-1]}{'…' if len(there) > 24 else ''}` stands" if there.strip() else "the line ends"
    fix = next(fix for start, fix in _JSON_FIXES if error.msg.startswith(start))
    message = f"is not JSON: {error.msg.removesuffix(' at').rstrip(': ')}, at column {error.colno}, where {seen}."
    return Problem(source=source, field="row", message=message, fix=fix)


# --- From JSON values to records -------------------------------------------------------------------------------------


def _row_to_items(row: _Row, *, require_target: bool) -> Iterator[Record | Problem]:
    """The row's record, or all its problems: those of its JSON and those of its format."""
    problems = [
        Problem(source=row.source, field=_printable(key), message="stands twice in one object.", fix="Keep one.")
        for key in row.repeated
    ]
    for place, value in _walk(row.value):
        if isinstance(value, float) and not math.isfinite(value):
            message, fix = f"is {value}, which JSON cannot say.", "Write a finite number, or a text."
        elif isinstance(value, str) and "\0" in value:
            message, fix = "holds a NUL character.", "Remove \\u0000."
        elif isinstance(value, str) and _printable(value) != value:
            message, fix = "holds half a character (a lone surrogate).", "Write the character itself instead of \\ud8…."
        else:
            continue
        problems.append(Problem(source=row.source, field=_printable(place), message=message, fix=fix))
    converted = row_to_record(row.value, row.source, require_target=require_target)
    if isinstance(converted, list):
        problems += converted
    if problems:
        yield from problems
    else:
        assert isinstance(converted, Record)
        yield converted


def _walk(row: object) -> Iterator[tuple[str, object]]:
    """Every key and every value inside the row with its place, such as ``messages[1].content``, in order."""
    waiting: list[tuple[str, object]] = [("", row)]
    while waiting:
        place, value = waiting.pop()
        yield place, value
        if isinstance(value, dict):
            inside = [(f"{place}.{key}" if place else key, item) for key, item in value.items()]
            yield from ((_printable(key), key) for key in value)
            waiting += reversed(inside)
        elif isinstance(value, list):
            waiting += reversed([(f"{place}[{index}]", item) for index, item in enumerate(value)])


def _printable(text: str) -> str:
    """The text with half characters written out, so that printing it cannot fail."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- Files that cannot be read ---------------------------------------------------------------------------------------

_OTHER_FILE_KINDS = (
    (b"\xff\xfe", "UTF-16 text. Save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text. Save it as UTF-8"),
    (b"\x1f\x8b", "gzip. Unpack it first: gunzip"),
    (b"PK\x03\x04", "a zip file or a spreadsheet. Unpack it, or export it as JSON lines"),
    (b"PAR1", "Parquet. Export it as JSON lines"),
)


def _refuse_other_file_kinds(line: bytes, name: str) -> None:
    for start, kind in _OTHER_FILE_KINDS:
        if line.startswith(start):
            raise DataError(f"{name} is {kind}.")


def _explain_unreadable(name: str, error: OSError) -> str:
    """One sentence on why the file cannot be read and one on what to do."""
    path = Path(name)
    if isinstance(error, FileNotFoundError):
        if not path.parent.is_dir():
            return f"{name} does not exist, nor does its folder {path.parent}. Check the path."
        near = difflib.get_close_matches(path.name, _list_names(path.parent), n=1)
        return f"{name} does not exist. " + (f"Did you mean {path.with_name(near[0])}?" if near else "Check the path.")
    if isinstance(error, IsADirectoryError):
        inside = [str(path / entry) for entry in _list_names(path) if entry.endswith((".jsonl", ".json"))]
        files = ", ".join(inside[:8]) + (", …" if len(inside) > 8 else "")
        return f"{name} is a folder. " + (f"Give one of its files: {files}." if files else "It holds no .jsonl file.")
    if isinstance(error, PermissionError):
        return f"{name} may not be read by this user. Change its permissions: chmod u+r {name}"
    return f"{name} cannot be read: {error.strerror or error}. Check the disk and the path."


def _list_names(folder: Path) -> list[str]:
    """Names in the folder, sorted; none when it may not be listed: they only serve to suggest."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
