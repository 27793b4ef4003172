"""Weights spread over processes on this machine (FSDP2) train what one process trains, whatever learns.

The slow tests compare thirty steps of two and four processes with one, go on with other numbers of processes, and kill
a process at random moments while torchrun starts all anew.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

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
from prefix_models import tiny
from weitiao.errors import RunError
from weitiao.models.adapters import base_model
from weitiao.models.own_weights import learn_weights
from weitiao.recipe import PromptTuning, Train, load_recipe
from weitiao.train.checkpoint import list_checkpoints
from weitiao.train.manifest import damage_in
from weitiao.train.model import TrainedModel, require_compiler
from weitiao.train.ranks import ALONE, Ranks
from weitiao.train.sharding import require_spreadable, shard_model, spreads
from weitiao.tune import tune_model
from weitiao.tuning.methods import add_adapter

SPREAD = "train.shard=fsdp"


def test_two_processes_train_all_weights_as_one_does_and_write_their_parts(
    tmp_path: Path, tiny_gemma3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # six steps, the third and sixth of a single row, so that one of two processes has none
    sizes = {"rows": 11, "epochs": 2, "evaluate_every": 3, "batch_size": 5, "tokens_per_pass": 64}
    write_recipe(tmp_path, tiny_gemma3_folder, **sizes, learning_rate=1e-3, method={"name": "full"})
    monkeypatch.chdir(tmp_path)
    said = StringIO()
    tune_model(load_recipe("recipe.yaml", [SPREAD]), console=Console(file=said, width=1000))
    assert "train.shard spreads the weights over several processes; this one, alone, holds them all" in said.getvalue()
    several = train(tmp_path, "name=two", SPREAD, processes=2)
    whole, two = run_of(tmp_path, "whole"), run_of(tmp_path, "two")
    assert len(lines_of(whole, "train")) == 6
    agree(whole, two)
    assert several.count("Done in") == 1
    newest = list_checkpoints(two)[-1]
    assert len(list(newest.glob("shard-*.safetensors"))) == 2
    assert not damage_in(newest)


def test_what_weights_spread_over_processes_do_not_go_with_is_refused_at_once() -> None:
    with pytest.raises(RunError, match=r"train\.compile=always is not for weights spread over processes"):
        require_compiler(Train(shard="fsdp", compile="always"))
    assert not spreads(Train(shard="fsdp"), ALONE)
    tokens = add_adapter(tiny("qwen2"), PromptTuning(num_virtual_tokens=4), seed=1)
    with pytest.raises(RunError, match="Tune by lora or"):
        require_spreadable(base_model(tokens), Train(shard="fsdp"), torch.device("cpu"))
    learning = learn_weights(tiny("qwen2"), [name for name, _ in tiny("qwen2").named_parameters()])
    trained, two = TrainedModel(learning, packing=True), Ranks(size=2)
    with pytest.raises(RunError, match=r"train\.optimiser=adafactor is not for weights spread over processes"):
        shard_model(trained, learning, Train(shard="fsdp", optimiser="adafactor"), two, torch.device("cpu"))


@pytest.fixture(scope="module", params=["lora", "full"])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """Thirty steps with scorings, of an adapter or of all weights; runs/whole trained by one process."""
    folder = tmp_path_factory.mktemp(request.param)
    own = {"method": {"name": "full"}} if request.param == "full" else {}
    rate = {"learning_rate": 1e-3} if own else {}
    sizes = {"rows": 24, "epochs": 10, "batch_size": 9, "evaluate_every": 10, "save_every": 5}
    write_recipe(folder, tiny_gemma3_folder, **sizes, **rate, **own)
    train(folder, "name=whole")
    assert len(lines_of(run_of(folder, "whole"), "train")) == 30
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_thirty_steps_are_those_of_one_process(long: Path, processes: int) -> None:
    train(long, f"name=of{processes}", SPREAD, processes=processes)
    agree(run_of(long, "whole"), run_of(long, f"of{processes}"))


@pytest.mark.slow
def test_a_spread_run_goes_on_with_any_number_of_processes(long: Path) -> None:
    for step, processes in ((8, 2), (17, 4)):
        process = start(long, "name=various", SPREAD, *(["--resume"] if step > 8 else []), processes=processes)
        wait_for_step(run_of(long, "various"), step, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert "Stopped by SIGTERM. Go on with:" in said
    train(long, "name=various", "--resume")  # which holds all weights itself
    agree(run_of(long, "whole"), run_of(long, "various"))


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_spread_and_a_damaged_part_is_passed_over(long: Path) -> None:
    process = start(long, "name=begun")
    wait_for_step(run_of(long, "begun"), 7, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    process = start(long, "name=begun", SPREAD, "--resume", processes=2)
    wait_for_step(run_of(long, "begun"), 21, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    newest = list_checkpoints(run_of(long, "begun"))[-1]
    part = sorted(newest.glob("*.safetensors"))[-1]
    damaged = bytearray(part.read_bytes())
    damaged[-5] ^= 1
    part.write_bytes(damaged)
    said = train(long, "name=begun", SPREAD, "--resume", processes=2)
    assert f"{part.name} is not what was written" in said
    agree(run_of(long, "whole"), run_of(long, "begun"))


@pytest.mark.slow
def test_a_process_that_dies_in_a_pass_ends_the_others_with_one_message(long: Path) -> None:
    process = start(long, "name=dead", SPREAD, processes=2)
    wait_for_step(run_of(long, "dead"), 6, process)
    pid = kill(process, 1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count(f"Process 1 of 2 (pid {pid}) has ended, so the others end too.") == 1
    assert said.count("Go on with --resume") == 1
    assert "Traceback" not in said.replace('Traceback (most recent call last):\n  File "<frozen runpy>"', "")


@pytest.mark.slow
def test_torchrun_starts_anew_what_lost_a_process_at_any_moment(long: Path) -> None:
    run = run_of(long, "elastic")
    process = start(long, "name=elastic", SPREAD, processes=2, restarts=4)
    finish_though_killed(process, run, random.Random(3))
    agree(run_of(long, "whole"), run)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "chatglm", "glm"])
def test_every_method_trains_and_answers_as_it_does_in_one_process(family: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("spread_methods.py")
    done = subprocess.run([*command, str(worker), family], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 differ" in done.stdout
