"""Answers and trainings spread over a Ray cluster: each row is answered once, whatever dies.

What needs no Ray is tested by itself: rows cut into shards, workers that answer them, shards that are joined. The slow
proofs start two Ray nodes on this machine and kill a worker and a node while 10 000 rows are answered.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
import yaml
from rich.console import Console

from command_line import light_training, read_lines, refuse, succeed, write_rows
from launching import lines_of, run_of, write_recipe
from ray_nodes import two_nodes
from test_many_processes import agree
from weitiao.apply import predict_file
from weitiao.cli import app
from weitiao.cluster.answering import Assignment, Outcome, ShardWorker, answering_key
from weitiao.cluster.session import Machine, share_machines
from weitiao.cluster.shards import LaidAside, Parts, find_damage, join, lay_aside
from weitiao.contract import Contract
from weitiao.data.reading import LikeReader
from weitiao.errors import DataError, RunError
from weitiao.recipe import load_recipe
from weitiao.runs import RunFolder
from weitiao.tasks.base import Task
from weitiao.tune import tune_model

PATIENCE_SECONDS = 900
"""A start of Ray and of its workers loads torch several times over: half a minute, or minutes on a busy machine."""

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


def test_the_page_about_clusters_shows_yaml_that_names_what_there_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")
    job = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    cluster = job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    pods = [group["template"]["spec"] for group in (head, workers)]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    for pod in pods:
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={cluster['rayVersion']}" in pins.splitlines()
    assert f"--workers {workers['replicas']}" in job["spec"]["entrypoint"]
    words = job["spec"]["entrypoint"].split()
    known = {option for param in typer.main.get_command(app).commands["predict"].params for option in param.opts}
    assert {word.rstrip('"') for word in words if word.startswith("-") and word != "-c"} <= known


# --- With Ray: on this machine, and on two nodes ---------------------------------------------------------------------


@pytest.fixture
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray as a user has it, but with a token of the test's own, which is not written into the home folder."""
    pytest.importorskip("ray", reason="not installed; pip install 'weitiao[ray]'")
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """What a failed test started is ended."""
    yield
    for process in _started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    _started.clear()


def start(*words: object) -> subprocess.Popen[str]:
    """`weitiao WORDS` in a process of its own; what it says comes from its stdout."""
    command = [sys.executable, "-m", "weitiao", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _started.append(process)
    return process


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    """What a process says that ends with `code`."""
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, said
    return said


def wait_for(what: Any, process: subprocess.Popen[str]) -> None:
    """Return once `what` gives something true, while `process` lives."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


def steps_of(run: RunFolder) -> int:
    """How many steps were logged."""
    return len(lines_of(run, "train")) if run.metrics.exists() else 0


def ray_processes(name: str, of: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of Ray below `of` whose titles begin with `name`."""
    found = []
    for child in psutil.Process(of.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(child.cmdline()).startswith(name):
                found.append(child)
    return found


def finished_shards() -> dict[str, int]:
    """Of the shards of answers.jsonl, when their answers were written."""
    parts = Path("answers.jsonl.parts")
    return {one.stem: one.with_suffix(".jsonl").stat().st_mtime_ns for one in parts.glob("shard-*.json")}


def require_every_row_once(answers: Path, rows: int) -> None:
    lines = read_lines(answers)
    assert [line["source"] for line in lines] == [f"many.jsonl:{number + 1}" for number in range(rows)]
    assert all(line["context"].endswith(f"{number}\nAnswer: ") for number, line in enumerate(lines))


@pytest.mark.slow
def test_ten_thousand_rows_are_each_answered_once_though_a_worker_and_a_node_die(
    work: Path, ray_environment: None
) -> None:
    rows = [{"context": row["context"]} for row in rows_of(0, 10_000)]
    write_rows(work / "many.jsonl", rows)
    write_rows(work / "sample.jsonl", rows[:300])
    with two_nodes(cpus=1) as (address, nodes):
        words = ("predict", "runs/tiny", "many.jsonl", "-o", "answers.jsonl", "--ray", "--address", address)
        process = start(*words, "--workers", 2, "--rows-per-shard", 250)
        wait_for(lambda: len(finished_shards()) >= 5, process)
        workers = ray_processes("ray::ShardWorker", nodes)
        assert len(workers) == 2
        workers[0].kill()
        wait_for(lambda: len(finished_shards()) >= 15, process)
        assert len(finished_shards()) < 40
        assert nodes.stdin is not None
        nodes.stdin.write("remove\n")
        nodes.stdin.flush()
        said = finish(process)
    assert "died; they are given to another one" in said
    assert "10000 answers in answers.jsonl" in said
    assert "raylet" not in said
    require_every_row_once(work / "answers.jsonl", 10_000)
    assert not Path("answers.jsonl.parts").exists()
    predict_file("runs/tiny", "sample.jsonl", "plain.jsonl")
    for line, other in zip(read_lines(work / "answers.jsonl"), read_lines(work / "plain.jsonl"), strict=False):
        for key in ("task", "prediction", "answer", "valid", "finish"):
            assert line[key] == other[key]


@pytest.mark.slow
def test_a_prediction_goes_on_after_ctrl_c_and_after_its_own_end(work: Path, ray_environment: None) -> None:
    write_rows(work / "many.jsonl", [{"context": row["context"]} for row in rows_of(0, 2_000)])
    words = ("predict", "runs/tiny", "many.jsonl", "-o", "answers.jsonl", "--ray", "--workers", 2)
    words = (*words, "--rows-per-shard", 50, "--keep-shards")
    process = start(*words)
    wait_for(lambda: len(finished_shards()) >= 5, process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = finish(process, code=130)
    assert "of 2000 rows are answered and kept; the same command goes on." in said
    assert "Traceback" not in said
    gone, alive = psutil.wait_procs(started, timeout=PATIENCE_SECONDS)
    assert not alive and len(gone) > 3
    first = finished_shards()
    assert 5 <= len(first) < 40
    process = start(*words)
    wait_for(lambda: len(finished_shards()) >= len(first) + 3, process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(started, timeout=PATIENCE_SECONDS)[1]
    second = finished_shards()
    said = finish(start(*words))
    assert f"{len(second) * 50} of 2000 rows are answered already" in said
    assert {**finished_shards(), **first, **second} == finished_shards()
    parts = sorted(Path("answers.jsonl.parts").glob("shard-*.jsonl"))
    (work / "joined.jsonl").write_bytes(b"".join(part.read_bytes() for part in parts))
    require_every_row_once(work / "joined.jsonl", 2_000)
    assert "2000 answers in answers.jsonl.parts/shard-*.jsonl" in said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """A folder with a recipe of thirty steps, and runs/whole trained by one process, this one."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder, tiny_gemma3_folder, rows=24, epochs=10, batch_size=9, evaluate_every=10, save_every=2)
    with pytest.MonkeyPatch.context() as patch, light_training():
        patch.chdir(folder)
        tune_model(load_recipe("recipe.yaml", []), console=Console(quiet=True))
    return folder


@pytest.mark.slow
def test_two_workers_train_what_one_process_trains_though_one_of_them_dies(
    whole: Path, monkeypatch: pytest.MonkeyPatch, ray_environment: None
) -> None:
    monkeypatch.chdir(whole)
    words = ("train", "recipe.yaml", "name=killed", "--ray", "--workers", 2)
    run = run_of(whole, "killed")
    process = start(*words)
    wait_for(lambda: steps_of(run) >= 4, process)
    ray_processes("ray::RayTrainWorker", process)[1].kill()
    said = finish(process)
    assert "A worker ended; all were started anew (1)." in said
    assert said.count("Done in") == 1
    agree(run_of(whole, "whole"), run)
    assert not list((whole / "runs").glob(".ray-*"))


@pytest.mark.slow
def test_an_error_of_one_worker_is_told_once_and_not_tried_again(
    whole: Path, monkeypatch: pytest.MonkeyPatch, ray_environment: None
) -> None:
    monkeypatch.chdir(whole)
    said = finish(start("train", "recipe.yaml", "--ray", "--workers", 2), code=2)
    assert said.count("already holds a run") == 1
    assert "started anew" not in said


@pytest.mark.slow
def test_ctrl_c_saves_a_training_on_ray_and_it_goes_on(
    whole: Path, monkeypatch: pytest.MonkeyPatch, ray_environment: None
) -> None:
    monkeypatch.chdir(whole)
    words = ("train", "recipe.yaml", "name=stopped", "--ray", "--workers", 2)
    run = run_of(whole, "stopped")
    process = start(*words)
    wait_for(lambda: steps_of(run) >= 4, process)
    process.send_signal(signal.SIGINT)
    said = finish(process, code=130)
    assert "Go on with: weitiao train recipe.yaml name=stopped --resume --ray --workers 2" in said
    assert steps_of(run) < 30
    finish(start(*words, "--resume"))
    agree(run_of(whole, "whole"), run)
