"""Models whose rows cannot be laid end to end are refused before anything is written; others are left as they were."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from weitiao.errors import ModelError
from weitiao.models import attention
from weitiao.models.opening import open_model
from weitiao.models.row_attention import row_attention
from weitiao.recipe import make_recipe
from weitiao.render.base import Example
from weitiao.runs import RunFolder
from weitiao.train.packing import check_packing
from weitiao.tune import tune_model

ROWS = [
    Example(token_ids=(2, 17, 9, 40, 7, 1), loss_mask=(False,) * 4 + (True,) * 2),
    Example(token_ids=(2, 33, 8, 21, 5, 6, 1), loss_mask=(False,) * 4 + (True,) * 3),
    Example(token_ids=(2,) * 60, loss_mask=(False,) * 50 + (True,) * 10),
]


def tiny_llama(**more: float) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes, **more)).eval()


def train(model: Path, rows: Path, *overrides: str) -> RunFolder:
    values = {"name": "tiny", "model": {"path": str(model), "dtype": "float32"}, "data": {"train": str(rows)}}
    fast = ("train.epochs=0.5", "train.evaluate_every=never", "train.compile=never")
    console = Console(file=io.StringIO(), width=200)
    return tune_model(make_recipe(values, (*fast, *overrides)), console=console)


@pytest.mark.parametrize("model", ["tiny_qwen2_folder", "tiny_gemma3_folder"])
def test_models_that_can_be_packed_are_left_as_they_were(model: str, request: pytest.FixtureRequest) -> None:
    opened = open_model(str(request.getfixturevalue(model)), dtype="float32").model
    assert isinstance(opened, PreTrainedModel)
    before = opened.config._attn_implementation
    check_packing(opened, ROWS)
    check_packing(opened, ROWS[:1])  # one row is taken twice
    assert (opened.config._attn_implementation, opened.training) == (before, False)


def test_soft_capped_attention_is_refused_before_anything_is_written_and_trains_without_packing(
    tiny_gemma2_folder: Path, sample_rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"softcap=50\.0.*train\.packing=false"):
        train(tiny_gemma2_folder, sample_rows)
    assert not Path("runs").exists()
    assert train(tiny_gemma2_folder, sample_rows, "train.packing=false").contract.is_file()


def test_dropout_in_the_attention_is_refused_though_it_only_shows_in_training() -> None:
    model = tiny_llama(attention_dropout=0.1)
    with pytest.raises(ModelError, match=r"dropout=0\.1.*train\.packing=false"):
        check_packing(model, ROWS)
    assert (model.config._attn_implementation, model.training) == ("sdpa", False)


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ModelError, match=r"BloomForCausalLM .*train\.packing=false"):
        check_packing(model, ROWS)


def test_a_model_whose_rows_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_row(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scaling: float, window: int) -> Tensor:
        return row_attention(q, k, v, scaling, window=window).transpose(1, 2)

    check_packing(tiny_llama(), ROWS)
    monkeypatch.setattr(attention, "packed_attention", one_row)
    with pytest.raises(ModelError, match="Rows laid end to end see each other in this model"):
        check_packing(tiny_llama(), ROWS)
