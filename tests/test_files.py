"""Every kind of file, folder, pattern and id that rows are read from, whole and damaged."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from test_formats import ROWS
from weitiao.data.options import ReadOptions
from weitiao.data.raw_rows import RowCount
from weitiao.data.record import Record
from weitiao.data.records import digest_records, iter_records_or_problems, read_records
from weitiao.errors import DataError, Problem

openpyxl = pytest.importorskip("openpyxl", reason="spreadsheets need weitiao[files]")
zstandard = pytest.importorskip("zstandard", reason="Zstandard needs weitiao[files]")

PAIRS = [
    {"context": "第一问，\n“引号”,\t\"quote\"", "target": "答一"},
    {"context": "第二问", "target": "答二😀"},
    {"context": "=1+1", "target": "3"},
]  # fmt: skip
CHATS = [ROWS["messages"], ROWS["messages"] | {"tools": [{"name": "weather", "parameters": {"type": "object"}}]}]


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()})
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    every = [{name: row.get(name) for name in names} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(every), buffer)
    return buffer.getvalue()


def workbook(rows: list[dict[str, Any]], sheet: str = "数据") -> bytes:
    book = openpyxl.Workbook()
    book.active.title = sheet
    names = list(dict.fromkeys(key for row in rows for key in row))
    book.active.append(names)
    for row in rows:
        values = [row.get(name) for name in names]
        book.active.append([json.dumps(v) if isinstance(v, list | dict) else v for v in values])
        for cell in book.active[book.active.max_row]:
            cell.data_type = "s" if isinstance(cell.value, str) else cell.data_type  # "=1+1" as text, no formula
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": json_lines,
    "rows.ndjson": json_lines,
    "rows.txt": json_lines,
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows, "note": []}, indent=1).encode(),
    "line.json": lambda rows: json.dumps({"data": rows}).encode(),
    "rows.csv": table,
    "rows.tsv": lambda rows: table(rows, "\t"),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + table(rows),
    "rows.parquet": parquet,
    "rows.xlsx": workbook,
    "rows.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "rows.csv.gz": lambda rows: gzip.compress(table(rows)),
    "rows.jsonl.zst": lambda rows: zstandard.compress(json_lines(rows)),
    "rows.json.zst": lambda rows: zstandard.compress(json.dumps(rows).encode()),
    "frames.jsonl.zst": lambda rows: b"".join(zstandard.compress(json_lines([row])) for row in rows),
}


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def read_counted(path: str | Path, **options: Any) -> tuple[list[Record], list[Problem], RowCount]:
    count = RowCount()
    items = list(iter_records_or_problems(path, options=ReadOptions(**options), count=count))
    found = [item for item in items if isinstance(item, Record)]
    problems = [item for item in items if isinstance(item, Problem)]
    assert (count.accepted, count.read) == (len(found), len(found) + count.rejected)
    assert count.rejected == len({problem.source for problem in problems})
    return found, problems, count


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["pairs", "chats"])
def test_every_kind_of_file_gives_the_same_records(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = read_records(write(tmp_path, "expected.jsonl", json_lines(rows)))
    found, problems, _ = read_counted(write(tmp_path, name, KINDS[name](rows)))
    assert problems == [] and digest_records(found) == digest_records(expected)
    assert len({record.source for record in found}) == len(rows)
    assert all(record.source.startswith(f"{tmp_path / name}:") for record in found)


BAD = [PAIRS[0], {"context": "问", "target": " "}, PAIRS[1], {"context": " ", "target": "答"}]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_reports_its_bad_rows_with_their_places(name: str, tmp_path: Path) -> None:
    found, problems, count = read_counted(write(tmp_path, name, KINDS[name](BAD)))
    assert (len(found), count.rejected) == (2, 2)
    assert [problem.field for problem in problems] == ["target", "context"]
    places = [problem.source.removeprefix(f"{tmp_path / name}:") for problem in problems]
    line_of_bad = {"csv": ["4", "6"], "tsv": ["4", "6"], "xlsx": ["row 3", "row 5"]}  # the first cell spans two lines
    ending = name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    by_number = ["row 2", "row 4"] if ending in ("json", "parquet") else ["2", "4"]
    assert places == line_of_bad.get(ending, by_number)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_every_kind_without_rows_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no rows|no name for its column|is not compressed"):
        read_records(write(tmp_path, name, KINDS[name]([])))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.xlsx", "rows.jsonl.gz", "rows.csv.gz", "rows.jsonl.zst"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_file_cut_short_is_an_error_never_a_shorter_file(name: str, share: float, tmp_path: Path) -> None:
    whole = KINDS[name](PAIRS * 40)
    with pytest.raises(DataError) as caught:
        read_records(write(tmp_path, name, whole[: max(9, int(len(whole) * share))]))
    assert name in str(caught.value)


def test_rows_stream_in_bounded_memory(tmp_path: Path) -> None:
    rows = [{"context": hashlib.sha512(bytes(number)).hexdigest() * 30, "target": "A"} for number in range(2000)]
    for name in ("rows.jsonl", "rows.csv", "rows.jsonl.gz", "rows.jsonl.zst"):
        path = write(tmp_path, name, KINDS[name](rows))
        tracemalloc.start()
        try:
            assert sum(1 for _ in iter_records_or_problems(path)) == 2000
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 2_000_000, name  # the rows are 7.7 MB


# --- Tables ----------------------------------------------------------------------------------------------------------

BAD_TABLES: list[tuple[bytes, int, str, str]] = [
    (b"context,target\na\n", 2, "row", "has 1 cells, but the header names 2 columns"),
    (b"context,target\na,b,c\n", 2, "row", "has 3 cells"),
    (b'context,target\n"a,b\nc,d\n', 2, "row", "lines 2 to 3 would be one row"),
    (b'context,target\n"a"x,b\n', 2, "row", "is no row of cells"),
    (b"context,target\n\xc4\xe3,b\n", 2, "context", "holds the byte 0xc4, which is not UTF-8"),
    (b"context,target\na,b\xff\n", 2, "target", "NUL or a byte 0xff"),
    (b"context,target\na,b\0\n", 2, "target", "NUL or a byte 0xff"),
    (b"messages\n[{oops\n", 2, "messages", "is not JSON"),
    (b'messages\n"[{""role"": ""user"", ""content"": 1e999}]"\n', 2, "messages", "is inf"),
]


@pytest.mark.parametrize(("content", "line", "field", "words"), BAD_TABLES)
def test_a_bad_line_of_a_table_is_told_and_the_next_one_read(
    content: bytes, line: int, field: str, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path, "rows.csv", content)
    _, problems, _ = read_counted(path)
    assert (problems[0].source, problems[0].field) == (f"{path}:{line}", field)
    assert words in problems[0].message
    if b'"a,b' not in content and content.startswith(b"context"):  # a quote that is never closed swallows the rest
        found, _, count = read_counted(write(tmp_path, "rows.csv", content + b"x,y\n\n"))
        assert (len(found), count.read) == (1, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"context,context\na,b\n", "names the column 'context' twice"),
        (b"context,\na,b\n", "no name for its column 2"),
        (b"\xc4\xe3,target\na,b\n", "first line that cannot be decoded"),
        (b"context,target\n", "columns' names first"),
        (b"\xff\xfec\0", "UTF-16"),
    ],
)
def test_a_table_without_a_sound_first_line_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_records(write(tmp_path, "rows.csv", content))


def test_gb18030_is_read_when_the_user_says_so_and_only_then(tmp_path: Path) -> None:
    for name in ("rows.csv", "rows.jsonl", "rows.json"):
        path = write(tmp_path, name, KINDS[name](PAIRS[:2]).decode().replace("😀", "镕").encode("gb18030"))
        if name != "rows.json":  # written in ASCII there
            with pytest.raises(DataError, match=r"not UTF-8.*encoding: gb18030"):
                read_records(path)
        found = read_records(path, options=ReadOptions(encoding="gb18030"))
        assert found[1].prompt == "第二问"
    broken = write(tmp_path, "rows.csv", b"context,target\n\x81\x20,b\n")
    assert "not GB18030" in read_counted(broken, encoding="gb18030")[1][0].message


def test_a_sheet_may_be_named_and_numbers_become_text(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["说明"])
    sheet = book.create_sheet("标注")
    for row in ([None, None], ["text", "label", None], ["一", 1], [None, " "], ["二", 2.5], ["三", True]):
        sheet.append(row)
    book.save(tmp_path / "rows.xlsx")
    found, problems, _ = read_counted(tmp_path / "rows.xlsx", sheet="标注")
    assert [(record.source.rpartition(":")[2], record.target) for record in found] == [
        ("row 3", "1"), ("row 5", "2.5"), ("row 6", "true"),
    ]  # fmt: skip
    assert problems == []
    with pytest.raises(DataError, match=r"no sheet 'x'\. Its sheets: Sheet, 标注"):
        read_records(tmp_path / "rows.xlsx", options=ReadOptions(sheet="x"))


def test_keys_that_parquet_adds_to_objects_are_not_there(tmp_path: Path) -> None:
    tools = [{"name": "a", "parameters": {"x": 1}}, {"name": "b", "parameters": {"y": {"z": 2}}}]
    rows = [ROWS["messages"] | {"tools": [tool], "target": {"x": None}} for tool in tools]
    found, _, _ = read_counted(write(tmp_path, "rows.parquet", parquet(rows)))
    assert [record.tools for record in found] == [(tools[0],), (tools[1],)]
    assert found[0].raw["target"] == {"x": None}


def test_parquet_dates_maps_and_bytes(tmp_path: Path) -> None:
    import datetime

    text, numbers = pyarrow.string(), pyarrow.map_(pyarrow.string(), pyarrow.int32())
    columns = {"prompt": text, "response": text, "on": pyarrow.date32(), "map": numbers, "raw": pyarrow.binary()}
    schema = pyarrow.schema(list(columns.items()))
    row = {"prompt": "P", "response": "R", "on": datetime.date(2026, 1, 2), "map": [("a", 1)], "raw": None}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row, row | {"raw": b"x"}], schema), tmp_path / "rows.parquet"
    )
    found, problems, _ = read_counted(tmp_path / "rows.parquet")
    assert found[0].raw == {"prompt": "P", "response": "R", "on": "2026-01-02", "map": {"a": 1}, "raw": None}
    assert [(problem.field, problem.source[-5:]) for problem in problems] == [("raw", "row 2")]


# --- Folders, patterns, endings --------------------------------------------------------------------------------------


def test_a_folder_is_all_its_known_files_by_name(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "c.json.zst", ".hidden.jsonl", "inner/d.jsonl", "notes.md"):
        kind = {"a.jsonl": json_lines, "b.csv": table}.get(name, KINDS["rows.json.zst"])
        write(tmp_path, name, kind(PAIRS[:1]))
    sources = [record.source for record in read_records(tmp_path)]
    assert sources == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.csv:2", f"{tmp_path}/c.json.zst:row 1"]


def test_a_folder_without_rows_or_with_a_list_of_data_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file of rows\. Known endings: \.jsonl"):
        read_records(tmp_path)
    write(tmp_path, "dataset_info.json", b"{}")
    with pytest.raises(DataError, match=r"dataset_info\.json#NAME"):
        read_records(tmp_path)


def test_a_pattern_is_every_file_that_fits(tmp_path: Path) -> None:
    for name in ("part-2.jsonl", "part-1.jsonl", "other.jsonl", "deep/part-3.jsonl"):
        write(tmp_path, name, json_lines(PAIRS[:1]))
    assert [record.source[-14:] for record in read_records(tmp_path / "part-*.jsonl")] == [
        "part-1.jsonl:1",
        "part-2.jsonl:1",
    ]
    assert len(read_records(f"{tmp_path}/**/part-?.jsonl")) == 3
    with pytest.raises(DataError, match="No file fits the pattern"):
        read_records(tmp_path / "*.csv")
    write(tmp_path, "[1].jsonl", json_lines(PAIRS))
    assert len(read_records(tmp_path / "[1].jsonl")) == 3


def test_an_empty_file_of_a_folder_is_named_beside_the_problems_found_before_it(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", b"{}\n")
    write(tmp_path, "b.jsonl", b"")
    with pytest.raises(DataError, match=r"b\.jsonl holds no rows") as caught:
        read_records(tmp_path)
    assert [problem.source for problem in caught.value.problems] == [f"{tmp_path}/a.jsonl:1"]


def test_a_file_that_is_not_what_its_ending_says_is_told(tmp_path: Path) -> None:
    for name, content, words in [
        ("rows.jsonl.gz", json_lines(PAIRS), "not compressed"),
        ("rows.parquet", json_lines(PAIRS), "no Parquet file"),
        ("rows.xlsx", json_lines(PAIRS), "no .xlsx workbook"),
        ("rows.csv", workbook(PAIRS), "ending .xlsx"),
        ("rows.jsonl", parquet(PAIRS), "ending .parquet"),
        ("rows.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "Save it as .xlsx"),
    ]:
        with pytest.raises(DataError, match=words):
            read_records(write(tmp_path, name, content))
    assert len(read_records(write(tmp_path, "rows.jsonl", gzip.compress(json_lines(PAIRS))))) == 3


@pytest.mark.parametrize(("name", "package"), [("rows.xlsx", "openpyxl"), ("rows.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, name, KINDS[name](PAIRS))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"pip install 'weitiao\[files\]'"):
        read_records(path)


# --- Hubs ------------------------------------------------------------------------------------------------------------


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, *, split: str, streaming: bool) -> Any:
        asked.append((path, split, streaming))
        if split == "nowhere":
            raise ValueError('Unknown split "nowhere".')
        return iter(rows)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hugging_face_id_is_streamed_split_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_datasets(monkeypatch, [PAIRS[0], {"context": "C", "target": None}, PAIRS[1]])
    found, problems, count = read_counted("hf:owner/na-me.x")
    assert [record.source for record in found] == ["hf:owner/na-me.x:train:row 1", "hf:owner/na-me.x:train:row 3"]
    assert [problem.source for problem in problems] == ["hf:owner/na-me.x:train:row 2"] and count.read == 3
    read_counted("hf:owner/name:test")
    assert asked == [("owner/na-me.x", "train", True), ("owner/name", "test", True)]
    with pytest.raises(DataError, match='ValueError: Unknown split "nowhere"'):
        read_records("hf:owner/name:nowhere")
    with pytest.raises(DataError, match="Write hf:OWNER/NAME or"):
        read_records("hf:name")
    fake_datasets(monkeypatch, [])
    with pytest.raises(DataError, match=r"holds no rows\. Name another split"):
        read_records("hf:owner/name")


def test_a_modelscope_id_is_its_files_of_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "train.jsonl",
        "data/train-00001.parquet",
        "test.csv",
        "dataset_infos.json",
        ".msc/x.jsonl",
        "README.md",
    ):
        kind = {".parquet": parquet, ".csv": table}.get(Path(name).suffix, json_lines)
        write(tmp_path, name, kind(PAIRS))
    module = ModuleType("modelscope")
    module.dataset_snapshot_download = lambda name: str(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)
    assert len(read_records("modelscope:owner/name")) == 9
    found = read_records("modelscope:owner/name:train")
    assert {record.source.rpartition(":")[0] for record in found} == {
        f"{tmp_path}/train.jsonl",
        f"{tmp_path}/data/train-00001.parquet",
    }
    with pytest.raises(DataError, match=r"no file of rows for the split dev. Its files: data/train-00001.parquet"):
        read_records("modelscope:owner/name:dev")


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("hf:a/b", "datasets", "hub"), ("modelscope:a/b", "modelscope", "modelscope")]
)
def test_a_missing_hub_package_is_named_with_the_command(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"pip install 'weitiao\[{extra}\]'"):
        read_records(name)


# --- dataset_info.json -----------------------------------------------------------------------------------------------


def info(folder: Path, **entries: Any) -> str:
    return str(write(folder, "dataset_info.json", json.dumps(entries).encode()))


def test_an_alpaca_entry_names_its_columns(tmp_path: Path) -> None:
    row = {"问": "翻译", "输入": "你好", "答": "Hello", "input": "其他"}
    path = write(tmp_path, "mine.json", json.dumps([row, row | {"答": ""}]).encode())
    entry = {"file_name": "mine.json", "columns": {"prompt": "问", "query": "输入", "response": "答", "system": None}}
    del entry["columns"]["system"]  # type: ignore[attr-defined]
    name = info(tmp_path, mine=entry)
    count = RowCount()
    record, problem = iter_records_or_problems(f"{name}#mine", count=count)
    assert isinstance(record, Record) and isinstance(problem, Problem) and count.read == 2
    assert (record.prompt, record.target, record.source) == ("翻译\n你好", "Hello", f"{path}:row 1")
    assert record.raw == row and problem.field == "output"


def test_a_sharegpt_entry_names_its_columns_and_speakers(tmp_path: Path) -> None:
    row = {"talk": [{"who": "Q", "what": "U"}, {"who": "A", "what": "A"}], "sys": "S"}
    write(tmp_path, "mine.jsonl", json_lines([row]))
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "Q", "assistant_tag": "A"}
    entry = {"file_name": "mine.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk", "system": "sys"}}
    (record,) = read_records(f"{info(tmp_path, mine=entry | {'tags': tags})}#mine")
    assert [(message.role, message.text) for message in record.messages] == [("system", "S"), ("user", "U")]
    with pytest.raises(DataError, match=r"talk\[0\]: has the speaker `Q`, which the entry's tags do not name"):
        read_records(f"{info(tmp_path, mine=entry | {'tags': {**tags, 'user_tag': 'X'}})}#mine")


def test_a_plain_entry_a_folder_and_a_hub_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"instruction": "I", "output": "O"}
    write(tmp_path, "folder/a.jsonl", json_lines([row]))
    name = info(tmp_path, here={"file_name": "folder"}, there={"hf_hub_url": "a/b", "split": "test"})
    assert len(read_records(f"{name}#here")) == 1
    asked = fake_datasets(monkeypatch, [row])
    assert read_records(f"{name}#there")[0].source == "hf:a/b:test:row 1" and asked == [("a/b", "test", True)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "x.json", "ranking": True}, "preference pairs cannot be learnt from"),
        ({"file_name": "x.json", "columns": {"chosen": "c"}}, "`chosen`, which cannot be honoured"),
        ({"file_name": "x.json", "colums": {}}, r"Did you mean columns\?"),
        ({"script_url": "x"}, "`script_url`, which cannot be honoured"),
        ({"file_name": "x.json", "formatting": "openai"}, "not alpaca or sharegpt"),
        ({"file_name": "x.json", "tags": {"role_tag": "r"}}, "`role_tag`, which cannot be honoured"),
        ({"file_name": "x.json", "columns": ["a"]}, "not names by name"),
        ({"file_name": "x.json", "num_samples": 10}, "`num_samples`"),
        ({}, "must say where its rows are"),
        ({"file_name": "x.json", "hf_hub_url": "a/b"}, "must say where its rows are by one of"),
        ({"file_name": "x.json", "split": "test"}, "which a file does not have"),
        ({"file_name": "x.json", "file_sha1": "00"}, "SHA-1"),
        ("x.json", "is text, not an object"),
    ],
)
def test_an_entry_that_cannot_be_honoured_is_refused(entry: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path, "x.json", b"[]")
    with pytest.raises(DataError, match=words):
        read_records(f"{info(tmp_path, mine=entry)}#mine")


def test_an_entry_whose_file_is_the_right_one_is_read(tmp_path: Path) -> None:
    content = json_lines([{"instruction": "I", "output": "O"}])
    write(tmp_path, "x.jsonl", content)
    name = info(tmp_path, mine={"file_name": "x.jsonl", "file_sha1": hashlib.sha1(content).hexdigest()})
    assert len(read_records(f"{name}#mine")) == 1


def test_the_name_of_an_entry_is_asked_for_and_suggested(tmp_path: Path) -> None:
    name = info(tmp_path, identity={"file_name": "x.json"})
    with pytest.raises(DataError, match=r"Name an entry: .*#NAME\. Its entries: identity"):
        read_records(name)
    with pytest.raises(DataError, match=r"no entry 'identitty'. Did you mean #identity\?"):
        read_records(f"{name}#identitty")
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "no" / "dataset_info.json#x")
    write(tmp_path, "dataset_info.json", b"[1]")
    with pytest.raises(DataError, match="is a list, not an object"):
        read_records(f"{name}#x")
    write(tmp_path, "dataset_info.json", b"{oops")
    with pytest.raises(DataError, match="is not JSON"):
        read_records(f"{name}#x")


# --- Placeholders ----------------------------------------------------------------------------------------------------


def test_placeholders_are_filled_in_every_spelling_and_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": "{{ Name }}是谁？", "response": "我是{{NAME}}，<AUTHOR>的<NAME>。<name> {x} {{1}}"}]
    options = ReadOptions(placeholders={"name": "小微", "author": "我们"})
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.xlsx", "rows.jsonl.gz"):
        (record,) = read_records(write(tmp_path, name, KINDS[name](rows)), options=options)
        assert (record.prompt, record.target) == ("小微是谁？", "我是小微，我们的小微。<name> {x} {{1}}")
        assert record.raw["prompt"] == "{{ Name }}是谁？"


def test_every_unfilled_placeholder_is_named_and_may_be_declared_text(tmp_path: Path) -> None:
    row = {"prompt": "{{name}} {{word}}", "response": [{"a": "<AUTHOR>"}], "note": "{{unread}}"}
    path = write(tmp_path, "rows.jsonl", json_lines([row]))
    _, problems, _ = read_counted(path, placeholders={"name": "小微"})
    assert [problem.message for problem in problems] == [
        "holds the placeholder {{word}}, which nothing fills.",
        "holds the placeholder <AUTHOR>, which nothing fills.",
    ]
    assert "placeholders: {word: …}" in problems[0].fix
    (record,) = read_records(path, options=ReadOptions(placeholders={"name": "小微", "word": None, "author": None}))
    assert (record.prompt, record.target) == ("小微 {{word}}", [{"a": "<AUTHOR>"}])


def test_placeholders_of_the_recipes_own_templates_are_filled_and_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", json_lines([{"prompt": "P", "response": "R"}]))
    known = {"name": "小微"}
    (record,) = read_records(
        path, options=ReadOptions(system="你是{{name}}", prompt="{{name}}，{prompt}", placeholders=known)
    )
    assert [message.text for message in record.messages] == ["你是小微", "小微，P"]
    _, problems, _ = read_counted(path, system="你是{{name}}")
    assert "{{name}}" in problems[0].message
