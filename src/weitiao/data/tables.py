"""Tables → raw rows: CSV and TSV, Parquet, spreadsheets. The first line names the columns, each row becomes an object.

An empty cell is null. A column that a format knows to hold a list or an object (`STRUCTURED`) may hold it as JSON.
CSV and TSV are read line by line and Parquet batch by batch; a spreadsheet is read row by row.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO
from xml.etree.ElementTree import ParseError

from weitiao.data.json_rows import encoding_fix
from weitiao.data.json_values import parse_inner
from weitiao.data.options import Encoding
from weitiao.data.raw_rows import RawRow, RowCount, row_of_values, unreadable
from weitiao.errors import DataError, Problem

STRUCTURED = frozenset(
    {"messages", "conversations", "conversation", "dialogue", "history", "tools", "entities", "relations", "spo_list"}
    | {"result_list", "data", "annotations"}
)
"""Columns whose cells are read as JSON where they look like it."""

_LONGEST_CELL = 1 << 30
_ROWS_AT_ONCE = 1024


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def iter_csv_rows(
    file: BinaryIO, name: str, *, delimiter: str, encoding: Encoding, count: RowCount
) -> Iterator[RawRow]:
    """Each row of a CSV or TSV file; its place is the physical line it starts at."""
    csv.field_size_limit(_LONGEST_CELL)  # the module's own limit, 128 KiB, is less than a long article
    lines = _Lines(file, encoding)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = lines.number + 1
        source = f"{name}:{start}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            count.read += 1
            yield unreadable(_csv_problem(error, source, start, lines.number))
            if header is None:
                return
            continue
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        if header is None:
            header = _check_header(cells, name)
            continue
        count.read += 1
        yield _csv_row(header, cells, source, encoding)


class _Lines:
    """The lines of a file as text, counted; a byte that cannot be decoded becomes a lone surrogate."""

    def __init__(self, file: BinaryIO, encoding: Encoding) -> None:
        self.number = 0
        self._file = file
        self._encoding = encoding

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        # NUL is no character of a cell either, and the csv module of some versions refuses it with no place.
        line = line.replace(b"\0", b"\xff")
        try:
            return line.decode(self._encoding)
        except UnicodeDecodeError as error:  # the first lone surrogate stands for the byte at fault
            good, bad = line[: error.start].decode(self._encoding), line[error.start]
            rest = line[error.start + 1 :].decode("ascii", "surrogateescape")
            return f"{good}{chr(0xDC00 + max(bad, 0x80))}{rest}"


def _csv_problem(error: csv.Error, source: str, first: int, last: int) -> Problem:
    message = f"is no row of cells: {error}."
    fix = 'Put a cell that holds a quote or a separator in double quotes, and write each quote inside it twice: "".'
    if "unexpected end" in str(error):
        message = f"a quote is opened and never closed, so that lines {first} to {last} would be one row."
    return Problem(source=source, field="row", message=message, fix=fix)


def _csv_row(header: Sequence[str], cells: Sequence[str], source: str, encoding: Encoding) -> RawRow:
    if len(cells) != len(header):
        message = f"has {len(cells)} cells, but the header names {len(header)} columns."
        fix = "Put a cell that holds the separator in double quotes, or add the missing cells."
        return unreadable(Problem(source=source, field="row", message=message, fix=fix))
    for name, cell in zip(header, cells):
        undecoded = next((ord(letter) for letter in cell if "\udc80" <= letter <= "\udcff"), None)
        if undecoded is not None:
            byte = undecoded - 0xDC00
            seen = "holds NUL or a byte 0xff" if byte == 0xFF else f"holds the byte 0x{byte:02x}"
            message = f"{seen}, which is not {encoding.upper()}."
            return unreadable(Problem(source=source, field=name, message=message, fix=encoding_fix(encoding)))
    return _row(header, [cell if cell.strip() else None for cell in cells], source)


def _check_header(cells: Sequence[object], name: str) -> list[str]:
    names = ["" if cell is None else str(cell).strip() for cell in cells]
    twice = [column for column, times in Counter(names).items() if times > 1 and column]
    if twice:
        raise DataError(f"{name} names the column {twice[0]!r} twice in its first line. Rename one of them.")
    if "" in names:
        at = names.index("") + 1
        raise DataError(f"{name} has no name for its column {at}. Write the names of all columns in the first line.")
    if any("\udc80" <= letter <= "\udcff" for column in names for letter in column):
        raise DataError(f"{name} has a first line that cannot be decoded. {encoding_fix('utf-8')}")
    return names


def _row(header: Sequence[str], cells: Sequence[object], source: str, problems: Sequence[Problem] = ()) -> RawRow:
    """The row with the cells under their names, JSON in them read; `problems` are those found on the way here."""
    value: dict[str, Any] = {}
    problems = list(problems)
    for name, cell in zip(header, cells, strict=True):
        if name in STRUCTURED and isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
            try:
                cell = parse_inner(cell)
            except ValueError as error:
                fix = "Write the list as JSON, or leave the cell empty."
                problems.append(Problem(source=source, field=name, message=f"is not JSON: {error}.", fix=fix))
        value[name] = cell
    return row_of_values(value, source, tuple(problems))


# --- Parquet ---------------------------------------------------------------------------------------------------------


def iter_parquet_rows(path: str, *, count: RowCount) -> Iterator[RawRow]:
    """Each row of a Parquet file; its place is its number from 1. Raises DataError where the file is damaged."""
    number = 0
    for rows in _parquet_batches(path):
        count.read += len(rows)
        for row in rows:
            number += 1
            source = f"{path}:row {number}"
            problems: list[Problem] = []
            plain = {str(key): _plain(value, str(key), source, problems) for key, value in row.items()}
            yield _row(list(plain), list(plain.values()), source, problems)


def _parquet_batches(path: str) -> Iterator[list[dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    num_rows = 0
    try:
        with open(path, "rb") as opened:
            file = pyarrow.parquet.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                num_rows += batch.num_rows
                yield batch.to_pylist()
            stated = file.metadata.num_rows
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged, or no Parquet file: {_first_line(error)}. Write it anew.") from None
    if num_rows != stated:
        raise DataError(f"{path} says that it holds {stated} rows, but {num_rows} can be read. Write it anew.")


def _plain(value: object, place: str, source: str, problems: list[Problem]) -> Any:
    """The value as JSON has it: dates and decimals as text, maps as objects."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        # Arrow gives every object the keys of all rows; where a format reads the object, null stands for "not there".
        absent = place.partition(".")[0].partition("[")[0] in STRUCTURED
        inside = {str(key): item for key, item in value.items() if item is not None or not absent}
        return {key: _plain(item, f"{place}.{key}", source, problems) for key, item in inside.items()}
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # Arrow's map type
            return {str(key): _plain(item, f"{place}.{key}", source, problems) for key, item in value}
        return [_plain(item, f"{place}[{index}]", source, problems) for index, item in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    message = f"holds {type(value).__name__}, which is neither text nor a number."
    problems.append(Problem(source=source, field=place, message=message, fix="Write the column as text."))
    return None


# --- Spreadsheets ----------------------------------------------------------------------------------------------------

# What openpyxl raises for a file that is no workbook or a damaged one; it has no exception of its own for it.
_BROKEN_WORKBOOK = (
    OSError, zipfile.BadZipFile, zlib.error, struct.error, ParseError, EOFError, NotImplementedError, RuntimeError,
    KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError,
)  # fmt: skip


def iter_xlsx_rows(path: str, *, sheet: str | None, count: RowCount) -> Iterator[RawRow]:
    """Each row of a sheet; its place is the number the spreadsheet shows beside it. Numbers become text as written."""
    header: list[str] | None = None
    for number, cells in enumerate(_sheet_rows(path, sheet), start=1):
        if all(_is_blank(cell) for cell in cells):
            continue
        if header is None:
            header = _xlsx_header(cells, path)
            continue
        count.read += 1
        yield _xlsx_row(header, cells, f"{path}:row {number}")


def _sheet_rows(path: str, sheet: str | None) -> Iterator[Sequence[object]]:
    try:
        import openpyxl
    except ImportError:
        raise DataError(f"{path} is a spreadsheet, which needs openpyxl: pip install 'weitiao[files]'") from None
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():  # remarks on styles and data validation, which rows do not have
                warnings.simplefilter("ignore", UserWarning)
                book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            names = [each.title for each in book.worksheets]
            if not names or (sheet is not None and sheet not in names):
                raise DataError(f"{path} has no sheet {sheet or ''!r}. Its sheets: {', '.join(names) or 'none'}.")
            yield from book[sheet if sheet is not None else names[0]].iter_rows(values_only=True)
        except _BROKEN_WORKBOOK as error:
            raise DataError(f"{path} is damaged, or no .xlsx workbook: {_first_line(error)}. Save it anew.") from None


def _xlsx_header(cells: Sequence[object], path: str) -> list[str]:
    last = max(index for index, cell in enumerate(cells) if not _is_blank(cell))
    return _check_header(cells[: last + 1], path)


def _xlsx_row(header: Sequence[str], cells: Sequence[object], source: str) -> RawRow:
    beyond = [cell for cell in cells[len(header) :] if not _is_blank(cell)]
    if beyond:
        message = f"has {len(beyond)} cells beyond the {len(header)} named columns."
        fix = "Name their columns in the first row, or empty them."
        return unreadable(Problem(source=source, field="row", message=message, fix=fix))
    written = [_written(cell) for cell in cells[: len(header)]]
    return _row(header, [*written, *[None] * (len(header) - len(written))], source)


def _is_blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _written(cell: object) -> str | None:
    if _is_blank(cell):
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return cell.isoformat() if isinstance(cell, datetime.date | datetime.time) else str(cell)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__).rstrip(".:")[:200]
