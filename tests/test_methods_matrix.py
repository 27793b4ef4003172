"""Every way of tuning on every family: it learns, opens again, merges, goes on, and computes as the plain way does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from command_line import quick_training
from tuned_models import (
    FAMILIES,
    LEARNT_TOKENS,
    MERGING,
    METHODS,
    eight_rows,
    fresh,
    gradients,
    learn,
    logits_of,
    set_up_for,
    settings_for,
)
from weitiao.models.adapters import load_adapter, save_adapter, without_adapter
from weitiao.runs import RunFolder
from weitiao.train.loop import train
from weitiao.tuning.methods import add_adapter

pytestmark = pytest.mark.slow

CASES = [pytest.param(family, name, id=f"{family}-{name}") for family in FAMILIES for name in METHODS]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with quick_training():
        yield


def goal(family: str, name: str) -> float:
    """The share of the first loss that may be left after 120 steps.

    The output layer of a frozen random model lets no probability come near 1: a share of 0.06 is the least. Tokens
    before the row and factors alone reach less; tokens least of all in ChatGLM-6B, whose residual stream is ten times
    as strong as its attention; with a weaker one they reach as much as elsewhere, as a test below shows.
    """
    if name in LEARNT_TOKENS:
        return 0.95 if family == "chatglm" else 0.5
    return 0.3 if name in ("ia3", "ptuning_v2", "projected") else 0.1


@pytest.mark.parametrize(("family", "name"), CASES)
def test_eight_rows_are_learnt_and_the_saved_adapter_computes_the_same(family: str, name: str, tmp_path: Path) -> None:
    rows, settings = eight_rows(family), settings_for(name)
    base = logits_of(fresh(family), rows)
    tuned = add_adapter(fresh(family), METHODS[name], seed=1)
    setup = set_up_for(tuned, settings)
    losses = learn(setup, rows, settings, steps=120)
    assert losses[-1] < goal(family, name) * losses[0]

    save_adapter(tuned, tmp_path)
    again = load_adapter(fresh(family), tmp_path).eval()
    with setup.trained.generating() as generating:
        learnt = logits_of(tuned if isinstance(tuned, PeftModel) else generating, rows)
    torch.testing.assert_close(logits_of(again, rows), learnt, rtol=1e-4, atol=1e-4)
    with without_adapter(again):
        assert torch.equal(logits_of(again, rows), base)
    torch.testing.assert_close(logits_of(again, rows), learnt, rtol=1e-4, atol=1e-4)

    if name in MERGING and isinstance(again, PeftModel):
        merged = again.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(logits_of(merged, rows), learnt, rtol=1e-3, atol=1e-3)


def test_learnt_tokens_reach_in_chatglm_what_they_do_elsewhere_once_its_residual_stream_is_no_stronger() -> None:
    rows, settings = eight_rows("chatglm"), settings_for("prompt_tuning")
    model = fresh("chatglm")
    for block in model.get_decoder().layers:
        block.alpha = 1.0
    losses = learn(
        set_up_for(add_adapter(model, METHODS["prompt_tuning"], seed=1), settings), rows, settings, steps=120
    )
    assert losses[-1] < goal("qwen2", "prompt_tuning") * losses[0]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_recomputing_activations_changes_no_gradient(family: str, name: str) -> None:
    rows = eight_rows(family)
    found = []
    for checkpointing in (False, True):
        settings = settings_for(name, checkpointing=checkpointing)
        setup = set_up_for(add_adapter(fresh(family), METHODS[name], seed=1), settings)
        learn(setup, rows, settings, steps=3)  # LoRA's A has no gradient while B is zero
        found.append(gradients(setup, rows, settings))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert plain
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_packed_rows_have_the_gradient_of_single_ones(family: str, name: str) -> None:
    rows = eight_rows(family)
    found = []
    for packing in (True, False):
        settings = settings_for(name).model_copy(update={"packing": packing})
        setup = set_up_for(add_adapter(fresh(family), METHODS[name], seed=1), settings)
        found.append(gradients(setup, rows, settings))
    packed, single = found
    assert packed.keys() == single.keys()
    for key, gradient in packed.items():
        torch.testing.assert_close(single[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_training_gone_on_with_ends_in_the_bits_of_one_never_stopped(family: str, name: str, tmp_path: Path) -> None:
    rows = eight_rows(family)
    settings = settings_for(name).model_copy(
        update={"batch_size": 2, "epochs": 4, "save_every": 6, "keep_checkpoints": 9, "compile": "never"}
    )

    def tune(folder: Path) -> dict[str, bytes]:
        run = RunFolder(folder)
        train(
            add_adapter(fresh(family), METHODS[name], seed=1),
            rows,
            [1.0] * len(rows),
            [],
            settings=settings,
            run=run,
            console=Console(quiet=True),
        )
        return {file.name: file.read_bytes() for file in run.adapter.glob("*.safetensors")}

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    expected = tune(whole)
    stopped.mkdir()
    shutil.copytree(whole / "checkpoints" / "step-000006", stopped / "checkpoints" / "step-000006")
    assert tune(stopped) == expected
    assert expected
