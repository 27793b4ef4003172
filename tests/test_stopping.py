"""A training that a signal asks to stop: it saves, says how to go on, exits with a code that says so, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import quick_training, read_lines, run_cli, write_topics
from weitiao import tune as tune_module
from weitiao.runs import RunFolder
from weitiao.stopping import RESUMABLE, Stopped, StopSignals
from weitiao.train import loop as loop_module
from weitiao.train import scoring as scoring_module
from weitiao.train.checkpoint import list_checkpoints, read_progress
from weitiao.train.model import TrainedModel, can_compile

STEPS = 6
SIGNALS = [signal.SIGTERM, signal.SIGUSR1]


# --- Signals alone ---------------------------------------------------------------------------------------------------


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_stops_where_the_program_is_and_tells_the_code_to_exit_with(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, StopSignals(print):
        send(number)
    assert caught.value.exit_code == code
    assert isinstance(caught.value, KeyboardInterrupt), "no library that takes care of Ctrl-C needs to know of it"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, *SIGNALS])
def test_what_is_deferring_is_told_of_the_first_signal_and_left_by_the_second(number: signal.Signals) -> None:
    said: list[str] = []
    with StopSignals(said.append) as stops, stops.deferring():
        send(number)
        assert stops.asked == number.name
        with pytest.raises(Stopped):
            send(number)
    assert len(said) == 1
    assert ("Ctrl-C" if number == signal.SIGINT else number.name) in said[0]
    assert "saving after this step" in said[0]


def test_what_can_be_done_again_is_broken_off_by_the_first_signal_or_not_begun_after_it() -> None:
    with StopSignals(print) as stops, stops.deferring():
        with pytest.raises(Stopped), stops.breaking_off():
            send(signal.SIGTERM)
        assert stops.asked == "SIGTERM"
        with pytest.raises(Stopped), stops.breaking_off():
            pytest.fail("begun after a signal")


def test_caught_once_more_inside_a_signal_still_finds_the_same_catcher() -> None:
    with StopSignals(print) as stops, stops.deferring():
        with stops:
            pass
        send(signal.SIGTERM)
        assert stops.asked == "SIGTERM"


def test_in_another_thread_nothing_is_caught_and_nothing_fails() -> None:
    before, asked = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopSignals(print) as stops, stops.deferring():
            asked.append((stops.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [("", before)]


# --- Trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    with quick_training():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """A folder with rows, a recipe with dropout and two scorings, and the run never stopped, runs/whole."""
    home = tmp_path_factory.mktemp("stopping")
    write_topics(home / "rows.jsonl")
    recipe = {
        "name": "tiny",
        "model": {"path": str(tiny_gemma3_folder), "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "method": {"dropout": 0.1},
        "generate": {"max_new_tokens": 8},
        "train": {
            "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "compile": "never",
            "save_every": 2, "evaluate_every": 3,
        },
    }  # fmt: skip
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run_cli("train", "recipe.yaml", "name=whole").exit_code == 0
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run not begun yet, beside the rows and the recipe."""
    for name in ("rows.jsonl", "recipe.yaml"):
        (tmp_path / name).write_bytes((home / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return RunFolder("runs/tiny")


def sending(place: Any, name: str, number: signal.Signals, *, call: int, times: int = 1) -> pytest.MonkeyPatch:
    """The function `name` of `place` gets `number` sent in the middle of its `call`-th call, `times` times."""
    original: Callable[..., Any] = getattr(place, name)
    calls: list[None] = []

    def sent(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        result = original(*args, **kwargs)
        if len(calls) == call:
            for _ in range(times):
                send(number)
        return result

    patch = pytest.MonkeyPatch()
    patch.setattr(place, name, sent)
    return patch


def figures(run: RunFolder) -> list[dict[str, Any]]:
    of_machine = ("tokens_per_second", "seconds", "memory_bytes")
    return [{key: value for key, value in line.items() if key not in of_machine} for line in read_lines(run.metrics)]


def weights(run: RunFolder, part: str = "adapter") -> bytes:
    return (run.path / part / "adapter_model.safetensors").read_bytes()


def assert_goes_on_to_the_same_end(run: RunFolder, home: Path) -> None:
    result = run_cli("train", "recipe.yaml", "--resume")
    assert result.exit_code == 0, result.output
    whole = RunFolder(home / "runs" / "whole")
    assert weights(run) == weights(whole)
    assert weights(run, "best") == weights(whole, "best")
    assert figures(run) == figures(whole)
    assert not [*run.path.rglob(".tmp-*"), *run.path.rglob(".old-*")]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 4])
def test_a_signal_saves_after_the_step_and_says_in_one_line_how_to_go_on(
    number: signal.Signals, step: int, run: RunFolder, home: Path
) -> None:
    patch = sending(loop_module, "take_step", number, call=step)
    result = run_cli("train", "recipe.yaml")
    patch.undo()
    assert result.exit_code == RESUMABLE == 75
    assert f"Saved at step {step} of {STEPS}. Continue with --resume." in result.stderr
    line = f"Stopped by {number.name}. Go on with: weitiao train recipe.yaml --resume"
    assert result.stderr.splitlines()[-1] == line
    assert read_progress(list_checkpoints(run)[-1]).step == step
    assert not run.contract.exists()
    assert_goes_on_to_the_same_end(run, home)


@pytest.mark.parametrize(("step", "place", "call"), [
    (3, "take_step", 3),  # before a scoring, which is then not begun
    (3, "dev_loss", 1),  # in the middle of one
    (6, "take_step", 6),  # the last step: without its scoring the run is not done
    (6, "dev_loss", 2),
])  # fmt: skip
def test_a_scoring_is_broken_off_and_done_when_the_run_goes_on(
    step: int, place: str, call: int, run: RunFolder, home: Path
) -> None:
    patch = sending(scoring_module if place == "dev_loss" else loop_module, place, signal.SIGTERM, call=call)
    result = run_cli("train", "recipe.yaml")
    patch.undo()
    assert result.exit_code == RESUMABLE
    assert f"SIGTERM: the scoring of step {step} is left for when the run goes on." in result.stderr
    progress = read_progress(list_checkpoints(run)[-1])
    assert (progress.step, progress.unscored) == (step, True)
    patch = sending(scoring_module, "dev_loss", signal.SIGTERM, call=1)  # and broken off once more
    assert run_cli("train", "recipe.yaml", "--resume").exit_code == RESUMABLE
    patch.undo()
    assert_goes_on_to_the_same_end(run, home)


def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_stands(run: RunFolder, home: Path) -> None:
    patch = sending(loop_module, "take_step", signal.SIGTERM, call=5, times=2)
    result = run_cli("train", "recipe.yaml")
    patch.undo()
    assert result.exit_code == RESUMABLE
    assert "Saved at step" not in result.stderr
    assert read_progress(list_checkpoints(run)[-1]).step == 4
    assert_goes_on_to_the_same_end(run, home)


def test_while_the_first_step_compiles_a_signal_leaves_at_once(
    run: RunFolder, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as compiling:
        compiling.setattr(loop_module, "will_compile", lambda settings, seconds: True)
        compiling.setattr(TrainedModel, "compile_layers", lambda self: 0)
        patch = sending(loop_module, "take_step", signal.SIGTERM, call=1)
        result = run_cli("train", "recipe.yaml")
        patch.undo()
    assert result.exit_code == RESUMABLE
    assert "Saved at step" not in result.stderr
    assert list_checkpoints(run) == []
    assert_goes_on_to_the_same_end(run, home)


def test_a_compiler_that_the_signal_killed_as_well_is_no_failure(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        send(signal.SIGTERM)
        raise RuntimeError("g++ was killed")

    monkeypatch.setattr(loop_module, "take_step", fail)
    result = run_cli("train", "recipe.yaml")
    assert result.exit_code == RESUMABLE
    assert "Step 1 was broken off by the signal (RuntimeError); nothing is saved." in result.stderr


def test_before_the_run_has_begun_the_same_command_is_told(run: RunFolder) -> None:
    patch = sending(tune_module, "prepare", signal.SIGTERM, call=1)
    result = run_cli("train", "recipe.yaml", "name=a b")
    patch.undo()
    assert result.exit_code == RESUMABLE
    assert result.stderr.splitlines()[-1] == "Stopped by SIGTERM. Go on with: weitiao train recipe.yaml 'name=a b'"
    assert not Path("runs").exists()


def test_a_disk_that_is_full_when_a_signal_comes_is_an_error_not_to_be_tried_again(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system would start the job again and again."""

    def full(*_: Any, **__: Any) -> None:
        raise loop_module.RunError("The disk is full")

    patch = sending(loop_module, "take_step", signal.SIGTERM, call=1)
    monkeypatch.setattr(loop_module, "save_checkpoint", full)
    result = run_cli("train", "recipe.yaml")
    patch.undo()
    assert result.exit_code == 2
    assert "The disk is full" in result.stderr


def test_a_training_outlives_its_terminal_and_says_the_rest_in_a_file(run: RunFolder, home: Path) -> None:
    """The terminal is closed while steps are taken: the process gets SIGHUP, and writing to it fails."""
    ours, theirs = os.openpty()
    start = "import fcntl, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); from weitiao.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "train", "recipe.yaml"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"step 1/6" not in seen:
        seen += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(60) == 0
    said = (run.path / "output.txt").read_text(encoding="utf-8")
    assert "step 6/6" in said
    assert said.rstrip().endswith("Next: weitiao evaluate runs/tiny")
    assert weights(run) == weights(RunFolder(home / "runs" / "whole"))


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="torch.compile needs a C++ compiler, and there is none on this machine")
def test_a_process_group_told_to_end_while_it_compiles_leaves_within_seconds(run: RunFolder) -> None:
    """As a batch system does it: every process of the job gets the signal, the compiler's too."""
    command = [sys.executable, "-m", "weitiao", "train", "recipe.yaml", "train.compile=always"]
    with Path("log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 200
        while "Compiling the layers" not in Path("log.txt").read_text(encoding="utf-8"):
            assert process.poll() is None and time.monotonic() < end, Path("log.txt").read_text(encoding="utf-8")
            time.sleep(0.05)
        time.sleep(3)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == RESUMABLE, Path("log.txt").read_text(encoding="utf-8")
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in Path("log.txt").read_text(encoding="utf-8")
