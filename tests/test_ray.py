"""Answers and trainings spread over a Ray cluster: each row is answered once, whatever dies.

What needs no Ray is tested by itself: rows cut into shards, workers that answer them, shards that are joined. The slow
proofs start two Ray nodes on this machine and kill a worker and a node while 10 000 rows are answered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import light_training, read_lines, refuse, succeed, write_rows
from weitiao.apply import predict_file
from weitiao.cluster.answering import Assignment, Outcome, ShardWorker, answering_key
from weitiao.cluster.session import Machine, share_machines
from weitiao.cluster.shards import LaidAside, Parts, find_damage, join, lay_aside
from weitiao.contract import Contract
from weitiao.data.reading import LikeReader
from weitiao.errors import DataError, RunError
from weitiao.tasks.base import Task

LABELS = ("体育", "科技", "财经")
TEXTS = ("球", "门", "网", "队", "星", "光", "芯", "电", "钱", "股", "税", "账")


def rows_of(first: int, last: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "context": f"Instruction: 回答。\nInput: 选一个标签。\n\n{TEXTS[number % 12]}{number}\nAnswer: ",
            "target": json.dumps([LABELS[number % 12 // 4]], ensure_ascii=False),
            **more,
        }
        for number in range(first, last)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_folder: Path) -> Path:
    """A folder with runs/tiny, a hardly tuned model, and new.jsonl, 40 rows without answers."""
    folder = tmp_path_factory.mktemp("ray")
    write_rows(folder / "train.jsonl", rows_of(0, 24))
    new = [{key: value for key, value in row.items() if key != "target"} for row in rows_of(100, 140)]
    write_rows(folder / "new.jsonl", new)
    settings = ["name=tiny", "model.dtype=float32", "train.epochs=1", "train.compile=never"]
    with pytest.MonkeyPatch.context() as patch, light_training():
        patch.chdir(folder)
        succeed("init", "train.jsonl", "--model", tiny_qwen2_folder, "--force")
        succeed("train", "recipe.yaml", *settings, "train.evaluate_every=never", "data.held_out=0")
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    copy = tmp_path / "work"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(copy)
    with light_training():
        yield copy


def cut(name: str = "new.jsonl", *, rows_per_shard: int = 16, threshold: float | None = None) -> Any:
    """The rows of a file laid in answers.jsonl.parts, and a worker with the run open."""
    run, reader = Path("runs/tiny"), LikeReader(Contract.read(Path("runs/tiny/contract.json")).reading, name,
                                                require_target=False)  # fmt: skip
    parts = Parts(Path("answers.jsonl.parts"))
    parts.folder.mkdir(exist_ok=True)
    key = answering_key(run, threshold=threshold)
    tasks = [Task.from_json(task) for task in Contract.read(run / "contract.json").tasks]
    laid = lay_aside(reader, parts, tasks, name=name, key=key, rows_per_shard=rows_per_shard)
    given = Assignment(run=run, parts=parts, reader=reader, key=key, threshold=threshold, base_model=None)
    return parts, laid, given


def answer_all(laid: LaidAside, given: Assignment) -> list[Outcome]:
    worker = ShardWorker(given)
    assert worker.open() == ""
    return [worker.answer(shard) for shard in laid.shards]


def test_shards_joined_are_what_one_process_answers(work: Path) -> None:
    predict_file("runs/tiny", "new.jsonl", "plain.jsonl", threshold=0.5)
    parts, laid, given = cut(threshold=0.5)
    assert [(shard.first_row, shard.rows) for shard in laid.shards] == [(0, 16), (16, 16), (32, 8)]
    outcomes = answer_all(laid, given)
    assert sum(one.manifest.valid for one in outcomes if one.manifest) == sum(
        line["valid"] for line in read_lines(work / "plain.jsonl")
    )
    assert find_damage(parts, laid.shards) == {}
    join(parts, laid.shards, Path("joined.jsonl"))
    for ours, plain in zip(read_lines(work / "joined.jsonl"), read_lines(work / "plain.jsonl"), strict=True):
        assert ours["confidence"] == pytest.approx(plain["confidence"], rel=1e-4)
        alike = {"confidence": 0, "value_confidence": 0}
        assert {**ours, **alike} == {**plain, **alike}


def test_a_finished_shard_is_not_done_again_and_a_changed_row_has_its_shard_done_again(work: Path) -> None:
    parts, laid, given = cut()
    answer_all(laid, given)
    before = {shard.number: parts.answers_file(shard.number).stat().st_mtime_ns for shard in laid.shards}
    _, again, given = cut()
    assert again.shards == laid.shards
    answer_all(again, given)
    assert before == {shard.number: parts.answers_file(shard.number).stat().st_mtime_ns for shard in laid.shards}
    rows = read_lines(work / "new.jsonl")
    write_rows(work / "new.jsonl", [*rows[:20], {**rows[20], "id": "changed"}, *rows[21:]])
    _, changed, _ = cut()
    assert [parts.finished(shard) is None for shard in changed.shards] == [False, True, False]
    _, other, _ = cut(threshold=0.5)
    assert not any(parts.finished(shard) for shard in other.shards)


def test_damage_of_any_kind_is_found_with_the_rows_named(work: Path) -> None:
    parts, laid, given = cut()
    answer_all(laid, given)
    file = parts.answers_file(1)
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    file.write_bytes(file.read_bytes()[:-1])
    assert find_damage(parts, laid.shards) == {1: "it is not what was written"}
    parts.finish(laid.shards[1], [*lines[:3], lines[4], *lines[4:]])
    assert find_damage(parts, laid.shards) == {
        1: "1 rows have no answer: new.jsonl:20; 1 rows have several: new.jsonl:21"
    }
    parts.finish(laid.shards[1], [lines[1], lines[0], *lines[2:]])
    assert find_damage(parts, laid.shards) == {1: "its answers stand in another order than the rows"}
    file.unlink()
    assert find_damage(parts, laid.shards) == {1: "it is not finished"}


def test_a_worker_on_another_folder_says_so(work: Path) -> None:
    parts, laid, given = cut()
    worker = ShardWorker(given)
    assert worker.open() == ""
    parts.rows_file(1).write_bytes(parts.rows_file(0).read_bytes())
    parts.rows_file(2).unlink()
    for shard in laid.shards[1:]:
        assert "on storage that all of them see" in worker.answer(shard).error
    assert "is another run than where the rows were read" in ShardWorker(replace(given, key="0")).open()
    assert "There is no run folder" in ShardWorker(replace(given, run=Path("runs/none"))).open()


def test_every_bad_row_is_named_before_any_is_answered(work: Path) -> None:
    rows: list[Any] = rows_of(0, 30)
    rows[7] = {"context": 5, "target": "[]"}
    rows[21]["task"] = "no such task"
    write_rows(work / "bad.jsonl", rows)
    with pytest.raises(DataError) as caught:
        cut("bad.jsonl", rows_per_shard=4)
    assert {problem.source for problem in caught.value.problems} == {"bad.jsonl:8", "bad.jsonl:22"}


def test_rows_too_long_for_the_model_are_named_by_the_worker(work: Path) -> None:
    rows = rows_of(0, 4)
    rows[2]["context"] = rows[2]["context"].replace("选一个标签。\n\n", "选一个标签。\n\n" + "球门网队" * 600)
    write_rows(work / "long.jsonl", rows)
    parts, laid, given = cut("long.jsonl", rows_per_shard=2)
    first, second = answer_all(laid, given)
    assert first.manifest is not None
    assert second.manifest is None
    assert [problem.source for problem in second.problems] == ["long.jsonl:3"]
    assert parts.finished(laid.shards[1]) is None


def test_two_processes_do_not_fill_one_folder(work: Path) -> None:
    parts = Parts(Path("answers.jsonl.parts"))
    with parts.locked(), pytest.raises(RunError, match="is being filled by another process"), parts.locked():
        pass
    with parts.locked():
        parts.remove()
    assert not parts.folder.exists()


def test_workers_share_what_the_machines_have() -> None:
    two = [Machine(name="a", cpus=8, gpus=0), Machine(name="b", cpus=4, gpus=0)]
    for workers, cpus in ((None, 4), (1, 8), (3, 4), (4, 2), (5, 2), (12, 1)):
        share = share_machines(two, workers=workers, gpus_per_worker=None)
        assert (share.workers, share.cpus, share.gpus) == (workers or 2, cpus, 0)
    with pytest.raises(RunError, match=r"no room in the cluster for 13 workers with a core each\. It has a: 8 cores"):
        share_machines(two, workers=13, gpus_per_worker=None)
    cards = [Machine(name="a", cpus=16, gpus=2), Machine(name="b", cpus=16, gpus=0)]
    assert share_machines(cards, workers=None, gpus_per_worker=None).workers == 2
    assert share_machines(cards, workers=None, gpus_per_worker=0.5).workers == 4
    assert share_machines(cards, workers=4, gpus_per_worker=0).gpus == 0
    with pytest.raises(RunError, match="no room in the cluster for 3 workers with 1 GPUs each"):
        share_machines(cards, workers=3, gpus_per_worker=None)


def test_options_of_ray_are_refused_without_it(work: Path) -> None:
    told = refuse("predict", "runs/tiny", "new.jsonl", "-o", "out.jsonl", "--workers", 2, "--keep-shards")
    assert "--workers and --keep-shards say how Ray works; add --ray." in told


def test_without_ray_the_command_that_installs_it_is_told(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = refuse("predict", "runs/tiny", "new.jsonl", "-o", "out.jsonl", "--ray")
    assert "pip install 'weitiao[ray]'" in told
    assert not Path("out.jsonl.parts").exists()
