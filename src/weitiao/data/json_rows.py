"""JSON lines, and JSON files that hold one array of rows → raw rows, each with its place.

Lines are read one at a time. A byte order mark, Windows line ends and blank lines are accepted. An array is read whole
and decoded row by row; after a syntax error in it nothing more is read, for what follows has no places.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import BinaryIO

from weitiao.data.json_values import JsonReader, find_odd_values, json_problem, needs_walk, skip_space
from weitiao.data.options import Encoding
from weitiao.data.placeholders import may_hold_placeholders
from weitiao.data.raw_rows import RawRow, RowCount, repeated_keys, unreadable
from weitiao.errors import Problem

BLOCK_BYTES = 1 << 20
"""About so many bytes of lines are handed to another process at once: some two thousand rows."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OPENS_DATA = re.compile(rb'\{\s*"data"\s*:\s*\[')


@dataclass(frozen=True, kw_only=True, slots=True)
class LineBlock:
    """Some whole lines of a file of JSON lines: what another process needs to read the rows in them."""

    data: bytes
    name: str
    first_line: int
    """The number of the first of them in the file, from 1."""
    encoding: Encoding


def iter_json_rows(
    file: BinaryIO, name: str, *, encoding: Encoding, count: RowCount, may_be_array: bool
) -> Iterator[RawRow]:
    """Each row of a file of JSON lines, or of one array (or ``{"data": [rows]}``) where `may_be_array`."""
    start = _read_start(file)
    if _is_lines(start, may_be_array=may_be_array):
        yield from _parse_lines(chain(start, file), name, 1, encoding=encoding, count=count)
    else:
        yield from _iter_other(start, file, name, encoding=encoding, count=count, may_be_array=may_be_array)


def iter_json_parts(
    file: BinaryIO, name: str, *, encoding: Encoding, count: RowCount, may_be_array: bool
) -> Iterator[LineBlock | RawRow]:
    """What `iter_json_rows` gives, but lines in blocks that are neither read nor counted yet."""
    start = _read_start(file)
    if not _is_lines(start, may_be_array=may_be_array):
        yield from _iter_other(start, file, name, encoding=encoding, count=count, may_be_array=may_be_array)
        return
    data, line = b"".join(start), 1
    while data:
        data += file.read(BLOCK_BYTES)
        if not data.endswith(b"\n"):
            data += file.readline()
        yield LineBlock(data=data, name=name, first_line=line, encoding=encoding)
        line += data.count(b"\n")
        data = file.readline()


def read_block(block: LineBlock, count: RowCount) -> Iterator[RawRow]:
    """Each row of a block, counted in `count`."""
    lines = BytesIO(block.data)
    yield from _parse_lines(lines, block.name, block.first_line, encoding=block.encoding, count=count)


def _read_start(file: BinaryIO) -> list[bytes]:
    """The first lines up to one that is not blank; nothing when there is none."""
    start: list[bytes] = []
    for line in file:
        start.append(line)
        if _bare(line, len(start)):
            return start
    return []


def _bare(line: bytes, number: int) -> bytes:
    """The line without what surrounds a value."""
    return (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).strip()


def _is_lines(start: list[bytes], *, may_be_array: bool) -> bool:
    """Whether a file that begins so holds a value on each line."""
    if not start:
        return True
    bare = _bare(start[-1], len(start))
    return bare not in (b"[", b"{") and not (may_be_array and (bare.startswith(b"[") or _OPENS_DATA.match(bare)))


def _iter_other(
    start: list[bytes], file: BinaryIO, name: str, *, encoding: Encoding, count: RowCount, may_be_array: bool
) -> Iterator[RawRow]:
    """The rows of one array, or the problem of a value that is spread over several lines."""
    if may_be_array:
        data = b"\n" * (len(start) - 1) + start[-1] + file.read()
        yield from _iter_whole(data, name, encoding=encoding, count=count)
    else:
        count.read += 1
        yield unreadable(_spread_over_lines(_bare(start[-1], len(start)).decode(), f"{name}:{len(start)}"))


def _parse_lines(
    lines: Iterable[bytes], name: str, first_line: int, *, encoding: Encoding, count: RowCount
) -> Iterator[RawRow]:
    reader = JsonReader()
    for number, line in enumerate(lines, start=first_line):
        if line.isspace() or (number == 1 and not _bare(line, 1)):
            continue
        count.read += 1
        yield _parse_line(line, name, number, encoding=encoding, reader=reader)


def _parse_line(line: bytes, name: str, number: int, *, encoding: Encoding, reader: JsonReader) -> RawRow:
    source = f"{name}:{number}"
    text = decode_text(line.removesuffix(b"\n").removesuffix(b"\r"), name, number, encoding=encoding)
    if isinstance(text, Problem):
        return unreadable(text)
    try:
        value, end = reader.decode(text, skip_space(text, 0))
        if end < len(text) and (end := skip_space(text, end)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        return unreadable(json_problem(error, source))
    row = RawRow(source=source, value=value, marked=may_hold_placeholders(text), text=text)
    if reader.repeated or reader.odd or needs_walk(text):
        row.problems = (*repeated_keys(reader.repeated, source), *find_odd_values(value, source))
    return row


def _spread_over_lines(opening: str, source: str) -> Problem:
    message = f"the line is only `{opening}`: one JSON value is spread over several lines."
    fix = 'Write one JSON object per line, or name the file .json when it is one array of rows or {"data": [rows]}.'
    return Problem(source=source, field="row", message=message, fix=fix)


# --- One array of rows -----------------------------------------------------------------------------------------------


def _iter_whole(data: bytes, name: str, *, encoding: Encoding, count: RowCount) -> Iterator[RawRow]:
    text = decode_text(data, name, 1, encoding=encoding)
    if isinstance(text, Problem):
        count.read += 1
        yield unreadable(text)
        return
    reader = JsonReader()
    try:
        start = skip_space(text, 0)
        array = start if text[start] == "[" else _find_data(text, start, reader)
        if array < 0:
            count.read += 1
            yield unreadable(_spread_over_lines("{", f"{name}:{text.count(chr(10), 0, start) + 1}"))
            return
        at = skip_space(text, array + 1)
        number = 0
        while not (text.startswith("]", at) and number == 0):
            value, end = reader.decode(text, at)
            number += 1
            count.read += 1
            row = RawRow(source=f"{name}:row {number}", value=value, marked=may_hold_placeholders(text[at:end]))
            if reader.repeated or reader.odd or needs_walk(text, at, end):
                row.problems = (*repeated_keys(reader.repeated, row.source), *find_odd_values(value, row.source))
            yield row
            at = skip_space(text, end)
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = skip_space(text, at + 1)
        at = skip_space(text, at + 1)
        if array > start:
            at = _close_object(text, at, reader)
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        count.read += 1
        yield unreadable(json_problem(error, f"{name}:{error.lineno}"))


def _find_data(text: str, start: int, reader: JsonReader) -> int:
    """Where the array of ``{…, "data": [rows]}`` opens; -1 when the object has none."""
    at = skip_space(text, start + 1)
    while text.startswith('"', at):
        key, at = reader.decode(text, at)
        at = skip_space(text, at)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        at = skip_space(text, at + 1)
        if key == "data" and text.startswith("[", at):
            return at
        _, at = reader.decode(text, at)
        at = skip_space(text, at)
        if not text.startswith(",", at):
            break
        at = skip_space(text, at + 1)
    return -1


def _close_object(text: str, at: int, reader: JsonReader) -> int:
    """Where the object around the array ends: other keys may follow the rows."""
    while text.startswith(",", at):
        _, at = reader.decode(text, skip_space(text, at + 1))
        at = skip_space(text, at)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        _, at = reader.decode(text, skip_space(text, at + 1))
        at = skip_space(text, at)
    if not text.startswith("}", at):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return skip_space(text, at + 1)


# --- Bytes → text ----------------------------------------------------------------------------------------------------

_ENCODING_NAMES: dict[Encoding, str] = {"utf-8": "UTF-8", "gb18030": "GB18030"}


def decode_text(data: bytes, name: str, first_line: int, *, encoding: Encoding) -> str | Problem:
    """The text without its byte order mark, or where the first byte stands that cannot be one."""
    message, start = "", data.find(b"\0")
    if start >= 0:
        message, fix = "is NUL", "The file was cut by a crash or is not text: write the line anew, or remove it."
    else:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            message, start = f"0x{data[error.start]:02x} is not {_ENCODING_NAMES[encoding]}", error.start
            fix = encoding_fix(encoding)
        else:
            return text.removeprefix("\ufeff") if first_line == 1 else text
    line = first_line + data.count(b"\n", 0, start)
    place = start - (data.rfind(b"\n", 0, start) + 1)
    source = f"{name}:{line}"
    return Problem(source=source, field="row", message=f"the byte at offset {place} of the line {message}.", fix=fix)


def encoding_fix(encoding: Encoding) -> str:
    """What to do about a byte that is not of the encoding."""
    if encoding == "utf-8":
        return "Save the file as UTF-8, or say encoding: gb18030 for this source if it is Chinese text in GBK."
    return "Remove encoding: gb18030 from this source if the file is UTF-8, or save it as UTF-8."
