"""Several processes on this machine train what one process trains, and one that dies ends them all.

The slow tests compare thirty steps of two and four processes with one, go on with other numbers of processes, and kill
a process at random moments while torchrun starts all anew.
"""

from __future__ import annotations

import math
import random
import signal
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launching import (
    PATIENCE_SECONDS,
    agree,
    finish_though_killed,
    kill,
    lines_of,
    run_of,
    start,
    train,
    wait_for_step,
    write_recipe,
)
from weitiao.cli import app
from weitiao.data.order import share_rows
from weitiao.errors import RunError
from weitiao.launch import read_launch
from weitiao.recipe import load_recipe
from weitiao.render.base import Example
from weitiao.train.batches import make_batches
from weitiao.train.checkpoint import list_checkpoints
from weitiao.tune import tune_model

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_rows_are_shared_by_tokens_and_none_is_lost() -> None:
    assert share_rows([900, 300, 700, 400], parts=2) == [[0, 1], [2, 3]]
    assert share_rows([5], parts=3) == [[0], [], []]
    draw = random.Random(1)
    for parts in (2, 3, 8):
        lengths = [draw.randint(20, 400) for _ in range(64)]
        shares = share_rows(lengths, parts=parts)
        assert sorted(place for share in shares for place in share) == list(range(64))
        sums = [sum(lengths[place] for place in share) for share in shares]
        assert max(sums) < 1.05 * min(sums)


def test_the_weights_of_all_shares_together_are_those_of_the_whole_step() -> None:
    draw = random.Random(2)
    rows = []
    for _ in range(9):
        length = draw.randint(3, 30)
        learnt = draw.randint(1, length - 1)
        rows.append(Example(token_ids=tuple(range(length)), loss_mask=(False,) * learnt + (True,) * (length - learnt)))
    settings = {"tokens_per_pass": 40, "row_balance": 0.5, "row_weights": [1.0, 2.0, 0.5] * 3}
    whole = {
        (owner, target): weight
        for batch in make_batches(rows, **settings)
        for owner, target, weight in zip(*(one.tolist() for one in (batch.owners, batch.targets, batch.weights)))
    }
    parts = {
        (owner, target): weight
        for places in share_rows([len(row) for row in rows], parts=4)
        for batch in make_batches(rows, places=places, **settings)
        for owner, target, weight in zip(*(one.tolist() for one in (batch.owners, batch.targets, batch.weights)))
    }
    assert parts == whole
    assert math.isclose(math.fsum(parts.values()), 1.0, rel_tol=1e-6)
    assert make_batches(rows, places=[], **settings) == make_batches(rows, places=[], share=True, **settings) == []


def test_only_what_a_launcher_says_makes_a_process_one_of_several() -> None:
    assert read_launch({}) is None
    launch = read_launch({**LAUNCHED, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank, launch.restarts) == (1, 2, 1, 2)
    again, others = read_launch(LAUNCHED), read_launch({**LAUNCHED, "GROUP_WORLD_SIZE": "2"})
    assert again is not None and again.key == launch.key != ""
    assert others is not None and others.key == ""  # which of several machines' launches this is, nobody has said
    named = read_launch({**LAUNCHED, "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "night"})
    assert named is not None and named.key == "night"


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"WORLD_SIZE": "4"}, "RANK and LOCAL_RANK and MASTER_ADDR are not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by mpirun"),
        ({**LAUNCHED, "ACCELERATE_MIXED_PRECISION": "bf16"}, "say model.dtype"),
        ({**LAUNCHED, "ACCELERATE_USE_FSDP": "true"}, "say train.shard=fsdp"),
    ],
)
def test_a_launch_that_would_be_misunderstood_is_refused(environ: dict[str, str], told: str) -> None:
    with pytest.raises(RunError, match=told):
        read_launch(environ)


def test_other_verbs_are_refused_to_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 2
    assert "weitiao evaluate is done by one process, but 2 were launched" in result.stderr


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """Six steps, the third and sixth of a single row; runs/whole trained by one process, this one."""
    folder = tmp_path_factory.mktemp("short")
    write_recipe(folder, tiny_gemma3_folder, rows=11, epochs=2, evaluate_every=3, batch_size=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tune_model(load_recipe("recipe.yaml", []), console=Console(quiet=True))
    return folder


def test_two_processes_train_what_one_trains_and_only_one_speaks(short: Path) -> None:
    said = train(short, "name=two", processes=2)
    whole, two = run_of(short, "whole"), run_of(short, "two")
    lines = lines_of(whole, "train")
    assert len(lines) == 6
    assert lines[0]["loss"] > lines[-1]["loss"]
    agree(whole, two)
    assert len(whole.read_samples()[0][1]) > 1  # so both processes were asked something
    assert two.contract.exists()
    assert [path.name for path in list_checkpoints(two)] == [path.name for path in list_checkpoints(whole)]
    assert said.count("task labels") == said.count("Done in") == said.count("step 6/6") == 1
    assert "in each of 2 processes" in said


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """Thirty steps with scorings; runs/whole trained by one process."""
    folder = tmp_path_factory.mktemp("long")
    write_recipe(folder, tiny_gemma3_folder, rows=24, epochs=10, batch_size=9, evaluate_every=10, save_every=5)
    train(folder, "name=whole")
    assert len(lines_of(run_of(folder, "whole"), "train")) == 30
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_thirty_steps_are_those_of_one_process(long: Path, processes: int) -> None:
    train(long, f"name=of{processes}", processes=processes)
    agree(run_of(long, "whole"), run_of(long, f"of{processes}"))


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes(long: Path) -> None:
    for step, processes in ((8, 2), (17, 1)):
        process = start(long, "name=various", *(["--resume"] if step > 8 else []), processes=processes)
        wait_for_step(run_of(long, "various"), step, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert "Stopped by SIGTERM. Go on with:" in said
    train(long, "name=various", "--resume", processes=4)
    agree(run_of(long, "whole"), run_of(long, "various"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_with_one_message(long: Path, victim: int) -> None:
    name = f"dead{victim}"
    process = start(long, f"name={name}", processes=2)
    wait_for_step(run_of(long, name), 6, process)
    pid = kill(process, victim)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count(f"Process {victim} of 2 (pid {pid}) has ended, so the others end too.") == 1
    assert said.count("Go on with --resume") == 1
    train(long, f"name={name}", "--resume")
    agree(run_of(long, "whole"), run_of(long, name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_torchrun_starts_anew_what_lost_a_process_at_any_moment(long: Path, seed: int) -> None:
    run = run_of(long, f"elastic{seed}")
    process = start(long, f"name={run.path.name}", processes=2, restarts=4)
    finish_though_killed(process, run, random.Random(seed))
    agree(run_of(long, "whole"), run)


@pytest.mark.slow
def test_a_restart_does_not_go_on_with_a_run_of_another_launch(long: Path) -> None:
    process = start(long, "name=whole", processes=2, restarts=1)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    assert said.count("already holds a run") == 2  # once for each start, not once for each process
