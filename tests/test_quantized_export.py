"""Runs on packed base models as whole models: merged onto unpacked weights or float ones, and how far they are off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from command_line import quick_training, succeed, write_topics
from packed_models import packings, write_instruct_folder
from test_export import logits_of, make_run, stored_weights
from test_quantized_bases import save_packed
from weitiao.apply import open_run
from weitiao.contract import Contract
from weitiao.errors import ModelError
from weitiao.export import export_run
from weitiao.models.opening import open_model
from weitiao.models.packed_layers import model_packing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instruct_folder(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.mark.parametrize("name", packings("bnb_nf4_double"))
def test_a_recipe_on_four_bits_is_trained_scored_between_steps_evaluated_and_exported(
    name: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_topics(Path("train.jsonl"))
    settings = ["model.dtype=bfloat16", "train.epochs=2", "train.compile=never", "train.evaluate_every=epoch"]
    with quick_training():
        succeed("init", "train.jsonl", "--model", model_folder)
        succeed("train", "recipe.yaml", f"model.quantize={name}", *settings)
        [run] = Path("runs").iterdir()
        scores = succeed("evaluate", run)
        succeed("export", run, "whole")
    assert Contract.read(run / "contract.json").quantize == name
    assert "base" in scores
    assert model_packing(open_model("whole").model) is None


@pytest.mark.parametrize("name", packings("bnb_nf4_double", "bnb_fp4", "torchao_int8"))
@pytest.mark.parametrize("dora", [False, True])
def test_a_run_on_packed_weights_is_merged_into_what_they_stand_for(
    name: str, dora: bool, tmp_path: Path, model_folder: Path
) -> None:
    run = make_run(tmp_path / "run", model_folder, quantize=name, dora=dora)
    assert Contract.read(run / "contract.json").quantize == name
    assert model_packing(open_run(run)[2].model) == name
    done = export_run(run, tmp_path / "out")
    assert done.difference <= 1e-4 and done.tolerance == 1e-4 and done.moved is None
    assert {tensor.dtype for tensor in stored_weights(tmp_path / "out").values()} == {torch.float32}
    assert Contract.read(tmp_path / "out" / "contract.json").quantize == "none"
    assert '"quantization_config"' not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("name", packings("int4", "bnb_nf4_double", "torchao_int8"))
def test_merging_onto_the_float_weights_is_told_apart_and_measured(
    name: str, tmp_path: Path, model_folder: Path
) -> None:
    run = make_run(tmp_path / "run", model_folder, quantize=name)
    printed = succeed("export", run, tmp_path / "out", "--onto", "float")
    assert "the base model's own by" in " ".join(printed.split())
    done = export_run(run, tmp_path / "again", onto="float")
    assert done.moved is not None and done.moved > 1e-3
    assert 1e-3 < done.difference <= done.tolerance == pytest.approx(3 * done.moved)
    plain = make_run(tmp_path / "plain", model_folder)  # the same adapter, on weights that were never packed
    wanted = logits_of(open_run(plain)[2].model)
    assert torch.allclose(logits_of(open_model(str(tmp_path / "again"), dtype="float32").model), wanted, atol=1e-4)


@pytest.mark.parametrize("name", packings("bnb_int8"))
def test_layers_that_round_their_inputs_give_the_tolerance_themselves(
    name: str, tmp_path: Path, model_folder: Path
) -> None:
    done = export_run(make_run(tmp_path / "run", model_folder, quantize=name), tmp_path / "out")
    assert done.moved is not None and 1e-4 < done.difference <= done.tolerance < 0.2


@pytest.mark.parametrize("name", packings("bnb_nf4_double", "torchao_int8"))
def test_a_run_on_a_base_stored_packed_is_merged_too(name: str, tmp_path: Path, model_folder: Path) -> None:
    stored = save_packed(model_folder, tmp_path / "stored", name)
    run = make_run(tmp_path / "run", stored)
    done = export_run(run, tmp_path / "out")
    assert done.difference <= 1e-4
    with pytest.raises(ModelError, match=rf"is stored packed \({name}\), so there are no float weights of it"):
        export_run(run, tmp_path / "float", onto="float")
    assert not (tmp_path / "float").exists()


def test_float_weights_are_no_choice_where_nothing_was_packed(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ModelError, match="is not packed, so float weights are what is merged onto anyway"):
        export_run(make_run(tmp_path / "run", model_folder), tmp_path / "out", onto="float")
