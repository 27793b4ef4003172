"""How a run's rows were asked, kept for later: new rows are asked as the rows were that the model learnt from.

    kept = describe_sources([("labels.csv", ReadOptions(prompt="哪一类？\\n\\n{text}"))])     when a run is trained
    read_like(kept, "new.jsonl")                                                             when it is used

Placeholders, prompt, system message, format and sheet are kept. The encoding is not: GB18030 read as UTF-8 is an error
that says so, UTF-8 read as GB18030 would be garbage in silence.

Where the sources differ in prompt or system message, a row is asked as the sources with rows of its format were. Where
these still differ, nothing is guessed: it is a problem until the user says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weitiao.data.files import iter_raw_rows
from weitiao.data.formats import recognise_format
from weitiao.data.options import Encoding, ReadOptions
from weitiao.data.raw_rows import RawRow, RowCount
from weitiao.data.record import Record, shown
from weitiao.data.records import RowConverter, iter_records_or_problems, read_records, refuse_problems
from weitiao.errors import Problem

_KEPT = ("format", "prompt", "system", "sheet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What the user says of a file of rows; None, as the run's own rows were read."""

    format: str | None = None
    prompt: str | None = None
    """An empty text: as the format asks."""
    system: str | None = None
    """An empty text: none but the rows' own."""
    encoding: Encoding = "utf-8"
    sheet: str | None = None


def describe_sources(sources: Sequence[tuple[str, ReadOptions]]) -> dict[str, Any]:
    """What is kept of a run's sources, ready for JSON; sources that are read alike are one entry.

    The formats of their rows are looked at only where they say which of several prompts or system messages is meant.

        {"placeholders": {"name": "小微"}, "sources": [{"format": None, "prompt": "…", …, "formats": ["text_label"]}]}
    """
    assert sources, "a run has rows"
    entries: dict[tuple[str | None, ...], dict[str, Any]] = {}
    differ = len({(options.prompt, options.system) for _, options in sources}) > 1
    for path, options in sources:
        kept = {key: getattr(options, key) for key in _KEPT}
        entry = entries.setdefault(tuple(kept.values()), {**kept, "formats": []})
        if differ:
            entry["formats"] = sorted({*entry["formats"], *_formats_of(path, options)})
    return {"placeholders": dict(sources[0][1].placeholders), "sources": list(entries.values())}


def _formats_of(path: str, options: ReadOptions) -> Iterator[str]:
    for item in iter_records_or_problems(path, options=options):
        if isinstance(item, Record):
            yield _format_of(item, options) or ""


def _format_of(record: Record, options: ReadOptions) -> str | None:
    return options.format or recognise_format(record.raw)


def read_like(
    kept: Mapping[str, Any], path: str | os.PathLike[str], *, said: Said | None = None, require_target: bool = True
) -> list[Record]:
    """The records of a source, asked as the sources in `kept` were, or as `said`.

    Raises one DataError with every problem of every row, those included that could be asked in several ways.
    """
    reader = LikeReader(kept, path, said=said, require_target=require_target)
    if len(reader.ways) == 1:
        return read_records(path, require_target=require_target, options=reader.ways[0].options)
    records: list[Record] = []
    problems: list[Problem] = []
    count = RowCount()
    for row in reader.rows(count):
        chosen = reader.convert(row)
        if isinstance(chosen, Record):
            count.accepted += 1
            records.append(chosen)
        else:
            count.rejected += 1
            problems += chosen
    count.check()
    refuse_problems(path, count, problems)
    return records


class LikeReader:
    """A source read a row at a time, each row asked as the sources in `kept` were, or as `said`.

    The same rows become the same records in another process too, which the reader may be sent to.
    """

    def __init__(
        self,
        kept: Mapping[str, Any],
        path: str | os.PathLike[str],
        *,
        said: Said | None = None,
        require_target: bool = True,
    ) -> None:
        """Raises DataError as `RowConverter`."""
        self.ways = [
            _Way(options, tuple(formats), RowConverter(path, require_target=require_target, options=options))
            for options, formats in _ways(kept, said or Said())
        ]

    def rows(self, count: RowCount) -> Iterator[RawRow]:
        """The source's rows in order; `count` counts them as read."""
        first = self.ways[0].converter  # the ways differ in what is asked, not in how files are read
        return iter_raw_rows(first.path, first.options, count)

    def convert(self, row: RawRow) -> Record | list[Problem]:
        """The row's record, or all its problems, that it could be asked in several ways among them."""
        if len(self.ways) == 1:
            return self.ways[0].converter.convert(row)
        return _choose([(way.converter.convert(row), way.options, way.formats) for way in self.ways])


@dataclass(frozen=True, slots=True)
class _Way:
    """One way in which rows may be asked, and the formats of the rows that were asked so."""

    options: ReadOptions
    formats: Sequence[str]
    converter: RowConverter


_Row = Record | list[Problem]


def _ways(kept: Mapping[str, Any], said: Said) -> list[tuple[ReadOptions, Sequence[str]]]:
    """The different ways in which a row may be asked, each with the formats of the rows that were asked so."""
    sources = kept.get("sources") or [{**dict.fromkeys(_KEPT), "formats": []}]
    agreed = {key: sources[0][key] if len({source[key] for source in sources}) == 1 else None for key in _KEPT}
    ways: dict[tuple[str | None, str | None], tuple[ReadOptions, list[str]]] = {}
    for source in sources:
        prompt = source["prompt"] if said.prompt is None else said.prompt or None
        system = source["system"] if said.system is None else said.system or None
        options = ReadOptions(
            format=said.format or agreed["format"],
            prompt=prompt,
            system=system,
            encoding=said.encoding,
            sheet=said.sheet or agreed["sheet"],
            placeholders=kept.get("placeholders", {}),
        )
        ways.setdefault((prompt, system), (options, []))[1].extend(source["formats"])
    return list(ways.values())


def _choose(read: Sequence[tuple[_Row, ReadOptions, Sequence[str]]]) -> _Row:
    """The one way in which the row was asked in training, or its problems."""
    records = [(row, options, formats) for row, options, formats in read if isinstance(row, Record)]
    if not records:
        return read[0][0]
    name = _format_of(records[0][0], records[0][1])
    taught = [each for each in records if name in each[2]] or records
    if all(each[0].messages == taught[0][0].messages for each in taught):
        return taught[0][0]
    prompts = {options.prompt for _, options, _ in taught}
    key = "prompt" if len(prompts) > 1 else "system"
    values = [options.prompt if key == "prompt" else options.system for _, options, _ in taught]
    known = " or ".join("none" if value is None else shown(value) for value in dict.fromkeys(values))
    what = "prompt templates" if key == "prompt" else "system messages"
    return [
        Problem(
            source=taught[0][0].source,
            field=key,
            message=f"the run learnt such rows with several {what}: {known}.",
            fix=f'Say which is meant: --{key} "…", or --{key} "" for none.',
        )
    ]
