"""Every way of tuning on every foreign packing and family of tiny models: gradients recomputed, saved, merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from command_line import quick_training
from packed_models import packed, packings
from tuned_models import FAMILIES, METHODS, eight_rows, gradients, learn, logits_of, set_up_for, settings_for
from weitiao.models.adapters import load_adapter, save_adapter, without_adapter
from weitiao.models.packed_layers import unpack_model
from weitiao.recipe import Freeze, Full
from weitiao.tuning.methods import add_adapter

pytestmark = pytest.mark.slow

LEARNING = [name for name, method in METHODS.items() if not isinstance(method, Freeze | Full)]
PACKED = packings("bnb_int8", "bnb_nf4_double", "torchao_int8")


@pytest.fixture(autouse=True)
def _light() -> Iterator[None]:
    with quick_training():
        yield


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("method", LEARNING)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_changes_no_gradient(family: str, method: str, name: str) -> None:
    rows, found = eight_rows(family), []
    for checkpointing in (False, True):
        settings = settings_for(method, checkpointing=checkpointing)
        setup = set_up_for(add_adapter(packed(family, name), METHODS[method], seed=1), settings)
        learn(setup, rows, settings, steps=3)  # LoRA's A has no gradient while B is zero
        found.append(gradients(setup, rows, settings))
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and plain
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("method", LEARNING)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_learnt_and_the_saved_adapter_computes_the_same(
    family: str, method: str, name: str, tmp_path: Path
) -> None:
    rows, settings = eight_rows(family), settings_for(method)
    base = logits_of(packed(family, name), rows)
    tuned = add_adapter(packed(family, name), METHODS[method], seed=1)
    setup = set_up_for(tuned, settings)
    losses = learn(setup, rows, settings, steps=40)
    assert losses[-1] < losses[0]
    save_adapter(tuned, tmp_path)
    again = load_adapter(packed(family, name), tmp_path).eval()
    with setup.trained.generating() as generating:
        learnt = logits_of(tuned if isinstance(tuned, PeftModel) else generating, rows)
    torch.testing.assert_close(logits_of(again, rows), learnt, rtol=1e-5, atol=1e-5)
    with without_adapter(again):
        assert torch.equal(logits_of(again, rows), base)
    if isinstance(again, PeftModel):
        unpack_model(again, torch.float32)
        merged = logits_of(again.merge_and_unload(safe_merge=True), rows)
        far = float((merged - learnt).pow(2).mean().sqrt() / learnt.std())
        assert far < (0.15 if name == "bnb_int8" else 1e-4)  # LLM.int8 rounds the inputs of its layers too
