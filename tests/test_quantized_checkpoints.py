"""Packed checkpoints of the GLM family: read, computed, tuned, made from float ones while reading, and written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from glm_checkpoints import (
    Golden,
    config_of,
    golden_folder,
    make_config,
    make_weights,
    opened,
    stored_weights,
    write_checkpoint,
)
from weitiao.errors import ModelError
from weitiao.models.glm.original_files import save_original
from weitiao.models.lora_layers import ignoring_peft_warnings, use_lean_layers
from weitiao.models.opening import loaded_bytes
from weitiao.models.packed_layers import unpack_model
from weitiao.models.quantized import QuantizedLinear, quantize_model, quantize_weight, quantized_bits
from weitiao.tuning.methods import count_parameters

FIXTURES = ("chatglm_v1_int4/int4", "chatglm_v1_int4/int8")


def worst(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


# ChatGLM-6B as it was released in 4 and 8 bits


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_loss_and_answers_are_those_of_the_released_code(name: str) -> None:
    golden, model = Golden(name), opened(golden_folder(name))
    assert quantized_bits(model) == int(name[-1])
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 3 * 4
    with torch.no_grad():
        assert worst(model(golden["single/input_ids"]).logits, golden["single/logits"]) <= 1e-4
        padded = model(
            input_ids=golden["leftpad/input_ids"],
            attention_mask=golden["leftpad/attention_mask"],
            position_ids=golden["leftpad/position_ids"],
        )
        valid = golden["leftpad/valid"]
        assert worst(padded.logits[valid], golden["leftpad/logits"][valid]) <= 1e-4
        trained = model(input_ids=golden["train/input_ids"], labels=golden["train/labels"])
        assert worst(trained.logits, golden["train/logits"]) <= 1e-4
        assert abs(trained.loss - golden["train/loss"]) <= 1e-5
    for case in golden.cases("gen_"):
        prompt, sequences = golden[f"{case}/input_ids"], golden[f"{case}/sequences"]
        answer = model.generate(
            prompt,
            attention_mask=golden[f"{case}/attention_mask"],
            position_ids=golden[f"{case}/position_ids"],
            max_new_tokens=sequences.shape[1] - prompt.shape[1],
            do_sample=False,
            eos_token_id=model.config.vocab_size,  # the released code was run to its full length
        )
        assert torch.equal(answer, sequences)


@pytest.mark.parametrize("name", FIXTURES)
def test_unpacked_weights_are_those_of_the_released_kernels(name: str) -> None:
    golden, model = Golden(name), opened(golden_folder(name), torch.bfloat16)
    keys = [key for key in golden.arrays if key.startswith("dequant_")]
    assert len(keys) == 4
    for key in keys:
        kind, _, module = key.partition("/")
        dtype = torch.float32 if kind == "dequant_fp32" else torch.float16
        layer = model.get_submodule(module)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer.float_weight(dtype), golden[key])


@pytest.mark.parametrize("name", FIXTURES)
def test_a_packed_checkpoint_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    folder = golden_folder(name)
    save_original(opened(folder, torch.float16), tmp_path / "again", config=config_of(folder))
    before, after = stored_weights(folder), stored_weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    assert config_of(tmp_path / "again") == config_of(folder)


def with_lora(model: PreTrainedModel, *, random_b: bool) -> PeftModel:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    use_lean_layers(config)
    torch.manual_seed(0)
    with ignoring_peft_warnings():
        tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if random_b and "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return tuned


def two_rows(golden: Golden, sop: int) -> tuple[Tensor, Tensor]:
    """The fixture's training row and another with the same prompt and the answer's tokens in reverse; their labels."""
    ids, labels = golden["train/input_ids"].repeat(2, 1), golden["train/labels"].repeat(2, 1)
    learnt = (labels[0] != -100) & (ids[0] != sop)
    ids[1, learnt] = ids[0, learnt].flip(0)
    return ids, torch.where(learnt, ids, -100)


@pytest.mark.parametrize("name", FIXTURES)
def test_gradients_are_those_of_the_unpacked_model(name: str) -> None:
    golden, model = Golden(name), opened(golden_folder(name))
    plain = copy.deepcopy(model)
    unpack_model(plain, torch.float32)
    gradients = []
    for each in (model, plain):
        tuned = with_lora(each, random_b=True)
        tuned(input_ids=golden["train/input_ids"], labels=golden["train/labels"]).loss.backward()
        gradients.append({key: p.grad for key, p in tuned.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert len(theirs) == 3 * 4 * 2
    for key, gradient in theirs.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[key], gradient, rtol=1e-5, atol=1e-5)


def test_lora_on_four_bits_learns_two_rows_by_heart() -> None:
    golden, model = Golden(FIXTURES[0]), opened(golden_folder(FIXTURES[0]))
    packed = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.int8}
    ids, labels = two_rows(golden, model.config.bos_token_id)
    tuned = with_lora(model, random_b=False)
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = tuned(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    now = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if p.dtype == torch.int8}
    assert now.keys() == packed.keys() and all(torch.equal(now[name], p) for name, p in packed.items())


# Float checkpoints, packed while they are read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["chatglm3", "chatglm2", "chatglm_v1"])
def test_packing_while_reading_gives_what_packing_afterwards_gives(name: str, bits: int, dtype: torch.dtype) -> None:
    folder = golden_folder(name)
    model, later = opened(folder, dtype, bits=bits), opened(folder)
    quantize_model(later, bits)
    later.to(dtype)
    ours, theirs = model.state_dict(), later.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype for key, tensor in theirs.items())
    if dtype == torch.float32:  # a cast of the whole model would round its rotary tables as well
        ids = Golden(name)["single/input_ids"]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, later(ids).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_chatglm3_is_written_and_read_in_the_original_layout(bits: int, tmp_path: Path) -> None:
    folder = golden_folder("chatglm3")
    model = opened(folder, bits=bits)
    save_original(model, tmp_path / "packed", config=config_of(folder), shard_bytes=100_000)
    assert config_of(tmp_path / "packed")["quantization_bit"] == bits
    stored, source = stored_weights(tmp_path / "packed"), stored_weights(folder)
    for module in ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        name = f"transformer.encoder.layers.1.{module}"
        packed, scale = quantize_weight(source[f"{name}.weight"], bits)
        assert torch.equal(stored[f"{name}.weight"], packed)
        assert torch.equal(stored[f"{name}.weight_scale"], scale)
    again = opened(tmp_path / "packed")
    ids = Golden("chatglm3")["single/input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        off = (model(ids).logits - opened(folder)(ids).logits).abs().mean().item()
    assert 0 < off < (0.5 if bits == 4 else 0.05)


def test_heads_without_groups_are_packed_row_by_row(tmp_path: Path) -> None:
    config = make_config(multi_query_attention=False)
    folder = write_checkpoint(tmp_path / "base", config, make_weights(config))
    model = opened(folder, bits=4)
    save_original(model, tmp_path / "packed", config=config)
    name = "transformer.encoder.layers.0.self_attention.query_key_value"
    packed, scale = quantize_weight(stored_weights(folder)[f"{name}.weight"], 4)
    stored = stored_weights(tmp_path / "packed")
    assert torch.equal(stored[f"{name}.weight"], packed) and torch.equal(stored[f"{name}.weight_scale"], scale)
    ids = torch.randint(0, 40, (2, 7))
    with torch.no_grad():
        assert torch.equal(opened(tmp_path / "packed")(ids).logits, model(ids).logits)


# What does not belong together


def packed_checkpoint(folder: Path, *, without: str = "", **changes: Any) -> Path:
    """A ChatGLM3 in 4 bits; `changes` of its configuration, and one weight left out."""
    config = make_config()
    base = write_checkpoint(folder / "base", config, make_weights(config))
    save_original(opened(base, bits=4), folder / "packed", config=config)
    weights = stored_weights(folder / "packed")
    weights.pop(without, None)
    told = {**config_of(folder / "packed"), **changes}
    return write_checkpoint(
        folder / "changed", {key: value for key, value in told.items() if value is not None}, weights
    )


def test_packed_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="stored in 4 bits, so it cannot be held in 8"):
        opened(packed_checkpoint(tmp_path / "bits"), bits=8)
    with pytest.raises(ModelError, match=r"packed, but config\.json has no quantization_bit"):
        opened(packed_checkpoint(tmp_path / "unsaid", quantization_bit=None))
    scale = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight_scale"
    with pytest.raises(ModelError, match=f"1 weights are not there .{scale}"):
        opened(packed_checkpoint(tmp_path / "scale", without=scale))
    with pytest.raises(ModelError, match="have another shape"):
        opened(packed_checkpoint(tmp_path / "half", quantization_bit=8))
    with pytest.raises(ModelError, match="quantization_embeddings"):
        opened(packed_checkpoint(tmp_path / "embeddings", quantization_embeddings=True))


# What is told of memory and size


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        *((name, quantize) for name in ("chatglm3", "chatglm_v1") for quantize in ("none", "int8", "int4")),
        *((name, quantize) for name in FIXTURES for quantize in ("none", name.rpartition("/")[2])),
    ],
)
def test_the_foretold_memory_is_what_an_opened_model_holds(name: str, quantize: str) -> None:
    folder = golden_folder(name)
    model = opened(folder, torch.bfloat16, bits=None if quantize == "none" else int(quantize[-1]))
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    told = loaded_bytes(str(folder), dtype="bfloat16", quantize=quantize)
    assert told == pytest.approx(sum(tensor.numel() * tensor.element_size() for tensor in held), rel=0.01)


def test_packed_numbers_count_as_the_parameters_they_stand_for() -> None:
    folder = golden_folder("chatglm3")
    plain = count_parameters(opened(folder))
    assert count_parameters(opened(folder, bits=4))[1] == count_parameters(opened(folder, bits=8))[1] == plain[1]
