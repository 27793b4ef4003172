"""`weitiao runs`: real trainings, one in a child process that is killed, told apart by what their folders hold."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from command_line import light_training, refuse, run_cli, succeed
from test_train import Screen, recipe_for, run_recipe
from weitiao.errors import RunError
from weitiao.monitor.screen import runs_table, sparkline, told_seconds
from weitiao.monitor.state import DEAD_AFTER_SECONDS, Attendance, RunState, read_state, require_idle
from weitiao.monitor.summary import find_runs, summarise
from weitiao.runs import RunFolder, write_json

PATIENCE_SECONDS = 120


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with light_training():
        yield


def start_child(model: Path, rows: Path, *overrides: str, name: str) -> subprocess.Popen[bytes]:
    """`weitiao train` in another process; what it says goes to NAME.log."""
    recipe = Path(f"{name}.yaml")
    recipe.write_text(yaml.safe_dump(recipe_for(model, rows, *overrides, name=name).model_dump(mode="json")))
    with Path(f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "weitiao", "train", str(recipe)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def wait_for_step(process: subprocess.Popen[bytes], run: RunFolder, step: int) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not any(line["step"] >= step for line in run.read_metrics()):
        assert process.poll() is None, Path(f"{run.path.name}.log").read_text(encoding="utf-8")
        assert time.monotonic() < end
        time.sleep(0.05)


def listed(folder: str = "runs") -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in json.loads(succeed("runs", folder, "--json"))}


def state_of(run: RunFolder) -> RunState:
    state = read_state(run)
    assert state is not None
    return state


def test_runs_that_run_have_finished_were_stopped_or_killed_are_told_apart(
    tiny_llama_folder: Path, sample_rows: Path
) -> None:
    child = start_child(tiny_llama_folder, sample_rows, "train.epochs=2000", "train.save_every=1000", name="killed")
    try:
        finished = run_recipe(
            recipe_for(tiny_llama_folder, sample_rows, "train.epochs=1", "train.evaluate_every=3", name="finished")
        )
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe_for(tiny_llama_folder, sample_rows, name="stopped"), screen=Screen("step 3/12"))
        stopped_at = state_of(RunFolder("runs/stopped")).step
        killed = RunFolder("runs/killed")
        wait_for_step(child, killed, 5)
        assert listed()["killed"]["status"] == "running"
        with pytest.raises(RunError, match=rf"is being trained by process {child.pid}, which is at step"):
            require_idle(killed)
        child.send_signal(signal.SIGKILL)
        end = time.monotonic() + 10
        while listed()["killed"]["status"] == "running":  # a killed process is dead before anyone has waited for it
            assert time.monotonic() < end
    finally:
        child.kill()
        child.wait()
    runs = listed()
    last_logged = max(line["step"] for line in killed.read_metrics())
    assert {name: run["status"] for name, run in runs.items()} == {
        "finished": "finished", "stopped": "interrupted", "killed": "died",
    }  # fmt: skip
    assert (runs["killed"]["step"], runs["killed"]["steps"]) == (last_logged, 12000)
    assert (runs["stopped"]["step"], runs["stopped"]["steps"]) == (stopped_at, 12)
    assert runs["finished"]["losses"] == [line["loss"] for line in finished.read_metrics() if line["kind"] == "train"]
    scores = [line["overall"] for line in finished.read_metrics() if line["kind"] == "dev"]
    assert runs["finished"]["best_score"] == max(scores)
    assert runs["killed"]["best_score"] is None
    assert runs["finished"]["model"] == str(tiny_llama_folder)
    assert runs["finished"]["method"] == "lora"
    assert 0 < runs["finished"]["seconds"] < 60

    table = succeed("runs")
    assert f"died at step {last_logged}" in " ".join(table.split())
    assert f"interrupted at step {stopped_at}" in " ".join(table.split())
    assert "killed: the process was killed" in table
    assert sparkline(runs["finished"]["losses"]) in table
    assert str(tiny_llama_folder) in table
    assert "6/6" in table
    assert run_cli("watch", "runs/killed").exit_code == 1


def test_a_training_that_fails_says_why(tiny_llama_folder: Path, sample_rows: Path) -> None:
    recipe = recipe_for(tiny_llama_folder, sample_rows, "train.learning_rate=1e30", "train.max_grad_norm=1e30")
    with pytest.raises(RunError) as caught:
        run_recipe(recipe)
    (run,) = find_runs("runs")
    assert (run.status, run.steps) == ("died", 12)
    assert run.reason == str(caught.value).partition("\n")[0]
    assert run.reason in succeed("runs").replace("\n", " ")


def test_a_run_that_goes_on_keeps_its_beginning(tiny_llama_folder: Path, sample_rows: Path) -> None:
    recipe = recipe_for(tiny_llama_folder, sample_rows)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, screen=Screen("step 3/12"))
    before = state_of(RunFolder("runs/tiny"))
    after = state_of(run_recipe(recipe, resume=True))
    assert (after.status, after.step, after.steps) == ("finished", 12, 12)
    assert after.first_step == before.step
    assert after.started == before.started < after.begun


# ---- states that no test can bring about here ---------------------------------------------------------------------


@pytest.fixture
def running() -> tuple[RunFolder, RunState]:
    """A run in this process, its state as the file holds it."""
    run = RunFolder.create("runs/a", resume=False)
    attendance = Attendance(run, say=print)
    attendance.begin(0, 100)
    attendance.advance(7)
    attendance.finish("interrupted")
    return run, replace(state_of(run), status="running")


@pytest.mark.parametrize(("age", "status"), [(DEAD_AFTER_SECONDS / 2, "running"), (DEAD_AFTER_SECONDS * 2, "died")])
def test_on_another_machine_the_heartbeat_tells(age: float, status: str, running: tuple[RunFolder, RunState]) -> None:
    run, state = running
    write_json(run.state, asdict(replace(state, host="elsewhere", heartbeat=time.time() - age)))
    assert summarise(run.path).status == status


def test_a_number_that_was_given_to_another_process_is_not_the_run(running: tuple[RunFolder, RunState]) -> None:
    run, state = running
    write_json(run.state, asdict(state))
    assert summarise(run.path).status == "running", "it is this very process"
    old = replace(state, process_started=state.process_started - 1000, heartbeat=time.time() - 1000)
    write_json(run.state, asdict(old))
    assert summarise(run.path).status == "died"
    require_idle(run)
    write_json(run.state, asdict(replace(state, pid=2**22 + 1)))
    assert summarise(run.path).told_status() == "died at step 7"
    assert state.host == platform.node()


def test_processes_that_train_one_run_together_do_not_stand_in_each_others_way(
    running: tuple[RunFolder, RunState], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = running
    write_json(run.state, asdict(replace(state, pid=os.getppid(), heartbeat=time.time())))
    with pytest.raises(RunError, match="is being trained by process"):
        require_idle(run)
    monkeypatch.setenv("RANK", "1")
    require_idle(run)


def test_a_state_that_cannot_be_read_is_told_and_hides_no_other_run(running: tuple[RunFolder, RunState]) -> None:
    run, _ = running
    run.state.write_text('{"status": "running"', encoding="utf-8")
    RunFolder.create("runs/b/c", resume=False).recipe.write_text("model: starter\nmethod: {name: lora}\n")
    runs = {one.name: one for one in find_runs("runs")}
    assert runs["a"].status == "unreadable"
    assert "state.json cannot be read" in runs["a"].reason
    assert (runs["b/c"].status, runs["b/c"].model) == ("stopped", "starter"), "of a version without state.json"
    assert "b/c" in succeed("runs")


def test_a_cut_last_line_is_left_out(running: tuple[RunFolder, RunState]) -> None:
    run, _ = running
    run.metrics.write_text('{"kind": "train", "step": 9, "loss": 1.0}\n{"kind": "train", "st', encoding="utf-8")
    assert (summarise(run.path).step, summarise(run.path).losses) == (9, [1.0])


def test_folders_without_runs_are_told() -> None:
    assert "There is no folder runs" in refuse("runs")
    Path("runs").mkdir()
    assert run_cli("runs").stderr == "There are no runs in runs.\n"


def test_a_table_on_a_narrow_screen_keeps_what_counts(running: tuple[RunFolder, RunState]) -> None:
    run, state = running
    write_json(run.state, asdict(replace(state, host="elsewhere", heartbeat=0.0)))
    console = Console(width=80, file=Screen(), record=True)
    console.print(runs_table(find_runs("runs"), width=80))
    text = console.export_text()
    assert "died at step 7" in text
    assert "7/100" in text
    assert max(len(line) for line in text.splitlines()) <= 80


# ---- how it is shown ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([5.0], "▁"),
        ([3.0, 2.0, 1.0, 1.0], "█▅▁▁"),
        ([2.0, float("nan"), 1.0], "█ ▁"),
        ([8.0, 6.0, 4.0, 2.0, 1.0, 1.0], "█▃▁"),
    ],
)
def test_sparklines(values: list[float], shown: str) -> None:
    assert sparkline(values, width=3 if len(values) > 5 else 20) == shown


def test_a_sparkline_is_never_wider_than_asked() -> None:
    for count in (19, 20, 21, 39, 1000):
        assert len(sparkline([float(number) for number in range(count)])) == min(count, 20)


def test_times() -> None:
    assert [told_seconds(seconds) for seconds in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
