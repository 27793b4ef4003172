"""What a source of rows names → files, and each file → raw rows, by its kind.

    rows.jsonl  rows.ndjson  rows.json  rows.csv  rows.tsv    text, also as .gz and .zst
    rows.parquet  rows.xlsx
    folder/                   every file of these kinds in it, by name; hidden ones and folders inside it are not read
    data/part-*.jsonl         every file that fits, by name
    dataset_info.json#NAME    an entry of LLaMA-Factory's list of data sets
    hf:OWNER/NAME:SPLIT       a data set of the Hugging Face hub, and modelscope:OWNER/NAME:SPLIT one of ModelScope's

A file with another ending is read as JSON lines. Knows no row format.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from weitiao.data.compression import open_plain
from weitiao.data.hub import MODELSCOPE, iter_hugging_face_rows, modelscope_files
from weitiao.data.json_rows import LineBlock, iter_json_parts, iter_json_rows, read_block
from weitiao.data.options import ReadOptions
from weitiao.data.raw_rows import RawRow, RowCount
from weitiao.data.tables import iter_csv_rows, iter_parquet_rows, iter_xlsx_rows
from weitiao.errors import DataError

TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
BINARY_KINDS = (".parquet", ".xlsx")
KNOWN_ENDINGS = (*TEXT_KINDS, *(kind + packed for kind in TEXT_KINDS for packed in (".gz", ".zst")), *BINARY_KINDS)
INFO_NAME = "dataset_info.json"

RawPart = LineBlock | list[RawRow]
"""Some rows of a source, in order."""

_PART_ROWS = 500
Item = TypeVar("Item")

_OTHER_FILE_KINDS = (
    (b"\xff\xfe", "UTF-16 text. Save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text. Save it as UTF-8"),
    (b"PK\x03\x04", "a zip file or a spreadsheet. Unpack it, or give it the ending .xlsx if it is one"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet or document (.xls, .doc). Save it as .xlsx or CSV"),
    (b"PAR1", "Parquet. Give it the ending .parquet"),
)


def iter_raw_rows(name: str, options: ReadOptions, count: RowCount) -> Iterator[RawRow]:
    """Each row of all files that `name` stands for, in order; `count.read` counts them where the bytes are cut.

    Raises DataError when nothing is there, a file cannot be read or is damaged, or one holds no rows.
    """
    if name.startswith("hf:"):
        yield from iter_hugging_face_rows(name, count)
        return
    for path in find_files(name):
        yield from _or_explain(_iter_file(path, options, count, iter_json_rows), path)


def iter_raw_parts(name: str, options: ReadOptions, count: RowCount) -> Iterator[RawPart]:
    """The rows of `iter_raw_rows` in parts that other processes can work on.

    Rows of JSON lines come as lines, which `rows_of` reads and counts; those of other files are read, and counted in
    `count`, before they are handed out.

    Raises as `iter_raw_rows`, after the rows before the fault were handed out.
    """
    if name.startswith("hf:"):
        yield from _in_parts(iter_hugging_face_rows(name, count))
        return
    for path in find_files(name):
        yield from _in_parts(_or_explain(_iter_file(path, options, count, iter_json_parts), path))


def rows_of(part: RawPart, count: RowCount) -> Iterator[RawRow]:
    """The rows of a part; `count` counts those that were not counted before."""
    return read_block(part, count) if isinstance(part, LineBlock) else iter(part)


def _in_parts(items: Iterator[LineBlock | RawRow]) -> Iterator[RawPart]:
    """Blocks as they are, rows some hundred at a time."""
    rows: list[RawRow] = []
    try:
        for item in items:
            if isinstance(item, LineBlock):
                yield item
                continue
            rows.append(item)
            if len(rows) == _PART_ROWS:
                yield rows
                rows = []
    except DataError:
        yield rows
        raise
    if rows:
        yield rows


def _or_explain(items: Iterator[Item], path: str) -> Iterator[Item]:
    """The rows of the file at `path`. Raises DataError when it cannot be read, or there are none."""
    any_rows = False
    try:
        for item in items:
            any_rows = True
            yield item
    except OSError as error:
        raise DataError(explain_unreadable(path, error)) from error
    if not any_rows:
        raise DataError(f"{path} holds no rows. {_how_to_fill(path)}")


def find_files(name: str) -> list[str]:
    """The files that a path, a folder, a pattern or a ModelScope id stands for, in the order they are read.

    Raises DataError when there are none. A path of one file is given back as it is, there or not.
    """
    if name.startswith(MODELSCOPE):
        return modelscope_files(name, KNOWN_ENDINGS)
    if os.path.isdir(name):
        return _files_in(name)
    if any(letter in name for letter in "*?[") and not os.path.exists(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise DataError(f"No file fits the pattern {name}. Check the folder and the ending.")
        return found
    return [name]


def _files_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(explain_unreadable(folder, error)) from error
    if INFO_NAME in names:
        path = os.path.join(folder, INFO_NAME)
        raise DataError(f"{folder} holds a list of data sets. Name one of its entries: {path}#NAME")
    found = [os.path.join(folder, one) for one in names if one.lower().endswith(KNOWN_ENDINGS) and one[0] != "."]
    files = [path for path in found if os.path.isfile(path)]
    if not files:
        raise DataError(f"{folder} holds no file of rows. Known endings: {', '.join([*TEXT_KINDS, *BINARY_KINDS])}.")
    return files


def _iter_file(
    path: str, options: ReadOptions, count: RowCount, iter_json: Callable[..., Iterator[Item]]
) -> Iterator[Item | RawRow]:
    """The rows of one file; what stands in JSON as `iter_json` gives it."""
    lower = path.lower()
    if lower.endswith(".parquet"):
        yield from iter_parquet_rows(path, count=count)
        return
    if lower.endswith((".xlsx", ".xlsm")):
        yield from iter_xlsx_rows(path, sheet=options.sheet, count=count)
        return
    plain_name = lower.removesuffix(".gz").removesuffix(".zst")
    with open_plain(path) as file:
        _refuse_other_file_kinds(path)
        if plain_name.endswith((".csv", ".tsv")):
            delimiter = "\t" if plain_name.endswith(".tsv") else ","
            yield from iter_csv_rows(file, path, delimiter=delimiter, encoding=options.encoding, count=count)
        else:
            may_be_array = plain_name.endswith(".json")
            yield from iter_json(file, path, encoding=options.encoding, count=count, may_be_array=may_be_array)


def _refuse_other_file_kinds(path: str) -> None:
    with open(path, "rb") as file:
        first = file.read(8)
    for start, kind in _OTHER_FILE_KINDS:
        if first.startswith(start):
            raise DataError(f"{path} is {kind}.")


def _how_to_fill(path: str) -> str:
    table = path.lower().removesuffix(".gz").removesuffix(".zst").endswith((".csv", ".tsv", *BINARY_KINDS))
    return "Write the columns' names first, then one row per line." if table else "Write one JSON object per line."


# --- Files that cannot be read ---------------------------------------------------------------------------------------


def explain_unreadable(name: str, error: OSError) -> str:
    """One sentence on why the file cannot be read and one on what to do."""
    path = Path(name)
    if isinstance(error, FileNotFoundError):
        if not path.parent.is_dir():
            return f"{name} does not exist, nor does its folder {path.parent}. Check the path."
        near = difflib.get_close_matches(path.name, _list_names(path.parent), n=1)
        return f"{name} does not exist. " + (f"Did you mean {path.with_name(near[0])}?" if near else "Check the path.")
    if isinstance(error, PermissionError):
        return f"{name} may not be read by this user. Change its permissions: chmod u+r {name}"
    return f"{name} cannot be read: {error.strerror or error}. Check the disk and the path."


def _list_names(folder: Path) -> list[str]:
    """Names in the folder, sorted; none when it may not be listed: they only serve to suggest."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
