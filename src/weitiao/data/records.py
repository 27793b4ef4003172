"""Sources of labelled rows → `Record`s, strictly: every bad row is reported with place, field and fix, none skipped.

    read_records("train.jsonl")              all records, or one DataError with every problem
    iter_records_or_problems("big.jsonl")    the same one at a time, in memory of one row
    digest_records(records)                  the data's fingerprint

Which kinds of files there are is the business of files.py, which keys a row may have that of formats.py. Repeated keys,
NaN, broken characters and anything else that a lenient reader would settle by guessing are refused. That every row
read is handed out, as a record or as its problems, is counted and asserted here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from weitiao.data.dataset_info import is_info_entry, read_info_entry
from weitiao.data.files import iter_raw_rows
from weitiao.data.formats import check_format_name, row_to_record
from weitiao.data.options import DEFAULT_OPTIONS, ReadOptions
from weitiao.data.placeholders import by_small_letters, fill_placeholders, find_unfilled
from weitiao.data.raw_rows import RawRow, RowCount
from weitiao.data.record import Record, Target
from weitiao.errors import DataError, Problem

__all__ = ["ReadOptions", "Record", "RowCount", "Target", "digest_records", "iter_records_or_problems", "read_records"]

_DIGEST_ENCODER = json.JSONEncoder(separators=(",", ":"))
"""Made once: json.dumps would make one for every row."""


def read_records(
    path: str | os.PathLike[str], *, require_target: bool = True, options: ReadOptions = DEFAULT_OPTIONS
) -> list[Record]:
    """All records of a source, in order: a file, a folder, a pattern, or the id of a data set.

    With ``require_target=False`` (prediction input) a row may lack its answer. Raises one DataError with every
    problem of every row; also when the source is missing, unreadable or holds no rows.
    """
    records: list[Record] = []
    take_records(path, lambda record, _: records.append(record), require_target=require_target, options=options)
    return records


def take_records(
    path: str | os.PathLike[str],
    take: Callable[[Record, RowConverter], None],
    *,
    require_target: bool = True,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> int:
    """Hand every record of a source to `take`, with what made it; returns how many there were.

    Raises as `read_records`, once all rows were read.
    """
    problems: list[Problem] = []
    count = RowCount()
    converter = RowConverter(path, require_target=require_target, options=options)
    try:
        for item in iter_records_or_problems(path, count=count, converter=converter):
            if isinstance(item, Record):
                take(item, converter)
            else:
                problems.append(item)
    except DataError as error:
        if not problems:
            raise
        raise DataError(str(error), [*problems, *error.problems]) from error  # what was found before it still counts
    refuse_problems(path, count, problems)
    return count.accepted


def refuse_problems(path: str | os.PathLike[str], count: RowCount, problems: Sequence[Problem]) -> None:
    """Return when no row of the source has problems. Raises DataError with all of them."""
    if problems:
        raise DataError(f"{os.fspath(path)}: {count.rejected} of {count.read} rows cannot be used.", problems)


def iter_records_or_problems(
    path: str | os.PathLike[str],
    *,
    require_target: bool = True,
    options: ReadOptions = DEFAULT_OPTIONS,
    count: RowCount | None = None,
    converter: RowConverter | None = None,
) -> Iterator[Record | Problem]:
    """Each row of a source in turn: its record, or each of its problems. `count` is kept up to date where one is given.

    `converter` takes the place of `options` and `require_target` for a caller who needs it later.
    Holds one row in memory (a ``.json`` array is read whole). Raises DataError when a file cannot be opened, is damaged
    or holds no rows, as soon as that comes to light.
    """
    count = RowCount() if count is None else count
    converter = converter or RowConverter(path, require_target=require_target, options=options)
    yield from converter.convert_all(iter_raw_rows(converter.path, converter.options, count), count)
    count.check()


def digest_records(records: Iterable[Record]) -> str:
    """SHA-256 (hexadecimal) over messages, tools, target and task of each record in order.

    The same for a file that was moved, saved with other line ends, or had its row keys reordered; another for any
    change of what is learnt, the key order inside a target included.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(digested_line(record))
    return digest.hexdigest()


def digested_line(record: Record) -> bytes:
    """What `digest_records` digests of a record."""
    turns = [[message.role, message.text] for message in record.messages]
    parts: list[object] = [turns, record.target, record.task]
    marks = [
        [index, [[call.name, call.arguments] for call in message.calls], message.learn]
        for index, message in enumerate(record.messages)
        if message.calls or not message.learn
    ]
    if marks or record.tools or record.calls:  # plain rows keep the digest they always had
        parts += [marks, record.tools, [[call.name, call.arguments] for call in record.calls]]
    return _DIGEST_ENCODER.encode(parts).encode("ascii") + b"\n"


# --- From raw rows to records ----------------------------------------------------------------------------------------


class RowConverter:
    """Makes records of the raw rows of one source, the same for the same row at any time."""

    def __init__(
        self, path: str | os.PathLike[str], *, require_target: bool = True, options: ReadOptions = DEFAULT_OPTIONS
    ) -> None:
        """Raises DataError for an unknown format, or a ``dataset_info.json`` entry that cannot be read."""
        check_format_name(options.format)
        self._known = by_small_letters(options.placeholders)
        self._require_target = require_target
        self.path = os.fspath(path)
        """Where the rows lie: the path given, or the one that its entry names."""
        self.options = _with_filled_templates(options, self._known)
        if is_info_entry(self.path):
            entry = read_info_entry(self.path)
            self.path = entry.path
            self.options = replace(self.options, format=options.format or entry.format, rename=entry.rename)

    def convert_all(self, rows: Iterable[RawRow], count: RowCount) -> Iterator[Record | Problem]:
        """The record of each row, or each of its problems; `count` counts which it was."""
        for row in rows:
            converted = self.convert(row)
            if isinstance(converted, Record):
                count.accepted += 1
                yield converted
            else:
                assert converted, f"{row.source} is neither a record nor a problem"
                count.rejected += 1
                yield from converted

    def convert(self, row: RawRow) -> Record | list[Problem]:
        """The row's record, or all its problems: those of its text and those of its format."""
        if not row.readable:
            return list(row.problems)
        options, known = self.options, self._known
        problems = list(row.problems) if row.problems else []
        if problems and any("inside each other" in problem.message for problem in problems):
            return problems  # too deep to be walked any further
        value = fill_placeholders(row.value, known) if row.marked and known else row.value
        converted: Record | list[Problem] | dict[str, object] = value
        if options.rename is not None and isinstance(value, dict):
            renamed = options.rename(value, row.source)
            if isinstance(renamed, list):
                return problems + renamed
            value = renamed
        converted = row_to_record(value, row.source, options, require_target=self._require_target)
        if isinstance(converted, list):
            return problems + converted
        if row.marked or options.system is not None or options.prompt is not None:
            problems += _unfilled(converted, known)
        if problems:
            return problems
        return converted if converted.raw is row.value else replace(converted, raw=row.value)


def _unfilled(record: Record, known: Mapping[str, str | None]) -> list[Problem]:
    return [
        Problem(
            source=record.source,
            field="placeholders",
            message=f"holds the placeholder {written}, which nothing fills.",
            fix=f"Say under data in the recipe what stands for it, such as placeholders: {{{_bare(written)}: …}}; "
            f"null keeps it as text.",
        )
        for written in find_unfilled(record, known)
    ]


def _bare(written: str) -> str:
    return written.strip("{}<> \t").lower()


def _with_filled_templates(options: ReadOptions, known: Mapping[str, str | None]) -> ReadOptions:
    prompt = fill_placeholders(options.prompt, known)
    system = fill_placeholders(options.system, known)
    return replace(options, prompt=prompt, system=system)
