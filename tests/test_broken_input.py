"""Broken rows and broken files of every format and kind: only DataError leaves the reader, and no row is lost.

Whatever is put in, the rows read are the records handed out and the rows reported. The rows are broken by hand (every
place of a good row of every format, taken away or given a value of another kind) and by Hypothesis.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_files import KINDS, PAIRS, json_lines
from test_formats import ROWS, TOOL_TALKS
from weitiao.data.options import ReadOptions
from weitiao.data.raw_rows import RowCount
from weitiao.data.record import Record
from weitiao.data.records import digest_records, iter_records_or_problems
from weitiao.errors import DataError, Problem

fuzzed = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
GOOD_ROWS = [*ROWS.values(), *TOOL_TALKS.values()]
FORMAT_NAMES = [None, *ROWS]


def read_soundly(path: Path, options: ReadOptions, *, require_target: bool = True) -> tuple[int, int] | None:
    """How many rows were accepted and how many reported; None where the file as a whole was refused."""
    count = RowCount()
    records: list[Record] = []
    problems: list[Problem] = []
    try:
        for item in iter_records_or_problems(path, options=options, require_target=require_target, count=count):
            (records if isinstance(item, Record) else problems).append(item)  # type: ignore[arg-type]
    except DataError as error:
        str(error).encode()
        return None
    assert count.read == count.accepted + count.rejected == len(records) + len({p.source for p in problems})
    digest_records(records)
    for record in records:
        assert record.text_span is None or record.prompt[slice(*record.text_span)] == record.text
        json.dumps([record.target, record.calls and record.calls[0].arguments], allow_nan=False).encode()
        for message in record.messages:
            message.text.encode()
    for problem in problems:
        str(problem).encode()
        assert problem.source.startswith(str(path)) and problem.message.strip() and problem.fix.strip()
    return len(records), count.rejected


# --- By hand: every place of every row -------------------------------------------------------------------------------

REMOVED = object()
OTHER_VALUES: list[Any] = [
    REMOVED, None, "", " \n", "文", 0, -1, 3.5, True, False, [], {}, ["x"], [[]], [None], [{}], {"a": None}, {"": ""},
    "\0", "\ud800", float("nan"), float("inf"), "{", "[1", '{"name": 1}', "{{word}}", "x" * 3000,
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*at, key))


def with_value(row: dict[str, Any], at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(row)
    holder: Any = changed
    for step in at[:-1]:
        holder = holder[step]
    if value is REMOVED:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return changed


BROKEN = [
    (f"{name}-{'.'.join(map(str, at))}", [with_value(row, at, value) for value in OTHER_VALUES])
    for name, row in {**ROWS, **TOOL_TALKS}.items()
    for at in places(row)
]


def test_the_corpus_is_large() -> None:
    assert len(BROKEN) >= 200


@pytest.mark.parametrize(("name", "rows"), BROKEN, ids=[name for name, _ in BROKEN])
def test_a_row_with_one_place_broken_is_a_record_or_a_problem(name: str, rows: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    for format in (None, name.partition("-")[0] if name.partition("-")[0] in ROWS else None):
        for require_target in (True, False):
            outcome = read_soundly(path, ReadOptions(format=format), require_target=require_target)
            assert outcome is not None and sum(outcome) == len(rows)
            assert outcome[1] >= 4  # NUL, half a character, NaN and infinity are never accepted


@pytest.mark.parametrize("name", FORMAT_NAMES[1:])
def test_rows_of_any_format_read_as_any_other_are_reported(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([*GOOD_ROWS, {}]) + b'3\nnull\n[]\n"x"\n')
    outcome = read_soundly(path, ReadOptions(format=name, prompt="{text}"))
    assert outcome is not None and sum(outcome) == len(GOOD_ROWS) + 5


# --- By hand: files --------------------------------------------------------------------------------------------------

BROKEN_BYTES = [
    b"", b"\n", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"[", b"]", b"[]", b"{}", b"null", b"[[", b"[{]",
    b"{}{}", b"[,]", b"[1,]", b'{"data": [', b'{"data": [1]', b'{"data": [1] x', b'{"data": {}}', b'{"data": [], "b"',
    b'{\n"data"', b'{\n"data": [\n1,\n{}\n], 3}', b'"', b'"\n"', b"a,b\n1", b'a,b\n"1', b"a\tb\n1\t2\t3", b",\n,\n",
    b"a,a\n1,2", b"\r\n\r\n", b"\r", b"a,b\r1,2\r", b"context,target\n\x81\x30,\xff\n", b"PK\x03\x04", b"PAR1",
    b"\x1f\x8b", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\0\0\0\0\0", b"\xd0\xcf\x11\xe0",
    b"1" * 5000, b"[" * 5000, b'{"a":' * 2000, b'"\\ud800"', b"NaN", b"Infinity", b"{'a': 1}", b"// no\n{}",
    b"a,b\n" + b"," * 500, b"PAR1PAR1",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_file_of_their_kind_are_refused_or_reported(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    for content in BROKEN_BYTES:
        for encoding in ("utf-8", "gb18030"):
            path.write_bytes(content)
            outcome = read_soundly(path, ReadOptions(encoding=encoding))  # type: ignore[arg-type]
            assert outcome is None or outcome[1] > 0, content


# --- By Hypothesis ---------------------------------------------------------------------------------------------------

letters = st.sampled_from(
    ["a", "文", "😀", "\n", '"', "\\", "{", "}", "{{x}}", "<NAME>", "\ud83d", "\0", "\u2028", ",", "\t"]
)
texts = st.lists(letters, max_size=6).map("".join)
known_keys = sorted({str(step) for row in GOOD_ROWS for at in places(row) for step in at if isinstance(step, str)})
known_values = [reduce(getitem, at, row) for row in GOOD_ROWS for at in places(row)]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | texts | st.sampled_from(known_values),
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.sampled_from(known_keys) | texts, inside, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated_rows(draw: st.DrawFn) -> Any:
    row = copy.deepcopy(draw(st.sampled_from(GOOD_ROWS)))
    for _ in range(draw(st.integers(1, 3))):
        all_places = list(places(row))
        if not all_places:
            break
        at = draw(st.sampled_from(all_places))
        row = with_value(row, at, draw(st.just(REMOVED) | values))
    return row


options = st.builds(
    ReadOptions,
    format=st.sampled_from(FORMAT_NAMES),
    prompt=st.none() | st.sampled_from(["{text}", "{prompt}\n\n{text}", "{{name}}", "{text}{x}"]),
    system=st.none() | st.just("你是{{name}}"),
    placeholders=st.sampled_from([{}, {"name": "小微"}, {"name": None, "X": "文", "author": "{{name}}"}]),
)


@fuzzed
@given(rows=st.lists(mutated_rows(), min_size=10, max_size=30), options=options, require_target=st.booleans())
def test_mutated_rows_are_records_or_problems(
    rows: list[Any], options: ReadOptions, require_target: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = read_soundly(folder / "rows.jsonl", options, require_target=require_target)
    assert outcome is not None and sum(outcome) == len(rows)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert read_soundly(folder / "rows.json", options, require_target=require_target) == outcome


@fuzzed
@given(rows=st.lists(values, min_size=1, max_size=10))
def test_any_json_values_are_records_or_problems(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = read_soundly(path, ReadOptions())
    assert outcome is not None and sum(outcome) == len(rows)


CONTENTS = {kind: write(PAIRS) for kind, write in KINDS.items()}  # once: a workbook holds the time it was made at


@fuzzed
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), encoding=st.sampled_from(["utf-8", "gb18030"]))
def test_files_with_flipped_and_missing_bytes_are_refused_or_read_soundly(
    data: st.DataObject, kind: str, encoding: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(CONTENTS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            del content[at : at + data.draw(st.integers(1, 20))]
        if not content:
            break
    path = tmp_path_factory.mktemp("fuzz") / kind
    path.write_bytes(bytes(content))
    read_soundly(path, ReadOptions(encoding=encoding))
