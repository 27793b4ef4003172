"""DeepSpeed under a training of several processes: its configuration is taken or refused, and it trains what one does.

The slow tests need deepspeed, which `make slow` installs; on a CPU it compiles an operator of its own first.
"""

from __future__ import annotations

import json
import re
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from launching import PATIENCE_SECONDS, agree, lines_of, run_of, start, train, wait_for_step, write_recipe
from weitiao.errors import RecipeError, RunError
from weitiao.recipe import Train, make_recipe
from weitiao.train.checkpoint import list_checkpoints
from weitiao.train.deepspeed_file import divides, read_deepspeed
from weitiao.train.ranks import ALONE

AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
}
"""As people have it: the recipe decides all but how gradients travel."""

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (make slow)")


def configured(folder: Path, **changes: Any) -> str:
    """A configuration as `AUTO`, with `changes`; "stage" is that of ZeRO."""
    stage = changes.pop("stage", 2)
    zero = {**AUTO["zero_optimization"], "stage": stage, **changes.pop("zero", {})}
    file = folder / f"ds_zero_{stage}.json"
    file.write_text(json.dumps({**AUTO, "zero_optimization": zero, **changes}), encoding="utf-8")
    return str(file)


def test_what_is_auto_becomes_what_the_recipe_says(tmp_path: Path) -> None:
    file = read_deepspeed(Train(deepspeed=configured(tmp_path), max_grad_norm=0.5), ALONE)
    assert file is not None
    assert file.stage == 2
    assert file.engine["gradient_clipping"] == 0.5
    assert "round_robin_gradients" not in file.engine["zero_optimization"]
    assert "auto" not in json.dumps(dict(file.engine))
    assert file.engine["zero_optimization"]["allgather_bucket_size"] == 5e8
    file.require_dtype(torch.float32, torch.device("cpu"))
    file.require_dtype(torch.bfloat16, torch.device("cuda"))
    with pytest.raises(RunError, match="needs a loss scale"):
        file.require_dtype(torch.float16, torch.device("cuda"))
    assert read_deepspeed(Train(), ALONE) is None
    assert not divides(Train(deepspeed="ds.json"), ALONE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stage": 3}, "Spread the weights with train.shard: fsdp instead"),
        ({"stage": 0}, "zero_optimization.stage 0; weitiao takes 1 and 2"),
        ({"zero": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer, which is not done"),
        ({"train_batch_size": 64}, "train_batch_size is 64, train.batch_size 8 rows"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, and train.tokens_per_pass"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3, train.max_grad_norm 1.0"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion', train.optimiser adamw"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "optimizer.params.lr is 0.001, in the recipe 0.0005"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.type is 'WarmupDecayLR', train.schedule cosine"),
        ({"activation_checkpointing": {"partition_activations": True}}, "says activation_checkpointing, which weitiao"),
    ],
)
def test_what_contradicts_the_recipe_or_would_be_ignored_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RunError, match=re.escape(sentence)):
        read_deepspeed(Train(deepspeed=configured(tmp_path, **changes)), ALONE)


def test_what_says_the_same_as_the_recipe_is_taken(tmp_path: Path) -> None:
    same = {"train_batch_size": 8, "gradient_clipping": 1.0, "scheduler": {"type": "WarmupCosineLR"}}
    optimiser = {"type": "AdamW", "params": {"lr": 5e-4, "weight_decay": 0.0, "betas": [0.9, 0.999]}}
    bf16 = {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
    file = read_deepspeed(Train(deepspeed=configured(tmp_path, **same, optimizer=optimiser, **bf16)), ALONE)
    assert file is not None
    with pytest.raises(RunError, match="computes in bfloat16, but it computes in float32"):
        file.require_dtype(torch.float32, torch.device("cpu"))


def test_a_file_that_cannot_be_read_and_other_switches_are_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read: No such file"):
        read_deepspeed(Train(deepspeed=str(tmp_path / "none.json")), ALONE)
    (tmp_path / "half.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="is not JSON"):
        read_deepspeed(Train(deepspeed=str(tmp_path / "half.json")), ALONE)
    with pytest.raises(RunError, match=r"train\.optimiser=muon does not go with"):
        read_deepspeed(Train(deepspeed=configured(tmp_path), optimiser="muon"), ALONE)
    with pytest.raises(RunError, match=r"train\.compile=always does not go with"):
        read_deepspeed(Train(deepspeed=configured(tmp_path), compile="always"), ALONE)
    both = {"name": "x", "model": {"path": "m"}, "data": {"train": "r"}, "train": {"shard": "fsdp", "deepspeed": "d"}}
    with pytest.raises(RecipeError, match=r"what train\.shard: fsdp divides already"):
        make_recipe(both)


@pytest.fixture(scope="module", params=["lora", "full"])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_gemma3_folder: Path) -> Path:
    """Thirty steps with scorings, of an adapter or of all weights; runs/whole trained by one process."""
    folder = tmp_path_factory.mktemp(request.param)
    own = {"method": {"name": "full"}, "learning_rate": 1e-3} if request.param == "full" else {}
    # a step's last rows are few, so that one process computes passes of which nothing is learnt
    sizes = {"rows": 28, "epochs": 7.5, "batch_size": 9, "tokens_per_pass": 96, "evaluate_every": 10, "save_every": 5}
    write_recipe(folder, tiny_gemma3_folder, **sizes, **own)
    for stage in (1, 2):
        configured(folder, stage=stage)
    train(folder, "name=whole")
    assert len(lines_of(run_of(folder, "whole"), "train")) == 30
    return folder


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("stage", "processes"), [(1, 2), (2, 2), (2, 3)])
def test_thirty_steps_are_those_of_one_process(long: Path, stage: int, processes: int) -> None:
    name = f"zero{stage}of{processes}"
    said = train(long, f"name={name}", f"train.deepspeed=ds_zero_{stage}.json", processes=processes)
    agree(run_of(long, "whole"), run_of(long, name))
    assert said.count("Done in") == 1


@pytest.mark.slow
@needs_deepspeed
def test_a_run_goes_on_with_any_number_of_processes_and_without_deepspeed(long: Path) -> None:
    run, divided = run_of(long, "various"), "train.deepspeed=ds_zero_2.json"
    for step, words, processes in ((6, [divided], 2), (13, ["--resume", divided], 2), (21, ["--resume", divided], 3)):
        process = start(long, "name=various", *words, processes=processes)
        wait_for_step(run, step, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert "Stopped by SIGTERM. Go on with:" in said
    assert (list_checkpoints(run)[-1] / "weights.safetensors").exists()
    train(long, "name=various", "--resume")
    agree(run_of(long, "whole"), run)
