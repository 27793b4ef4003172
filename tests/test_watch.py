"""`weitiao watch`: a training in another process followed to its end, and runs that have ended shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from command_line import light_training, refuse, run_cli
from test_runs_table import start_child, state_of, wait_for_step
from test_train import recipe_for, run_recipe
from weitiao.cli import runs as runs_module
from weitiao.monitor.screen import watch_view
from weitiao.monitor.state import Attendance
from weitiao.monitor.summary import summarise
from weitiao.runs import RunFolder, Sample, write_json


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs_module, "LOOK_AGAIN_SECONDS", 0.1)
    with light_training():
        yield


def shown(run: RunFolder, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), markup=False)  # noqa: SIM115
    with console.file:
        console.print(watch_view(summarise(run.path), width=width))
    return console.export_text()


def test_a_training_is_followed_to_its_end(tiny_llama_folder: Path, sample_rows: Path) -> None:
    child = start_child(tiny_llama_folder, sample_rows, "train.epochs=10", "train.save_every=100", name="child")
    try:
        run = RunFolder("runs/child")
        wait_for_step(child, run, 1)
        during = shown(run)
        result = run_cli("watch", "runs/child")
        assert state_of(run).status == "finished", "watch ends with the training, not before"
    finally:
        child.kill()
        child.wait()
    assert result.exit_code == 0
    assert "finished" in result.stdout
    assert "step 60/60" in result.stdout
    assert "running" in during
    assert "/60" in during


def test_a_finished_run_is_shown_whole(tiny_llama_folder: Path, sample_rows: Path) -> None:
    run = run_recipe(
        recipe_for(
            tiny_llama_folder, sample_rows, "train.epochs=1", "train.evaluate_every=3", "train.price_per_hour=3600"
        )
    )
    result = run_cli("watch", "runs/tiny")
    assert result.exit_code == 0
    text = shown(run, 160)
    lines = run.read_metrics()
    last, dev = ([line for line in lines if line["kind"] == kind][-1] for kind in ("train", "dev"))
    for task in ("labels", "triples"):
        assert f"{last['task_losses'][task]:.4f}" in text
        assert f"{dev['scores'][task]['primary']:.3f}" in text
    assert f"{last['loss']:.4f}" in text
    assert f"{dev['loss']:.4f}" in text
    assert f"lr {last['learning_rate']:.2e}" in text
    assert f"{last['tokens_per_second']:.0f} tokens/s" in text
    assert f"cost {last['price']:.2f}" in text
    assert "GiB" in text
    assert "answer at step 6" in text
    ((_, samples), _) = run.read_samples()
    assert all(sample.gold[:10] in text.replace("⏎", "\n") or "```" in sample.gold for sample in samples)
    assert text.count("(best)") == 1


def test_ctrl_c_leaves_and_touches_nothing() -> None:
    run = RunFolder.create("runs/tiny", resume=False)
    attendance = Attendance(run, say=print)  # this process is the training, and it is not at its end
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    result = run_cli("watch", "runs/tiny")
    timer.join()
    assert result.exit_code == 0
    assert result.stderr == "The training goes on.\n"
    assert state_of(run).status == "running"
    attendance.finish("interrupted")


def test_the_time_left_is_told_by_the_speed_so_far() -> None:
    run = RunFolder.create("runs/tiny", resume=False)
    attendance = Attendance(run, say=print)
    attendance.begin(20, 100)
    attendance.advance(25)
    attendance.finish("interrupted")
    state = state_of(run)
    write_json(run.state, asdict(replace(state, status="running", begun=state.step_at - 50)))
    assert "step 25/100" in shown(run)
    assert "ETA 12:30" in shown(run)


def test_texts_of_rows_cannot_write_to_the_terminal() -> None:
    run = RunFolder.create("runs/tiny", resume=False)
    run.append_samples(
        3, [Sample(task="[red]t", source="a:1", question="\x1b[2J" + "长" * 900, gold="[b]", answer="x")]
    )
    text = shown(run, 200)
    assert "[red]t" in text
    assert "[b]" in text
    assert "\x1b" not in text
    assert "␛[2J" in text
    assert "more characters" in text


def test_a_half_known_run_is_shown_too() -> None:
    run = RunFolder.create("runs/tiny", resume=False)
    attendance = Attendance(run, say=print)
    attendance.finish("failed", "the disk is full")
    write_json(run.state, asdict(replace(state_of(run), steps=None)))
    assert "died at step 0" in shown(run)
    assert "the disk is full" in shown(run)
    assert run_cli("watch", "runs/tiny").exit_code == 1
    assert "There is no run folder runs/other" in refuse("watch", "runs/other")


def test_watching_and_listing_load_no_torch() -> None:
    RunFolder.create("runs/tiny", resume=False).recipe.write_text("model: starter\n", encoding="utf-8")
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom weitiao.cli import app\n"
        "for words in (['runs'], ['watch', 'runs/tiny']):\n    CliRunner().invoke(app, words)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
