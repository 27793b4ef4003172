"""Worker processes give what one process gives, and end in every way that a process can end."""

from __future__ import annotations

import gzip
import json
import math
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from weitiao import dataset as dataset_module
from weitiao.data import json_rows, record_store
from weitiao.data.conversion import keep_rows
from weitiao.data.options import ReadOptions
from weitiao.data.record_store import RowKeeper
from weitiao.data.records import Record, read_records
from weitiao.data.workers import Workers, num_workers
from weitiao.dataset import Dataset, load_dataset
from weitiao.errors import DataError
from weitiao.recipe import make_recipe
from weitiao.render.fitting import Fitting, fit_chunk


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    with Workers(2) as workers:
        yield workers


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Many rows begin at ten, and come in parts of a few."""
    monkeypatch.setattr(record_store, "KEPT_IN_MEMORY", 10)
    monkeypatch.setattr(record_store, "PART_ROWS", 7)
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", 1500)
    return monkeypatch


# ---- the processes ---------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_parts(two: Workers) -> None:
    assert list(two.map(operator.neg, range(50))) == [-number for number in range(50)]


def test_the_parts_are_done_in_several_other_processes(two: Workers) -> None:
    pids = set(two.map(eval, ["(__import__('time').sleep(0.05), __import__('os').getpid())[1]"] * 8))
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_one_part_or_one_worker_needs_no_process() -> None:
    with Workers(2) as workers:
        assert list(workers.map(eval, ["__import__('os').getpid()"])) == [os.getpid()]
    with Workers(1) as workers:
        assert set(workers.map(eval, ["__import__('os').getpid()"] * 3)) == {os.getpid()}


def test_workers_load_neither_torch_nor_what_stands_around_it(two: Workers) -> None:
    modules = ("weitiao.data.conversion", "weitiao.tasks.review", "sys")
    ask = (
        f"[*map(__import__, {modules})][-1].modules.keys() & {{'torch', 'transformers', 'numpy', 'pydantic', 'pytest'}}"
    )
    assert list(two.map(eval, [ask] * 2)) == [set(), set()]


def test_what_fails_in_a_worker_is_seen_here(two: Workers) -> None:
    with pytest.raises(RuntimeError, match=r"In a worker process:(?s:.*)math domain error"):
        list(two.map(math.sqrt, [4.0, -1.0]))
    assert list(two.map(math.sqrt, [4.0, 9.0])) == [2.0, 3.0], "the workers go on"


def test_an_error_of_the_parts_comes_after_the_results_before_it(two: Workers) -> None:
    def parts() -> Iterator[int]:
        yield from range(5)
        raise DataError("no more")

    found: list[int] = []
    with pytest.raises(DataError, match="no more"):
        for result in two.map(operator.neg, parts()):
            found.append(result)
    assert found == [0, -1, -2, -3, -4]


@pytest.mark.parametrize(
    ("function", "argument", "how"),
    [(os._exit, 3, "ended with code 3"), (signal.raise_signal, signal.SIGKILL, r"was ended by SIGKILL .* memory")],
)
def test_a_worker_that_dies_is_an_error_that_says_how(function: Any, argument: int, how: str) -> None:
    with Workers(2) as workers, pytest.raises(DataError, match=rf"{how}.*WEITIAO_WORKERS=1"):
        list(workers.map(function, [argument] * 5))


def test_how_many_workers_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEITIAO_WORKERS", "3")
    assert num_workers() == 3
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("WEITIAO_WORKERS", wrong)
        with pytest.raises(DataError, match="WEITIAO_WORKERS is"):
            num_workers()
    monkeypatch.delenv("WEITIAO_WORKERS")
    assert num_workers() >= 1


# ---- programs that start them ----------------------------------------------------------------------------------------

PROGRAM = """
import os, time
from weitiao.data.workers import Workers
print("top", flush=True)
with Workers(2) as workers:
    ask = "(__import__('time').sleep(0.05), __import__('os').getpid())[1]"
    print(*sorted(set(workers.map(eval, [ask] * 6))), flush=True)
    if os.environ.get("WAIT"):
        print("waiting", flush=True)
        list(workers.map(time.sleep, [2, 2]))
"""


def test_a_script_without_a_guard_and_python_c_are_no_trap(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROGRAM, encoding="utf-8")
    for program in ([str(tmp_path / "script.py")], ["-c", PROGRAM]):
        done = subprocess.run([sys.executable, *program], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split().count("top") == 1, "the program ran once, not once more in each worker"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(end: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "WAIT": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.stdout.readline()
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does on Ctrl-C: the workers get it too
    else:
        os.kill(process.pid, end)
    process.wait(20)
    complaints = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert complaints.count("Traceback") == (1 if end == signal.SIGINT else 0), complaints
    assert complaints.rstrip().endswith("KeyboardInterrupt" if end == signal.SIGINT else "")
    assert not any(map(_is_alive, pids)), "what they were at took two seconds"


def _is_alive(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


# ---- the same rows ---------------------------------------------------------------------------------------------------

LABELS = ("体育", "科技", "财经")


def label_rows(count: int, start: int = 0) -> list[str]:
    return [
        json.dumps(
            {
                "context": f"Instruction: 答。\nInput: 选一个标签。\n\n第{n}则短文。\nAnswer: ",
                "target": json.dumps([LABELS[n % 3]], ensure_ascii=n % 5 == 0),
            },
            ensure_ascii=n % 2 == 0,
        )
        for n in range(start, start + count)
    ]


def spoil(lines: list[str]) -> list[str]:
    """Bad rows of many kinds among good ones."""
    lines = list(lines)
    bad_rows = (
        '{"context": "a"',
        '{"context": 1, "target": "b"}',
        "[]",
        '{"a": NaN}',
        '{"context": "x", "context": "y"}',
        "",
        "  ",
        '{"context": "<NAME>好", "target": "[]"}',
        '{"question": "a", "answer": "\\ud800"}',
        "\x00",
        "7",
    )
    for place, bad in enumerate(bad_rows):
        lines.insert(place * 5 + 3, bad)
    return lines


def sources(folder: Path) -> dict[str, str]:
    """Files of every kind, good and bad, with more rows than are kept in memory."""
    folder.mkdir()
    plain = "\n".join(label_rows(90)) + "\n"
    table = "context,target\n" + "".join(f'"第{n}则。",{LABELS[n % 3]}\n' for n in range(700))
    files: dict[str, str | bytes] = {
        "plain.jsonl": plain,
        "cut.jsonl": plain.rstrip("\n"),
        "windows.jsonl": "\ufeff" + plain.replace("\n", "\r\n"),
        "blank.jsonl": "\ufeff\n\n" + plain.replace("\n", "\n\n"),
        "packed.jsonl.gz": gzip.compress(plain.encode()),
        "array.json": "[" + ",\n".join(label_rows(90)) + "]",
        "table.csv": table,
        "bad.jsonl": "\n".join(spoil(label_rows(90))),
        "bad_array.json": "[" + ",\n".join(label_rows(90)) + "\n, {]",
        "bad_gz.jsonl.gz": gzip.compress(plain.encode())[:-30],
        "bad_table.csv": table + '"a,b\n',
        "gbk.jsonl": (plain + '{"context": "坏", "target": "b"}\n').encode("gb18030"),
        "empty.jsonl": "\n \n",
        "spread.jsonl": "{\n" + plain,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    several = folder / "several"
    several.mkdir()
    (several / "a.jsonl").write_text("\n".join(spoil(label_rows(60))), encoding="utf-8")
    (several / "b.json").write_text("[" + ",".join(label_rows(30, start=60)) + "]", encoding="utf-8")
    (several / "c.jsonl").write_text(plain, encoding="utf-8")
    (several / "d.jsonl").write_text("", encoding="utf-8")
    return {name: str(folder / name) for name in (*files, "several", "missing.jsonl")}


FILLED = ReadOptions(placeholders={"author": "我们"})


def read(path: str) -> list[Record] | str:
    """The rows read one after the other, or the complaint about them."""
    try:
        return read_records(path, options=FILLED)
    except DataError as error:
        return str(error)


def kept(path: str, workers: Workers, folder: Path) -> list[Record] | str:
    keeper = RowKeeper(folder / "rows")
    try:
        count = keep_rows(path, keeper, options=FILLED, workers=workers)
    except DataError as error:
        return str(error)
    assert count == len(keeper)
    return list(keeper.rows())


def test_rows_and_problems_are_those_of_one_process(
    two: Workers, small_parts: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcomes = []
    for name, path in sources(tmp_path / "files").items():
        expected = read(path)
        assert kept(path, Workers(1), tmp_path) == expected, name
        assert kept(path, two, tmp_path) == expected, name
        outcomes.append(type(expected))
    assert outcomes.count(list) >= 6
    assert outcomes.count(str) >= 6


def load(path: str, workers: int, monkeypatch: pytest.MonkeyPatch, **data: Any) -> Dataset:
    monkeypatch.setenv("WEITIAO_WORKERS", str(workers))
    recipe = make_recipe({"name": "t", "model": "starter", "data": {"train": path, **data}})
    return load_dataset(recipe)


@pytest.mark.parametrize("data", [{"held_out": 0}, {"held_out": 0.2}])
def test_a_data_set_is_the_same_with_any_number_of_workers(
    data: dict[str, Any], small_parts: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_parts.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    rows = [*label_rows(90), *label_rows(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    one, other = (load(str(path), count, small_parts, **data) for count in (1, 2))
    small_parts.setattr(record_store, "KEPT_IN_MEMORY", 1000)
    in_memory = load(str(path), 1, small_parts, **data)
    for name in ("tasks", "weights", "notes", "fingerprint", "train_as_written", "dev_as_written"):
        assert getattr(one, name) == getattr(other, name) == getattr(in_memory, name), name
    assert list(one.train) == list(other.train) == list(in_memory.train)
    assert list(one.dev) == list(other.dev) == list(in_memory.dev)
    assert 0 < sum(one.train_as_written) < len(one.train), "some answers are spelled otherwise"
    assert any("more than once" in note for note in one.notes)


def test_bad_answers_are_named_alike_with_any_number_of_workers(
    small_parts: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_parts.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    small_parts.setattr(dataset_module, "SAMPLED_ROWS", 60)
    rows = label_rows(90)
    rows[77] = json.dumps({**json.loads(rows[77]), "target": '{"label": "体育"}'})
    rows.append(json.dumps({**json.loads(rows[1]), "target": json.dumps(["财经"])}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    complaints = []
    for count in (1, 2):
        with pytest.raises(DataError) as caught:
            load(str(path), count, small_parts, held_out=0)
        complaints.append(str(caught.value))
    assert complaints[0] == complaints[1]
    assert complaints[0].startswith("2 of 91 rows cannot be trained on")


def test_answers_known_to_stand_as_written_make_the_same_examples(
    small_parts: pytest.MonkeyPatch, tmp_path: Path, tiny_qwen2_folder: Path
) -> None:
    from weitiao.models.opening import open_renderer

    small_parts.setenv("WEITIAO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(label_rows(60)), encoding="utf-8")
    rows = load(str(path), 1, small_parts, held_out=0)
    how = Fitting(renderer=open_renderer(str(tiny_qwen2_folder)), max_length=500, overlong="error")
    fit = partial(fit_chunk, 0, rows.train, rows.train_tasks, how)
    assert fit(as_written=rows.train_as_written) == fit()
