"""Models packed by bitsandbytes and torchao: held in the memory that is told, tuned, scored between steps, saved."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from glm_checkpoints import make_config, make_weights, write_checkpoint
from packed_models import FOREIGN, logits, packed, packings, plain, write_instruct_folder
from tuned_models import METHODS, eight_rows, gradients, learn, logits_of, set_up_for, settings_for
from weitiao.errors import ModelError
from weitiao.generate.engine import Sampling, generate
from weitiao.models import quantizing
from weitiao.models.adapters import load_adapter, save_adapter, without_adapter
from weitiao.models.opening import loaded_bytes, open_model
from weitiao.models.packed_layers import float_weight, held_bytes, is_packed, model_packing, packing_of, unpack_model
from weitiao.models.quantizing import PACKINGS, loading_config, pack_model, require_packing
from weitiao.recipe import Freeze, Full, Lora
from weitiao.runs import RunFolder
from weitiao.train.loop import train
from weitiao.tuning.methods import add_adapter, count_parameters

WEIGHT_ONLY = tuple(name for name in FOREIGN if name != "bnb_int8")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def instruct_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instruct_folder(tmp_path_factory.mktemp("tiny") / "qwen2")


# What is packed, and what it holds


@pytest.mark.parametrize("name", packings(*FOREIGN))
@pytest.mark.parametrize("family", ["qwen2", "chatglm"])
def test_the_layers_are_packed_and_nothing_else(family: str, name: str) -> None:
    model, floats = packed(family, name), plain(family)
    found = {where for where, module in model.named_modules() if is_packed(module)}
    linear = {where for where, module in floats.named_modules() if isinstance(module, nn.Linear)}
    assert found == {where for where in linear if ".layers." in where}
    assert model_packing(model) == name
    assert count_parameters(model)[1] == count_parameters(floats)[1]
    assert held_bytes(floats) == sum(p.numel() * p.element_size() for p in (*floats.parameters(), *floats.buffers()))
    with pytest.raises(ModelError, match="is quantised already"):
        pack_model(model, PACKINGS[name])


@pytest.mark.parametrize("name", packings(*FOREIGN))
def test_an_unpacked_weight_is_near_the_one_that_was_packed_and_what_the_layer_computes_with(name: str) -> None:
    model, where = packed("qwen2", name), "model.layers.1.mlp.down_proj"
    before, layer = plain("qwen2").get_submodule(where).weight.detach(), model.get_submodule(where)
    weight = float_weight(layer, torch.float32)
    far = {"bnb_int8": 0.01, "torchao_int8": 0.01, "bnb_fp4": 0.14}.get(name, 0.1)
    assert 0 < float((weight - before).norm() / before.norm()) < far
    assert torch.equal(float_weight(layer, torch.bfloat16), weight.bfloat16())
    layer.train()  # in evaluation LLM.int8 rounds its inputs
    torch.testing.assert_close(layer(torch.eye(layer.in_features)).t(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", packings(*WEIGHT_ONLY))
def test_an_unpacked_model_computes_the_same(name: str) -> None:
    model = packed("gemma3", name)
    before = logits(model)
    assert len(unpack_model(model, torch.float32)) == 14 and model_packing(model) is None
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", packings(*FOREIGN))
def test_packed_while_read_is_packed_in_place_and_takes_the_memory_foretold(name: str, instruct_folder: Path) -> None:
    read = open_model(str(instruct_folder), dtype="float32", quantize=name).model
    assert not hasattr(read, "hf_quantizer") and not hasattr(read.config, "quantization_config")
    placed = AutoModelForCausalLM.from_pretrained(instruct_folder, dtype=torch.float32)
    pack_model(placed, PACKINGS[name])
    layers = [where for where, module in placed.named_modules() if is_packed(module)]
    assert layers == [where for where, module in read.named_modules() if is_packed(module)]
    for where in layers:
        one, other = (float_weight(model.get_submodule(where), torch.float32) for model in (read, placed))
        assert torch.equal(one, other)
    assert torch.equal(logits(read), logits(placed))
    assert held_bytes(read) == held_bytes(placed)
    # such small layers have few numbers for each scale, and bitsandbytes keeps tables beside each of them
    told = loaded_bytes(str(instruct_folder), dtype="float32", quantize=name)
    tables = sum(64 + (1024 if PACKINGS[name].double else 0) for _ in layers)
    assert told == pytest.approx(held_bytes(read) - tables * (PACKINGS[name].four_bit_type is not None), rel=0.05)


def test_a_large_layer_holds_its_packed_bytes_with_their_scales() -> None:
    pytest.importorskip("bitsandbytes")
    layer = nn.Linear(1024, 512, bias=False).requires_grad_(False)
    for name, each in (("bnb_int8", 1.0), ("bnb_nf4", 0.5625), ("bnb_nf4_double", 0.5159)):
        small = quantizing._bitsandbytes_layer(copy.deepcopy(layer), PACKINGS[name])
        assert packing_of(small) == name
        assert held_bytes(small) / layer.weight.numel() == pytest.approx(each, rel=0.01)
        assert PACKINGS[name].bytes_per_weight == pytest.approx(each, rel=0.001)


@pytest.mark.parametrize("name", packings("bnb_nf4_double", "torchao_int8"))
def test_an_original_glm_is_packed_too(name: str, tmp_path: Path) -> None:
    config = make_config(hidden_size=64, ffn_hidden_size=128, kv_channels=16, padded_vocab_size=96)
    folder = write_checkpoint(tmp_path / "glm", config, make_weights(config))
    model = open_model(str(folder), dtype="float32", quantize=name).model
    assert model_packing(model) == name
    before = logits(model)
    unpack_model(model, torch.float32)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_four_bits_that_bitsandbytes_reads_wrongly_on_a_cpu_are_refused(tiny_qwen2_folder: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for rows in (32, 64):
        weight = torch.randn(48, rows, generator=torch.Generator().manual_seed(1))
        read = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", blocksize=64))
        assert ((read - weight).norm() / weight.norm() < 0.12) == (rows == 64)  # no longer: take the refusal out
    with pytest.raises(ModelError, match=r"q_proj in 4 bits on a CPU: its 32 inputs are no multiple of 64.* int4 or"):
        open_model(str(tiny_qwen2_folder), quantize="bnb_nf4_double")


# What learns on it


@pytest.mark.parametrize("name", packings("bnb_nf4_double", "torchao_int8"))
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "ia3", "ptuning_v2", "prompt_tuning"])
def test_gradients_are_those_of_the_unpacked_model(name: str, method: str) -> None:
    found = []
    for unpacked in (False, True):
        model = packed("qwen2", name)
        if unpacked:
            unpack_model(model, torch.float32)
        settings = settings_for(method)
        setup = set_up_for(add_adapter(model, METHODS[method], seed=1), settings)
        with torch.no_grad():
            for where, parameter in setup.trained.named_parameters():
                if ".lora_B." in where:  # while B is zero A has no gradient
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        found.append(gradients(setup, eight_rows("qwen2"), settings))
    ours, theirs = found
    assert ours.keys() == theirs.keys() and theirs
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", packings("bnb_int8", "bnb_nf4", "bnb_nf4_double", "torchao_int8"))
def test_scoring_between_steps_changes_no_weight_and_no_gradient(name: str) -> None:
    model = packed("qwen2", name, torch.bfloat16)
    settings, rows = settings_for("lora"), eight_rows("qwen2")
    setup = set_up_for(add_adapter(model, METHODS["lora"], seed=1), settings)
    learn(setup, rows, settings, steps=2)
    before, held = gradients(setup, rows, settings), held_bytes(model)
    with setup.trained.generating() as generating, torch.no_grad():
        scored = logits(generating)
        answers = list(generate(generating, [[4, 17, 33]], stop_ids=[], sampling=Sampling(max_new_tokens=4)))
    assert len(answers[0].token_ids) == 4
    setup.trained.zero_grad()
    after = gradients(setup, rows, settings)
    assert before.keys() == after.keys() and held_bytes(model) == held
    assert all(torch.equal(before[key], after[key]) for key in before)
    with setup.trained.generating() as generating, torch.no_grad():
        assert torch.equal(logits(generating), scored)


@pytest.mark.parametrize("name", packings("bnb_int8", "bnb_nf4_double", "torchao_int8"))
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_an_adapter_learns_and_is_saved_and_put_back(name: str, method: str, tmp_path: Path) -> None:
    rows, settings = eight_rows("qwen2"), settings_for(method)
    base = logits_of(packed("qwen2", name), rows)
    tuned = add_adapter(packed("qwen2", name), METHODS[method], seed=1)
    losses = learn(set_up_for(tuned, settings), rows, settings, steps=25)
    assert losses[-1] < 0.75 * losses[0]
    save_adapter(tuned, tmp_path)
    again = load_adapter(packed("qwen2", name), tmp_path).eval()
    tuned.eval()
    tuned.get_base_model().set_attn_implementation("sdpa")
    learnt = logits_of(tuned, rows)
    assert torch.equal(logits_of(again, rows), learnt)
    with without_adapter(again):
        assert torch.equal(logits_of(again, rows), base)
    if method != "ia3":
        with pytest.raises(ModelError, match="cannot be merged into packed weights"):
            again.merge_and_unload(safe_merge=True)
    unpack_model(again, torch.float32)
    merged = again.merge_and_unload(safe_merge=True)
    far = (logits_of(merged, rows) - learnt).pow(2).mean().sqrt() / learnt.std()
    assert far < (0.1 if name == "bnb_int8" else 1e-5)  # LLM.int8 rounds the inputs of its layers too


@pytest.mark.parametrize("name", packings("bnb_nf4_double", "torchao_int8"))
@pytest.mark.parametrize("method", [Freeze(layers=1), Full()], ids=["freeze", "full"])
def test_weights_that_are_packed_cannot_learn(name: str, method: Freeze | Full) -> None:
    with pytest.raises(ModelError, match=r"packed in 4 or 8 bits .* Set model\.quantize: none, or tune by LoRA"):
        add_adapter(packed("qwen2", name), method, seed=1)


def test_a_training_on_four_bits_gone_on_with_ends_in_the_bits_of_one_never_stopped(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rows = eight_rows("qwen2")
    settings = settings_for("lora").model_copy(
        update={"batch_size": 2, "epochs": 2, "save_every": 3, "keep_checkpoints": 9, "compile": "never"}
    )

    def tune(folder: Path) -> dict[str, bytes]:
        run = RunFolder(folder)
        tuned = add_adapter(packed("qwen2", "bnb_nf4_double"), Lora(rank=4), seed=1)
        train(tuned, rows, [1.0] * len(rows), [], settings=settings, run=run, console=Console(quiet=True))
        return {file.name: file.read_bytes() for file in run.adapter.glob("*.safetensors")}

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    expected = tune(whole)
    stopped.mkdir()
    shutil.copytree(whole / "checkpoints" / "step-000003", stopped / "checkpoints" / "step-000003")
    assert tune(stopped) == expected and expected


def test_installed_libraries_say_nothing_when_a_model_is_opened(instruct_folder: Path) -> None:
    lines = f"import weitiao; weitiao.open_model({str(instruct_folder)!r}, dtype='float32')"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


# What is stored packed, and what cannot be had


@pytest.mark.parametrize("name", packings("bnb_int8", "bnb_nf4_double", "torchao_int8"))
def test_a_checkpoint_stored_packed_opens_as_it_was(name: str, tmp_path: Path, instruct_folder: Path) -> None:
    stored = save_packed(instruct_folder, tmp_path / "stored", name)
    wanted = logits(open_model(str(instruct_folder), dtype="float32", quantize=name).model)
    for quantize in ("none", name):
        opened = open_model(str(stored), dtype="float32", quantize=quantize)
        assert model_packing(opened.model) == name
        assert torch.equal(logits(opened.model), wanted)
    assert loaded_bytes(str(stored), dtype="float32") == pytest.approx(held_bytes(opened.model), rel=0.05)
    with pytest.raises(ModelError, match=rf"is stored quantised \({name}\), so it cannot be held as .* int4 says"):
        open_model(str(stored), quantize="int4")


def save_packed(source: Path, folder: Path, name: str) -> Path:
    """The model in `source` as transformers itself packs and stores it."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=loading_config(PACKINGS[name], torch.float32)
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("told", "packages"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel and optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
    ],
)
def test_a_stored_packing_says_which_package_opens_it(
    told: dict[str, Any], packages: str, tmp_path: Path, tiny_qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_qwen2_folder, tmp_path / "stored"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = "pip install " + packages.replace(" and ", " ")
    with pytest.raises(ModelError, match=rf"needs {packages} to be opened\. Install with {command},"):
        open_model(str(folder))


@pytest.mark.parametrize(("name", "extra"), [("bnb_nf4_double", "bitsandbytes"), ("torchao_int8", "torchao")])
def test_a_missing_package_is_said_with_its_command(
    name: str, extra: str, tiny_qwen2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=rf'needs the package {extra}\. .* pip install "weitiao\[{extra}\]", or set'):
        open_model(str(tiny_qwen2_folder), quantize=name)


def test_a_device_and_a_name_that_are_none_are_said(tiny_qwen2_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ModelError, match=r"does not compute on the device 'meta', only on .*cpu.*quantize: int4"):
        require_packing(PACKINGS["bnb_nf4"], torch.device("meta"))
    with pytest.raises(ModelError, match=r"quantize is 'nf4', which is unknown\. Choose none, int8, int4, bnb_int8"):
        open_model(str(tiny_qwen2_folder), quantize="nf4")
