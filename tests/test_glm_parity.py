"""Every reference fixture of the GLM family through `weitiao.open_model`: logits, losses, greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weitiao
from glm_checkpoints import GOLDEN, Golden

FIXTURES = sorted(str(file.parent.relative_to(GOLDEN)) for file in GOLDEN.rglob("goldens.npz"))
if not FIXTURES:
    pytest.skip(f"the reference fixtures are not in {GOLDEN}", allow_module_level=True)

ASKED = ("input_ids", "attention_mask", "position_ids", "labels")


def given(golden: Golden, case: str) -> dict[str, Any]:
    return {key: golden[f"{case}/{key}"] for key in ASKED if f"{case}/{key}" in golden.arrays}


def far(ours: Tensor, golden: Golden, case: str) -> float:
    """The largest difference to the case's logits, at tokens that are no padding."""
    difference = (ours - golden[f"{case}/logits"]).abs()
    if f"{case}/valid" in golden.arrays:
        difference = difference[golden[f"{case}/valid"].bool()]
    return float(difference.max())


@pytest.mark.parametrize("name", FIXTURES)
def test_an_opened_fixture_computes_what_the_released_code_computed(name: str) -> None:
    golden = Golden(name)
    opened = weitiao.open_model(str(GOLDEN / Path(name)), dtype="float32", device="cpu")
    cases = [key.partition("/")[0] for key in golden.arrays if key.endswith("/logits")]
    compared = [case for case in cases if f"{case}/input_ids" in golden.arrays and not case.startswith("step")]
    assert {"single", "leftpad"} <= set(compared)
    for case in compared:
        with torch.no_grad():
            output = opened.model(**given(golden, case))
        assert far(output.logits, golden, case) <= 1e-4, case
        if f"{case}/loss" in golden.arrays:
            assert abs(float(output.loss) - float(golden[f"{case}/loss"])) <= 1e-5, case


@pytest.mark.parametrize("name", FIXTURES)
def test_an_opened_fixture_answers_greedily_as_the_released_code_did(name: str) -> None:
    golden = Golden(name)
    model = weitiao.open_model(str(GOLDEN / Path(name)), dtype="float32", device="cpu").model
    for case in golden.cases("gen_"):
        ends = golden.arrays.get(f"{case}/eos_token_id")
        stop = {} if ends is None else {"eos_token_id": int(ends)}
        answered = model.generate(**given(golden, case), max_new_tokens=12, do_sample=False, **stop)
        assert torch.equal(answered, golden[f"{case}/sequences"]), case
