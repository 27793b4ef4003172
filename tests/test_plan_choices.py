"""What `weitiao check --plan` says where memory is scarce or plenty: the settings that fit, and what each brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from weitiao import probe
from weitiao.check.plan import read_bytes
from weitiao.cli import app
from weitiao.errors import RecipeError
from weitiao.recipe import Train
from weitiao.train import fitting
from weitiao.train import plan as plan_module
from weitiao.train.fitting import Need
from weitiao.train.footprint import Footprint

MB = 1 << 20
PROGRAM = 400 * MB
PER_TOKEN = {False: MB, "selective": MB / 2, True: MB / 4}
"""What a token of a pass takes here: figures as of a large model, so that what is chosen can be told in advance."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "_matrix_peak", lambda dtype, device: 1e10)

    def need(setup: Any, examples: Any, settings: Train, **_: Any) -> Need:
        return Need(besides=PROGRAM, footprint=Footprint(fixed=0, per_token=PER_TOKEN[settings.gradient_checkpointing]))

    monkeypatch.setattr(fitting, "measure_need", need)


@pytest.fixture
def recipe(tmp_path: Path, tiny_qwen2_folder: Path) -> str:
    """Sixteen rows of 129 to 256 tokens, all in one pass of the one step of each of two epochs."""
    rows = [{"text": f"{number}" + "球门网队星光" * 4, "label": "是" if number % 2 else "否"} for number in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model": {"path": str(tiny_qwen2_folder), "dtype": "float32"},
        "data": {"train": "rows.jsonl", "held_out": 0},
        "train": {
            "epochs": 2, "batch_size": 16, "tokens_per_pass": 4096, "compile": "never", "shared_prompts": "never",
            "evaluate_every": "never",
        },
    }  # fmt: skip
    Path("recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    return "recipe.yaml"


def check(*words: str) -> Result:
    return CliRunner().invoke(app, ["check", *words], catch_exceptions=False)


def found_by(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(check(*words, "--json").stdout)
    return found


def written_bytes(recipe: str) -> int:
    return int(found_by(recipe, "--memory", "1MB")["plan"]["choices"][0]["bytes"])


@pytest.mark.parametrize("scarce", ["--memory", "here"])
def test_what_training_takes_by_itself_is_told_with_figures_and_no_error(
    scarce: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [recipe, "--memory", "900MB"]
    if scarce == "here":
        monkeypatch.setattr(probe, "limit_bytes", lambda device: 900 * MB)
        words = [recipe, "--plan"]
    found = found_by(*words)
    assert check(*words).exit_code == 0
    as_written, taken = found["plan"]["choices"][:2]
    assert (as_written["changes"], as_written["fits"], as_written["seconds"]) == ([], False, None)
    assert taken["changes"] == ["train.tokens_per_pass=384"]
    assert (taken["applied"], taken["fits"], taken["same_result"]) == (True, True, True)
    assert taken["bytes"] == PROGRAM + 384 * MB
    assert found["plan"]["seconds"]["steps"] == taken["seconds"]
    assert found["plan"]["memory"] == {"bytes": as_written["bytes"], "limit": 900 * MB, "measured": False}
    (finding,) = (one for one in found["findings"] if one["code"] == "memory")
    assert finding["grade"] == "warning"
    assert finding["fix"] == "Write it into the recipe: train.tokens_per_pass=384."
    printed = " ".join(check(*words).stdout.split())
    assert "as written: 2" in printed and ": too much" in printed
    assert "with train.tokens_per_pass=384: 0.8 GB" in printed
    assert "weitiao train takes this by itself" in printed


def test_layers_are_computed_once_more_where_the_smallest_passes_are_too_large(recipe: str) -> None:
    found = found_by(recipe, "--memory", "560MB")
    (taken,) = (one for one in found["plan"]["choices"] if one["applied"])
    assert taken["changes"] == ["train.tokens_per_pass=256", "train.gradient_checkpointing=selective"]
    assert taken["bytes"] == PROGRAM + 128 * MB


def test_a_recipe_that_never_fits_itself_is_told_what_would(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "limit_bytes", lambda device: 900 * MB)
    result = check(recipe, "--plan", "train.fit_memory=never", "--json")
    assert result.exit_code == 1
    choices = json.loads(result.stdout)["plan"]["choices"]
    assert [(one["changes"], one["applied"], one["fits"]) for one in choices[:2]] == [
        ([], False, False), (["train.tokens_per_pass=384"], False, True),
    ]  # fmt: skip


def test_what_no_change_makes_fit_is_an_error(recipe: str) -> None:
    result = check(recipe, "--memory", "300MB", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not any(one["fits"] for one in found["plan"]["choices"])
    least = "train.tokens_per_pass=256 train.gradient_checkpointing=true"
    assert least in {" ".join(one["changes"]) for one in found["plan"]["choices"]}
    (finding,) = (one for one in found["findings"] if one["code"] == "memory")
    assert finding["grade"] == "error"


def test_a_larger_machine_than_this_one_can_be_planned_for(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "limit_bytes", lambda device: 500 * MB)
    found = found_by(recipe, "--memory", "64GB")
    assert found["ok"] is True
    assert found["plan"]["memory"] == {"bytes": written_bytes(recipe), "limit": 64 << 30, "measured": False}
    assert found["plan"]["seconds"] is None, "there was no room for a step here"


@pytest.mark.parametrize("faster", [True, False])
def test_larger_passes_are_told_where_they_are_faster(
    faster: bool, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_steps(setup: Any, prepared: Any, settings: Train, **_: Any) -> float:
        return 1.0 if (settings.tokens_per_pass == 256) is faster else 0.5

    monkeypatch.setattr(probe, "_time_steps", time_steps)
    choices = found_by(recipe, "--plan", "train.tokens_per_pass=256")["plan"]["choices"]
    told = [one for one in choices if one["faster"]]
    assert len(told) == faster
    if faster:
        assert told[0]["changes"] == ["train.tokens_per_pass=1024"]
        assert told[0]["fits"] and told[0]["bytes"] > choices[0]["bytes"]
        assert told[0]["seconds"] == 2 * 0.5


def test_amounts_of_memory_are_read() -> None:
    assert [read_bytes(text) for text in ("8GB", "8", "8 gib", "0.5G", "512MB")] == [
        8 << 30, 8 << 30, 8 << 30, 1 << 29, 512 << 20,
    ]  # fmt: skip
    for text in ("", "much", "8TB", "-1GB", "0GB"):
        with pytest.raises(RecipeError, match="is no amount of memory"):
            read_bytes(text)
