"""Weights spread over processes on this machine (FSDP2) train what one process trains, whatever learns.

The slow tests compare thirty steps of two and four processes with one, go on with other numbers of processes, and kill
a process at random moments while torchrun starts all anew.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from launching import PATIENCE_SECONDS, agree, kill, lines_of, run_of, start, train, wait_for_step, write_recipe
from weitiao.apply import open_run
from weitiao.errors import RunError
from weitiao.models.own_weights import WEIGHTS_FILE
from weitiao.recipe import load_recipe
from weitiao.runs import RunFolder
from weitiao.train.checkpoint import list_checkpoints
from weitiao.train.manifest import damage_in
from weitiao.tune import tune_model

FULL = ("method={name: full}", "train.learning_rate=1e-3")
SPREAD = "train.shard=fsdp"


def tune_alone(folder: Path, *words: str) -> RunFolder:
    """The run that this process trains in `folder`, alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tune_model(load_recipe("recipe.yaml", list(words)), console=Console(quiet=True))
    return run_of(folder, next(word.removeprefix("name=") for word in words if word.startswith("name=")))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """Rows for six steps, the third and sixth of a single row, so that one of two processes has none."""
    folder = tmp_path_factory.mktemp("short")
    write_recipe(folder, tiny_gemma3_folder, rows=11, epochs=2, evaluate_every=3, batch_size=5, tokens_per_pass=64)
    return folder


@pytest.mark.parametrize("method", [(), FULL], ids=["lora", "full"])
def test_two_processes_train_what_one_trains(short: Path, method: tuple[str, ...]) -> None:
    name = "full" if method else "lora"
    whole = tune_alone(short, f"name={name}", *method)
    said = train(short, f"name={name}2", SPREAD, *method, processes=2)
    spread = run_of(short, f"{name}2")
    agree(whole, spread)
    assert len(lines_of(whole, "train")) == 6
    assert said.count("Done in") == 1
    files = sorted(path.name for path in list_checkpoints(spread)[-1].glob("*.safetensors"))
    assert len(files) == (2 if method else 1)
    assert not any(damage_in(path) for path in list_checkpoints(spread))
