"""The optimiser, the gradient's norm and the schedule of an original become those of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreign_settings import migrate, write
from weitiao.migrate import Migration

CONFIG = """
model_name_or_path: Qwen/Qwen2.5-0.5B
stage: sft
dataset: d.jsonl
finetuning_type: lora
lr_scheduler_type: cosine
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def migrated(more: str) -> Migration:
    return migrate(write("c.yaml", CONFIG + more), data=("d.jsonl",), rows=100)


@pytest.mark.parametrize(
    ("setting", "optimiser"),
    [
        ("optim: adamw_8bit", "adamw_8bit"),
        ("optim: adamw_bnb_8bit", "adamw_8bit"),
        ("optim: paged_adamw_32bit", "paged_adamw"),
        ("optim: paged_adamw_8bit", "paged_adamw_8bit"),
        ("optim: adafactor", "adafactor"),
        ("adafactor: true\noptim: adamw_torch", "adafactor"),
        ("use_muon: true", "muon"),
        ("use_muon: false\noptim: adamw_torch", "adamw"),
    ],
)
def test_the_optimiser_is_carried(setting: str, optimiser: str) -> None:
    done = migrated(setting)
    assert done.recipe.train.optimiser == optimiser
    assert done.recipe.train.schedule == "cosine"
    carried = [entry for entry in done.carried if entry.place == "train.optimiser"]
    assert len(carried) == (optimiser != "adamw")


def test_schedule_free_brings_its_schedule_and_the_difference_is_told() -> None:
    done = migrated("optim: schedule_free_adamw")
    assert (done.recipe.train.optimiser, done.recipe.train.schedule) == ("schedule_free_adamw", "constant")
    assert "The original's learning rate falls too (cosine)" in " ".join(done.text.replace("#", " ").split())


def test_an_optimiser_that_is_not_there_is_named() -> None:
    done = migrated("optim: lomo\nuse_galore: true")
    assert done.recipe.train.optimiser == "adamw"
    assert {entry.setting.partition(":")[0] for entry in done.left} >= {"optim", "use_galore"}


@pytest.mark.parametrize(("norm", "kept"), [("0", None), ("0.0", None), ("0.3", 0.3)])
def test_a_gradient_that_was_not_scaled_down_is_not(norm: str, kept: float | None) -> None:
    done = migrated(f"max_grad_norm: {norm}")
    assert done.recipe.train.max_grad_norm == kept
