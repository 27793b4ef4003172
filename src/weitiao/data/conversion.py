"""A source of rows → rows that are kept, part by part: the first in this process, the many that follow on all cores.

    keeper = RowKeeper(folder)
    with Workers() as workers:
        keep_rows("train.jsonl", keeper, workers=workers)

However many processes there are, the rows, their order, what is counted and every problem are the same.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from functools import partial

from weitiao.data.files import RawPart, iter_raw_parts, rows_of
from weitiao.data.options import DEFAULT_OPTIONS, ReadOptions
from weitiao.data.raw_rows import RowCount
from weitiao.data.record import Record
from weitiao.data.record_store import RowKeeper, encode_row
from weitiao.data.records import RowConverter, refuse_problems
from weitiao.data.workers import Workers
from weitiao.errors import DataError, Problem


@dataclass(kw_only=True, slots=True)
class ConvertedPart:
    """What became of the rows of one part."""

    data: bytes = b""
    """The accepted ones, as `encode_row` writes them, one after the other."""
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    """Of each accepted row, in bytes."""
    problems: list[Problem] = field(default_factory=list)
    count: RowCount = field(default_factory=RowCount)


def keep_rows(
    path: str | os.PathLike[str], keeper: RowKeeper, *, options: ReadOptions = DEFAULT_OPTIONS, workers: Workers
) -> int:
    """Hand every labelled row of a source to `keeper`; returns how many there were.

    Raises as `read_records`, once all rows were read; and DataError when the disk is full or a worker dies.
    """
    problems: list[Problem] = []
    count = RowCount()
    converter = RowConverter(path, options=options)
    parts = iter_raw_parts(converter.path, converter.options, count)
    try:
        while not keeper.has_many and count.read <= keeper.most_in_memory:
            if (part := next(parts, None)) is None:
                break
            problems += _keep_part(part, keeper, converter, count)
        for converted in workers.map(partial(convert_part, converter), parts):
            keeper.add_encoded(converted.data, converted.lengths, converter)
            problems += converted.problems
            count.add(converted.count)
    except DataError as error:
        if not problems:
            raise
        raise DataError(str(error), [*problems, *error.problems]) from error  # what was found before it still counts
    count.check()
    refuse_problems(path, count, problems)
    return count.accepted


def _keep_part(part: RawPart, keeper: RowKeeper, converter: RowConverter, count: RowCount) -> list[Problem]:
    """Hand the rows of one part to the keeper as records; returns the problems of the others."""
    problems: list[Problem] = []
    for item in converter.convert_all(rows_of(part, count), count):
        if isinstance(item, Record):
            keeper.add(item, converter)
        else:
            problems.append(item)
    return problems


def convert_part(converter: RowConverter, part: RawPart) -> ConvertedPart:
    """The rows of a part, converted and encoded; only those that are counted here are counted."""
    converted = ConvertedPart()
    written: list[bytes] = []
    for row in rows_of(part, converted.count):
        found = converter.convert(row)
        if isinstance(found, Record):
            written.append(encode_row(row))
        else:
            assert found, f"{row.source} is neither a record nor a problem"
            converted.problems += found
            converted.count.rejected += 1
    converted.count.accepted = len(written)
    converted.lengths = array("Q", map(len, written))
    converted.data = b"".join(written)
    return converted
