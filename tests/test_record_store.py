"""Many rows lie on the disk: the same rows, in the same order, in memory that does not grow with them."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from weitiao import dataset as dataset_module
from weitiao.data import json_rows, record_store
from weitiao.data.options import ReadOptions
from weitiao.data.record_store import RecordStore, RowKeeper, select_rows
from weitiao.data.records import Record, read_records, take_records
from weitiao.dataset import Dataset, load_dataset
from weitiao.errors import DataError
from weitiao.recipe import make_recipe

LABELS = ("体育", "科技", "财经")
TOOL = {"name": "f", "description": "天气", "parameters": {"type": "object", "properties": {}}}
ROWS: dict[str, tuple[str, ReadOptions]] = {
    "context_target": (
        json.dumps({"context": "Instruction: 答。\nInput: 问？\n\n文😀\u2028本\nAnswer: ", "target": [], "task": "t"}),
        ReadOptions(),
    ),
    "alpaca": (
        json.dumps({"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]], "n": 0.1}),
        ReadOptions(),
    ),
    "tools": (
        json.dumps({
            "messages": [
                {"role": "user", "content": "北京天气如何？"},
                {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": {"b": 1, "a": 2}}},
                {"role": "tool", "content": "晴"},
                {"role": "assistant", "content": "晴天。"},
            ],
            "tools": [TOOL],
        }),
        ReadOptions(),
    ),
    "placeholders": (
        json.dumps({"instruction": "你是谁？", "output": "我是 {{name}}，<AUTHOR> 做的。"}),
        ReadOptions(placeholders={"name": "小微", "author": None}, system="你是 {{name}}。"),
    ),
    "prompt": (
        json.dumps({"text": "一场球赛。", "label": "体育"}),
        ReadOptions(format="text_label", prompt="哪一类？\n\n{text}"),
    ),
}  # fmt: skip


def write(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def label_rows(count: int) -> list[str]:
    return [
        json.dumps({
            "context": f"Instruction: 答。\nInput: 选一个标签。\n\n第{number}篇短文。\nAnswer: ",
            "target": json.dumps([LABELS[number % 3]], ensure_ascii=False),
        })
        for number in range(count)
    ]  # fmt: skip


def stored(folder: Path, *paths: Path, options: ReadOptions | None = None) -> RecordStore:
    keeper = RowKeeper(folder, most_in_memory=0)
    for path in paths:
        take_records(path, keeper.add, options=options or ReadOptions())
    rows = keeper.rows()
    assert isinstance(rows, RecordStore)
    return rows


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_comes_back_as_it_was_read(kind: str, tmp_path: Path) -> None:
    line, options = ROWS[kind]
    path = write(tmp_path / "rows.jsonl", [line])
    assert list(stored(tmp_path, path, options=options)) == read_records(path, options=options)


def test_rows_of_a_table_come_back_as_they_were_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ["text,label", '"一场, ""球赛""。",体育', "新电池。,科技"])
    rows = stored(tmp_path, path)
    assert list(rows) == read_records(path)
    assert rows[1].source == f"{path}:3"


def test_rows_of_several_sources_are_made_by_what_read_them(tmp_path: Path) -> None:
    (named, options), (asked, other) = ROWS["placeholders"], ROWS["prompt"]
    one, two = write(tmp_path / "a.jsonl", [named, named]), write(tmp_path / "b.jsonl", [asked])
    keeper = RowKeeper(tmp_path, most_in_memory=1)
    take_records(one, keeper.add, options=options)
    take_records(two, keeper.add, options=other)
    assert list(keeper.rows()) == [*read_records(one, options=options), *read_records(two, options=other)]


def test_a_store_is_a_sequence_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", label_rows(40))
    rows, known = stored(tmp_path, path), read_records(path)
    assert len(rows) == 40
    assert list(rows) == known
    assert (rows[-1], rows[7]) == (known[-1], known[7])
    assert list(rows[5:30:7]) == known[5:30:7]
    assert list(rows[5:30][-3:]) == known[27:30]
    assert list(select_rows(rows, [9, 2, 2])) == [known[9], known[2], known[2]]
    assert select_rows(rows, range(40)) is rows
    for beyond in (40, -41):
        with pytest.raises(IndexError):
            _ = rows[beyond]


def test_few_rows_stay_in_memory_and_leave_the_disk_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", label_rows(10))
    keeper = RowKeeper(tmp_path / "none", most_in_memory=10)
    take_records(path, keeper.add)
    assert keeper.rows() == tuple(read_records(path))
    assert not (tmp_path / "none").exists()


def test_the_file_of_rows_has_no_name_and_so_never_stays_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", label_rows(10))
    rows = stored(tmp_path / "spool", path)
    assert len(rows) == 10
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    rows = RecordStore(tmp_path)
    os.dup2(os.open("/dev/full", os.O_WRONLY), rows._descriptor)
    path = write(tmp_path / "rows.jsonl", label_rows(1))
    take_records(path, rows.add)
    with pytest.raises(DataError, match=r"the disk is full.*WEITIAO_CACHE"):
        rows.flush()


# ---- whole data sets -----------------------------------------------------------------------------------------------


def load(train: Any, **data: Any) -> Dataset:
    return load_dataset(make_recipe({"name": "t", "model": "starter", "data": {"train": train, "held_out": 0, **data}}))


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Every set of rows lies on the disk once it is switched on by `set_kept`."""
    monkeypatch.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    return monkeypatch


@pytest.mark.parametrize("data", [{}, {"held_out": 0.2}, {"dev": "dev.jsonl"}, {"limited": 25}])
def test_a_data_set_on_the_disk_is_the_one_in_memory(
    data: dict[str, Any], on_disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_disk.chdir(tmp_path)
    lines = label_rows(60)
    lines[40:42] = lines[3], lines[3]
    lines[50] = lines[50].replace("[", "[ ", 1)
    write(tmp_path / "train.jsonl", lines)
    write(tmp_path / "dev.jsonl", label_rows(70)[60:])
    train: Any = "train.jsonl"
    if limit := data.pop("limited", None):
        train = [{"path": "train.jsonl", "limit": limit}]
    known = load(train, **data)
    on_disk.setattr(record_store, "KEPT_IN_MEMORY", 5)
    found = load(train, **data)
    assert isinstance(known.train, tuple)
    assert not isinstance(found.train, tuple)
    assert (tuple(found.train), tuple(found.dev)) == (known.train, tuple(known.dev))
    parts = ("weights", "tasks", "train_tasks", "dev_tasks", "notes", "fingerprint")
    assert [getattr(found, part) for part in parts] == [getattr(known, part) for part in parts]


def test_problems_of_rows_on_the_disk_are_named_as_in_memory(on_disk: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = label_rows(30)
    lines[20] = lines[4].replace("\\u79d1\\u6280", "\\u4f53\\u80b2")
    assert lines[20] != lines[4]
    train = str(write(tmp_path / "train.jsonl", lines))
    dev = str(write(tmp_path / "dev.jsonl", [label_rows(3)[2]]))
    complaints = []
    for kept in (1000, 5):
        on_disk.setattr(record_store, "KEPT_IN_MEMORY", kept)
        with pytest.raises(DataError) as caught:
            load(train, dev=dev)
        complaints.append(str(caught.value))
    assert complaints[0] == complaints[1]
    assert "2 of 31 rows" in complaints[0]


def test_labels_that_the_sample_does_not_show_are_known_all_the_same(
    on_disk: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = label_rows(90)
    for place in (11, 47, 83):
        lines[place] = lines[place].replace(json.dumps(LABELS[place % 3])[1:-1], json.dumps("天气")[1:-1])
    path = str(write(tmp_path / "rows.jsonl", lines))
    whole = load(path)
    on_disk.setattr(dataset_module, "SAMPLED_ROWS", 12)
    seen = {record.source.rpartition(":")[2] for record in dataset_module._sample(_mixture(path), 42)}
    assert not seen & {"12", "48", "84"}, "the sample does not hold them, else this shows nothing"
    assert load(path).tasks[0].form.labels == whole.tasks[0].form.labels == tuple(sorted((*LABELS, "天气")))


def _mixture(path: str) -> dataset_module.Mixture:
    return dataset_module.Mixture(train=tuple(read_records(path)), weights=(), dev=(), left_out=())


def test_an_answer_that_fits_nothing_is_an_error_from_a_sample_too(on_disk: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = label_rows(90)
    row = json.loads(lines[30])
    lines[30] = json.dumps({**row, "target": '{"label": "体育"}'})
    path = str(write(tmp_path / "rows.jsonl", lines))
    on_disk.setattr(dataset_module, "SAMPLED_ROWS", 12)
    with pytest.raises(DataError, match=r"^1 of 90 rows") as caught:
        load(path)
    assert [problem.source for problem in caught.value.problems] == [f"{path}:31"]


def test_memory_hardly_grows_with_the_rows(on_disk: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_disk.setattr(record_store, "KEPT_IN_MEMORY", 200)
    on_disk.setattr(record_store, "_BLOCK_BYTES", 1 << 14)
    on_disk.setattr(record_store, "PART_ROWS", 100)
    on_disk.setattr(json_rows, "BLOCK_BYTES", 1 << 14)
    on_disk.setattr(dataset_module, "SAMPLED_ROWS", 200)
    peaks = []
    for count in (1_000, 5_000):
        path = write(tmp_path / f"{count}.jsonl", label_rows(count))
        tracemalloc.start()
        rows = load(str(path)).train
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows) == count
    per_row = (peaks[1] - peaks[0]) / 4_000
    assert per_row < 250, f"{per_row:.0f} bytes more for each row: a record in memory takes about 2,000"


def test_the_same_record_is_read_by_many_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = write(tmp_path / "rows.jsonl", label_rows(300))
    rows, known = stored(tmp_path, path), read_records(path)
    with ThreadPoolExecutor(4) as pool:
        found: list[Record] = list(pool.map(rows.__getitem__, [*range(300)] * 3))
    assert found == known * 3
