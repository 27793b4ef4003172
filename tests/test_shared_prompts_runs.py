"""Whole trainings on questions over few documents: shared or not they learn the same, resumed too."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from command_line import quick_training
from weitiao.recipe import Recipe, make_recipe
from weitiao.runs import RunFolder
from weitiao.train import loop as loop_module
from weitiao.tune import tune_model

CHARACTERS = "春夏秋冬山川河海日月星辰风雨雷电东西南北上下左右花草树木鸟兽虫鱼金银铜铁红黄蓝绿父母兄弟姐妹师友"
QUESTIONS = ("第一个字是什么？", "最后一个字是什么？", "第三个字是什么？", "倒数第二个字是什么？")


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder of its own, with one thread; no plot is drawn and no machine is measured."""
    monkeypatch.chdir(tmp_path)
    with quick_training():
        yield


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four questions over each of six documents."""
    draw = random.Random(0)
    lines = []
    for _ in range(6):
        text = "".join(draw.choices(CHARACTERS, k=80))
        for question, place in zip(QUESTIONS, (0, -1, 2, -2), strict=True):
            lines.append(json.dumps({"context": f"{text}\n{question}", "target": text[place]}, ensure_ascii=False))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def recipe_for(model: Path, rows: Path, name: str, *overrides: str) -> Recipe:
    values = {
        "name": name,
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(rows)},
        "train": {
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "save_every": 2,
            "evaluate_every": "never",
            "compile": "never",
            "group_prompts": True,
        },
    }
    return make_recipe(values, overrides)


def run(recipe: Recipe, *, resume: bool = False) -> tuple[RunFolder, str]:
    screen = io.StringIO()
    return tune_model(recipe, resume=resume, console=Console(file=screen, width=400)), screen.getvalue()


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in folder.read_metrics() if line["kind"] == "train"]


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_training_that_shares_learns_what_one_that_does_not_learns(
    family: str, rows: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{family}_folder")
    shared, said = run(recipe_for(model, rows, "shared"))
    whole, unsaid = run(recipe_for(model, rows, "whole", "train.shared_prompts=never"))
    assert said.count("Rows begin alike: what they share is computed once") == 1
    assert "begin alike" not in unsaid
    assert losses(shared) == pytest.approx(losses(whole), rel=1e-3)
    assert losses(shared)[-1] < losses(shared)[0]


def test_a_resumed_training_that_shares_ends_in_the_same_bits(
    tiny_qwen2_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, _ = run(recipe_for(tiny_qwen2_folder, rows, "straight"))
    steps: list[int] = []
    take_step = loop_module.take_step

    def broken_off(*known: object) -> object:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return take_step(*known)  # type: ignore[arg-type]

    monkeypatch.setattr(loop_module, "take_step", broken_off)
    recipe = recipe_for(tiny_qwen2_folder, rows, "broken")
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    broken, said = run(recipe, resume=True)
    assert "Going on from step 4" in said
    files = [(each.adapter / "adapter_model.safetensors").read_bytes() for each in (straight, broken)]
    assert files[0] == files[1]
