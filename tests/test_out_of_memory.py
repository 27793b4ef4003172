"""Memory that runs out while a model trains: the step is taken again with smaller passes, and nothing of it is lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from launching import PATIENCE_SECONDS, furthest, lines_of, run_of, train, write_recipe
from weitiao.errors import RunError
from weitiao.evaluate import predict as predict_module
from weitiao.models.out_of_memory import ran_out_of_memory
from weitiao.recipe import Recipe, Train, load_recipe, make_recipe
from weitiao.runs import RunFolder
from weitiao.train import loop as loop_module
from weitiao.train import scoring as scoring_module
from weitiao.train.checkpoint import list_checkpoints, read_progress
from weitiao.train.halving import fitted_of, with_fitted
from weitiao.train.model import TrainedModel
from weitiao.tune import tune_model

GPU_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring_module, "draw_curve", lambda path, metrics: path.write_bytes(b"no curve"))


@pytest.fixture
def recipe_of(tiny_qwen2_folder: Path, sample_rows: Path) -> Callable[..., Recipe]:
    """Makes a recipe of so many steps of eight rows, with dropout; `words` are overrides."""

    def make(name: str, *words: str) -> Recipe:
        values = {
            "name": name,
            "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
            "data": {"train": str(sample_rows)},
            "method": {"dropout": 0.2, "rank": 4},
            "generate": {"max_new_tokens": 4},
            "train": {
                "epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "compile": "never",
                "evaluate_every": 3, "save_every": 2, "keep_checkpoints": 9,
            },
        }  # fmt: skip
        return make_recipe(values, words)

    return make


def run(recipe: Recipe, *, resume: bool | int = False) -> tuple[RunFolder, str]:
    screen = io.StringIO()
    return tune_model(recipe, resume=resume, console=Console(file=screen, width=4000, markup=False)), screen.getvalue()


def weights(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def losses(folder: RunFolder) -> list[tuple[str, float]]:
    return [(line["kind"], line["loss"]) for line in folder.read_metrics()]


def small_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception = GPU_ERROR) -> list[int]:
    """From here on passes of more than so many tokens raise `error` as they go back; the sizes of all passes tried."""
    tried: list[int] = []
    forward = TrainedModel.forward

    def limited(self: TrainedModel, batch: Any, *more: Any) -> Any:
        loss = forward(self, batch, *more)
        if self.training and torch.is_grad_enabled():
            tried.append(batch.token_ids.shape[1])
            if tried[-1] > tokens:
                loss.register_hook(lambda _: (_ for _ in ()).throw(error))
        return loss

    monkeypatch.setattr(TrainedModel, "forward", limited)
    return tried


@pytest.mark.parametrize("error", [GPU_ERROR, CPU_ERROR], ids=["GPU", "CPU"])
def test_a_run_whose_passes_were_halved_equals_one_that_had_small_ones_all_along(
    error: Exception, recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        tried = small_memory(patch, 640, error)
        halved, said = run(recipe_of("halved"))
    (line,) = (line for line in said.splitlines() if "memory ran out" in line)
    assert line.startswith(f"Step 1: memory ran out in a pass of up to {tried[0]:,} tokens ({str(error)[:20]}")
    kept = read_progress(list_checkpoints(halved)[-1]).fitted["tokens_per_pass"]
    assert f"from here on a pass has at most {kept} tokens instead of 1,536 (train.tokens_per_pass)" in line
    assert max(tried[1:]) <= 640, "one pass was tried in vain"
    small, unsaid = run(recipe_of("small", f"train.tokens_per_pass={kept}"))
    assert "memory" not in unsaid.replace("GB of memory", "")
    assert weights(halved) == weights(small)
    assert losses(halved) == losses(small)


def test_memory_may_run_out_in_any_step_and_again(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    take_step = loop_module.take_step

    def failing(setup: Any, batches: Any, settings: Train) -> Any:
        taken.append(settings.tokens_per_pass)
        with monkeypatch.context() as patch:
            if len(taken) in (3, 5):
                small_memory(patch, 0)
            return take_step(setup, batches, settings)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "take_step", failing)
        folder, said = run(recipe_of("twice"))
    assert said.count("memory ran out") == 2
    assert len(set(taken)) == 3 and taken == sorted(taken, reverse=True)
    assert len(taken) == 6 + 2
    assert [kind for kind, _ in losses(folder)].count("train") == 6


def test_a_resumed_run_keeps_its_small_passes_and_ends_in_the_same_bits(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        small_memory(patch, 640)
        straight, _ = run(recipe_of("straight"))
        again, said = run(recipe_of("straight"), resume=4)
    assert "Going on from step 4" in said
    assert "memory ran out" not in said
    with monkeypatch.context() as patch:
        small_memory(patch, 640)
        whole, _ = run(recipe_of("whole"))
    assert weights(whole) == weights(again)
    assert losses(whole) == losses(again)
    assert straight.path == again.path


def test_where_one_row_alone_is_too_much_the_end_names_what_helps(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = small_memory(monkeypatch, 0)
    with pytest.raises(RunError) as raised:
        run(recipe_of("none"))
    text = str(raised.value)
    assert "No pass of the step has more than one row" in text
    assert "CUDA out of memory" in text
    for cure in (
        "train.gradient_checkpointing=true",
        "data.max_length",
        "model.quantize",
        "weitiao check RECIPE --plan",
    ):
        assert cure in text
    assert len(tried) > 2


def test_a_recipe_that_never_fits_itself_ends(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = small_memory(monkeypatch, 640)
    with pytest.raises(RunError, match="fit_memory=never keeps the passes as they are"):
        run(recipe_of("never", "train.fit_memory=never"))
    assert len(tried) == 1


def test_other_faults_stay_faults(recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(recipe_of("other"))


def test_memory_that_runs_out_in_the_update_is_no_matter_of_passes(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise GPU_ERROR

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RunError, match="Step 1: memory ran out while the weights were updated"):
        run(recipe_of("update"))


def test_scoring_asks_fewer_rows_together_where_memory_runs_out(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("data.held_out=0.3", "train.evaluate_rows=0")
    plain, _ = run(recipe_of("plain", *words))
    reply_all, asked = predict_module.reply_all, []

    def limited(*known: Any, max_rows: int, **more: Any) -> Any:
        asked.append(max_rows)
        if max_rows > 2:
            raise GPU_ERROR
        return reply_all(*known, max_rows=max_rows, **more)

    monkeypatch.setattr(predict_module, "reply_all", limited)
    fewer, said = run(recipe_of("fewer", *words))
    assert asked[-1] in (1, 2) and asked.count(asked[-1]) == 2, "kept for the second scoring"
    assert f"from here on they are {asked[-1]} (generate.batch_rows)" in said
    assert weights(fewer) == weights(plain)
    assert [line["overall"] for line in lines_of(fewer, "dev")] == [line["overall"] for line in lines_of(plain, "dev")]


def test_errors_of_memory_are_known() -> None:
    for error in (GPU_ERROR, CPU_ERROR, MemoryError(), RuntimeError("CUDA error: out of memory\nCUDA kernel errors")):
        assert ran_out_of_memory(error)
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    assert ran_out_of_memory(raised.value)
    for other in (RuntimeError("memory format channels_last"), ValueError("can't allocate memory"), KeyError("memory")):
        assert not ran_out_of_memory(other)


def test_what_a_run_was_fitted_to_is_kept_and_may_be_made_smaller() -> None:
    recipe = Train(tokens_per_pass=1024)
    fitted = fitted_of(recipe, recipe.model_copy(update={"tokens_per_pass": 300, "gradient_checkpointing": True}))
    assert fitted == {"tokens_per_pass": 300, "gradient_checkpointing": True}
    assert fitted_of(recipe, recipe) == {}
    again = with_fitted(Train(tokens_per_pass=200, gradient_checkpointing="selective"), fitted)
    assert (again.tokens_per_pass, again.gradient_checkpointing) == (200, True)
    assert with_fitted(recipe, {}) == recipe


def drive(folder: Path, script: str, *words: str, processes: int = 1) -> str:
    """What `weitiao train recipe.yaml` says in processes of its own, each of which runs `script` first."""
    (folder / "driver.py").write_text(f"{script}\nfrom weitiao.cli import app\napp()\n", encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "driver.py", "train", "recipe.yaml", *words]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "1000"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stderr


LIMITED = """
import resource
from pathlib import Path
from weitiao.train import loop

take_step, gone = loop.take_step, []

def limited(*known):
    if not gone:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (120 << 20), resource.RLIM_INFINITY))
        gone.append(None)
    result = take_step(*known)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return result

loop.take_step = limited
"""


@pytest.mark.slow
def test_a_process_that_the_system_gives_no_more_memory_goes_on(tmp_path: Path, tiny_qwen2_folder: Path) -> None:
    write_recipe(tmp_path, tiny_qwen2_folder, epochs=1, batch_size=32, tokens_per_pass=100_000, evaluate_every="never")
    rows = [{"text": f"{number}" + "球门网队" * 60, "label": "是" if number % 2 else "否"} for number in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = drive(tmp_path, LIMITED, "train.shared_prompts=never")
    line = next(line for line in said.splitlines() if "memory ran out" in line)
    assert "DefaultCPUAllocator: can't allocate memory" in line
    halved = RunFolder(tmp_path / "runs/whole")
    kept = read_progress(list_checkpoints(halved)[-1]).fitted["tokens_per_pass"]
    assert kept < 20_000
    run(load_recipe("recipe.yaml", ["name=small", "train.shared_prompts=never", f"train.tokens_per_pass={kept}"]))
    assert weights(halved) == weights(RunFolder(tmp_path / "runs/small"))


SMALL_IN_THE_SECOND = """
import os
import torch
from weitiao.train.model import TrainedModel

forward = TrainedModel.forward

def limited(self, batch, *more):
    if os.environ["RANK"] == "1" and self.training and torch.is_grad_enabled() and batch.token_ids.shape[1] > 256:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, batch, *more)

TrainedModel.forward = limited
"""


@pytest.mark.slow
def test_one_process_that_runs_out_makes_all_take_smaller_passes(tmp_path: Path, tiny_qwen2_folder: Path) -> None:
    write_recipe(tmp_path, tiny_qwen2_folder, epochs=1, shared_prompts="never")
    said = drive(tmp_path, SMALL_IN_THE_SECOND, processes=2)
    assert said.count("Step 1: memory ran out") == 1, "the first process speaks for both"
    assert "(in another process;" in said
    kept = read_progress(list_checkpoints(run_of(tmp_path, "whole"))[-1]).fitted["tokens_per_pass"]
    train(tmp_path, "name=small", f"train.tokens_per_pass={kept}", processes=2)
    assert furthest(run_of(tmp_path, "whole"), run_of(tmp_path, "small")) == 0
    assert [line["loss"] for line in lines_of(run_of(tmp_path, "whole"), "train")] == [
        line["loss"] for line in lines_of(run_of(tmp_path, "small"), "train")
    ]
