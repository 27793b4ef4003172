"""LoRA adapters of the original GLM code, against weights that hold their products: ``W + alpha / r · B A``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from glm_checkpoints import make_config, make_weights, opened, write_checkpoint
from weitiao.errors import ModelError
from weitiao.models.adapters import load_adapter
from weitiao.models.glm.chatglm import ChatGlmForCausalLM
from weitiao.models.glm.chatglm_config import ChatGlmConfig
from weitiao.models.glm.old_adapters import load_old_adapter, save_old_adapter
from weitiao.models.lora_layers import LoraLinear, ignoring_peft_warnings, use_lean_layers
from weitiao.models.quantized import quantize_model

RANK, ALPHA = 3, 12
ATTENTION = {"chatglm": "transformer.layers.{}.attention", "chatglm3": "transformer.encoder.layers.{}.self_attention"}
MLP = {"chatglm": "transformer.layers.{}.mlp", "chatglm3": "transformer.encoder.layers.{}.mlp"}
TARGETS = {
    "query_key_value": ["query_key_value"],
    "all": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
IDS = torch.tensor([[7, 9, 11, 30, 31, 5, 21], [3, 8, 30, 31, 22, 20, 4]])


def weights_of(layout: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tiny original checkpoint: its config.json and its weights."""
    if layout == "chatglm3":
        config = make_config(**changes)
        return config, make_weights(config)
    config = {
        "model_type": "chatglm",
        "hidden_size": 16,
        "inner_hidden_size": 24,
        "num_attention_heads": 2,
        "num_layers": 2,
        "vocab_size": 40,
        "max_sequence_length": 64,
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": True,
        "bos_token_id": 31,
        "eos_token_id": 32,
        "mask_token_id": 29,
        "gmask_token_id": 30,
        "pad_token_id": 3,
    }
    random = torch.Generator().manual_seed(0)
    state = ChatGlmForCausalLM(ChatGlmConfig.from_dict(config)).state_dict()
    drawn = {name: torch.randn(tensor.shape, generator=random) * 0.3 for name, tensor in state.items()}
    return config, {**drawn, "lm_head.weight": drawn["transformer.word_embeddings.weight"].clone()}


def modules_of(layout: str, targets: list[str], num_layers: int = 2) -> list[str]:
    """The original modules that `targets` name."""
    return [
        f"{(ATTENTION if target in ('query_key_value', 'dense') else MLP)[layout].format(layer)}.{target}"
        for layer in range(num_layers)
        for target in targets
    ]


def draw_pairs(weights: dict[str, Tensor], modules: list[str], rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(5)
    return {
        module: (
            torch.randn(rank, weights[f"{module}.weight"].shape[1], generator=random) * 0.2,
            torch.randn(weights[f"{module}.weight"].shape[0], rank, generator=random) * 0.2,
        )
        for module in modules
    }


def write_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    targets: list[str],
    *,
    suffix: str = "bin",
    **changes: Any,
) -> Path:
    """A folder as PEFT 0.2 or 0.3 wrote it; `changes` of its configuration."""
    folder.mkdir(exist_ok=True, parents=True)
    config = {
        "base_model_name_or_path": "THUDM/chatglm3-6b",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    if suffix == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def named(
    pairs: dict[str, tuple[Tensor, Tensor]], *, prefix: str = "base_model.model.", name: str = ""
) -> dict[str, Tensor]:
    return {
        f"{prefix}{module}.lora_{kind}{name}.weight": tensor
        for module, pair in pairs.items()
        for kind, tensor in zip("AB", pair, strict=True)
    }


def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits_of(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Tensor:
    return logits(opened(write_checkpoint(folder, config, weights)))


def changed(weights: dict[str, Tensor], deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, **{f"{m}.weight": weights[f"{m}.weight"] + delta for m, delta in deltas.items()}}


# Onto our models


@pytest.mark.parametrize("wanted", list(TARGETS))
@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_an_old_adapter_computes_what_its_product_in_the_weights_does(layout: str, wanted: str, tmp_path: Path) -> None:
    config, weights = weights_of(layout)
    targets = TARGETS[wanted]
    pairs = draw_pairs(weights, modules_of(layout, targets))
    folder = write_adapter(tmp_path / "adapter", named(pairs), targets)
    model = opened(write_checkpoint(tmp_path / "base", config, weights))
    base = logits(model)
    tuned = load_adapter(model, folder)
    assert isinstance(tuned, PeftModel)
    deltas = {module: ALPHA / RANK * b @ a for module, (a, b) in pairs.items()}
    expected = logits_of(tmp_path / "merged", config, changed(weights, deltas))
    assert not torch.allclose(base, expected, atol=1e-2)
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-5, atol=1e-5)
    kinds = {name.rsplit(".", 1)[-1] for name, m in tuned.named_modules() if isinstance(m, LoraLinear)}
    split = {"query_key_value": {"q_proj", "k_proj", "v_proj"}}
    split["all"] = {*split["query_key_value"], "o_proj", "gate_up_proj", "down_proj"}
    assert kinds == (set(targets) if layout == "chatglm" else split[wanted])
    learning = [p for name, p in tuned.named_parameters() if "lora_" in name]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in learning)
    assert tuned.peft_config["default"].lora_dropout == 0.1
    torch.testing.assert_close(logits(tuned.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prefix", "name"), [("base_model.model.", ".default"), ("", "")])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_names_with_and_without_the_adapter_are_read(prefix: str, name: str, suffix: str, tmp_path: Path) -> None:
    config, weights = weights_of("chatglm3")
    pairs = draw_pairs(weights, modules_of("chatglm3", TARGETS["all"]))
    tensors = named(pairs, prefix=prefix, name=name)
    folder = write_adapter(tmp_path / "adapter", tensors, TARGETS["all"], suffix=suffix)
    tuned = load_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)
    deltas = {module: ALPHA / RANK * b @ a for module, (a, b) in pairs.items()}
    expected = logits_of(tmp_path / "merged", config, changed(weights, deltas))
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-5, atol=1e-5)


def test_heads_without_groups_get_their_own_rows(tmp_path: Path) -> None:
    config, weights = weights_of("chatglm3", multi_query_attention=False)
    pairs = draw_pairs(weights, modules_of("chatglm3", ["query_key_value"]))
    folder = write_adapter(tmp_path / "adapter", named(pairs), ["query_key_value"])
    tuned = load_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)
    deltas = {module: ALPHA / RANK * b @ a for module, (a, b) in pairs.items()}
    expected = logits_of(tmp_path / "merged", config, changed(weights, deltas))
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, True]])
@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_an_adapter_in_blocks_computes_what_its_grouped_convolution_does(
    layout: str, enabled: list[bool], tmp_path: Path
) -> None:
    changes = {"multi_query_group_num": 4} if layout == "chatglm3" else {}  # PEFT 0.2 wants a third of the rows
    config, weights = weights_of(layout, **changes)
    random = torch.Generator().manual_seed(6)
    tensors, deltas = {}, {}
    for module in modules_of(layout, ["query_key_value"]):
        rows, columns = weights[f"{module}.weight"].shape
        a = torch.randn(2 * RANK, columns, generator=random) * 0.2
        b = torch.randn(rows // 3 * 2, RANK, 1, generator=random) * 0.2
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        delta = torch.zeros(3, rows // 3, columns)
        delta[enabled] = torch.nn.functional.conv1d(a[None], b, groups=2)[0].view(2, rows // 3, columns)
        deltas[module] = ALPHA / RANK * delta.view(rows, columns)
    folder = write_adapter(tmp_path / "adapter", tensors, ["query_key_value"], enable_lora=enabled, fan_in_fan_out=True)
    tuned = load_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)
    expected = logits_of(tmp_path / "merged", config, changed(weights, deltas))
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_rslora_and_dora_of_newer_versions_are_split_by_rows(layout: str, tmp_path: Path) -> None:
    config, weights = weights_of(layout)
    pairs = draw_pairs(weights, modules_of(layout, TARGETS["all"]))
    random = torch.Generator().manual_seed(8)
    tensors, deltas = named(pairs), {}
    for module, (a, b) in pairs.items():
        weight = weights[f"{module}.weight"]
        magnitude = torch.rand(len(weight), generator=random) + 0.5
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude
        moved = weight + ALPHA / RANK**0.5 * b @ a
        deltas[module] = moved * (magnitude / moved.norm(dim=1))[:, None] - weight
    folder = write_adapter(
        tmp_path / "adapter", tensors, TARGETS["all"], use_rslora=True, use_dora=True, peft_version="0.15.0"
    )
    tuned = load_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)
    expected = logits_of(tmp_path / "merged", config, changed(weights, deltas))
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_an_old_adapter_goes_on_a_packed_model(layout: str, tmp_path: Path) -> None:
    config, weights = weights_of(layout)
    pairs = draw_pairs(weights, modules_of(layout, TARGETS["all"]))
    folder = write_adapter(tmp_path / "adapter", named(pairs), TARGETS["all"])
    base = write_checkpoint(tmp_path / "base", config, weights)
    packed = load_adapter(opened(base, bits=8), folder)
    plain = opened(base)
    quantize_model(plain, 8)
    assert torch.equal(logits(packed), logits(load_adapter(plain, folder)))
    assert not torch.equal(logits(packed), logits(opened(base, bits=8)))


# The way back


@pytest.mark.parametrize("wanted", list(TARGETS))
@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_an_old_adapter_goes_round_bit_for_bit(layout: str, wanted: str, tmp_path: Path) -> None:
    config, weights = weights_of(layout)
    pairs = draw_pairs(weights, modules_of(layout, TARGETS[wanted]))
    folder = write_adapter(tmp_path / "adapter", named(pairs), TARGETS[wanted])
    tuned = load_old_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)
    assert save_old_adapter(tuned, tmp_path / "again") == []
    again = torch.load(tmp_path / "again" / "adapter_model.bin", weights_only=True)
    assert again.keys() == named(pairs).keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in named(pairs).items())
    told = json.loads((tmp_path / "again" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (told["r"], told["lora_alpha"], told["lora_dropout"]) == (RANK, ALPHA, 0.1)
    assert told["target_modules"] == sorted(TARGETS[wanted])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_projections_that_learnt_apart_are_written_as_one_of_higher_rank(
    targets: list[str] | str, tmp_path: Path
) -> None:
    config, weights = weights_of("chatglm3")
    base = write_checkpoint(tmp_path / "base", config, weights)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=targets, task_type="CAUSAL_LM")
    use_lean_layers(settings)
    with ignoring_peft_warnings():
        tuned = get_peft_model(opened(base), settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    rank = RANK * (2 if targets == ["q_proj", "v_proj"] else 3)
    (told,) = save_old_adapter(tuned, tmp_path / "adapter")
    assert f"rank {RANK} is written with rank {rank}" in told
    again = load_adapter(opened(base), tmp_path / "adapter")
    assert again.peft_config["default"].r == rank
    torch.testing.assert_close(logits(again), logits(tuned), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "learnt biases"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ],
)
def test_what_the_old_format_cannot_hold_is_not_written(settings: dict[str, Any], what: str, tmp_path: Path) -> None:
    config, weights = weights_of("chatglm3")
    base = opened(write_checkpoint(tmp_path / "base", config, weights))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    with ignoring_peft_warnings():
        tuned = get_peft_model(base, lora)
    with pytest.raises(ModelError, match=what):
        save_old_adapter(tuned, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# What is refused


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"rank_pattern": {"dense": 4}}, "rank_pattern"),
        ({"lora_nums": 4}, "lora_nums 4"),
        ({"r": 4}, "rank \\[3\\], its configuration says r=4"),
        ({"lora_alpha": None}, "no number for lora_alpha"),
        ({"target_modules": ["query_key_value", "dense"]}, r"lacks the weights of .*dense and 1 others"),
    ],
)
def test_settings_that_would_be_lost_are_named(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    config, weights = weights_of("chatglm3")
    pairs = draw_pairs(weights, modules_of("chatglm3", ["query_key_value"]))
    folder = write_adapter(tmp_path / "adapter", named(pairs), ["query_key_value"], **changes)
    with pytest.raises(ModelError, match=what):
        load_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("base_model.model.transformer.embedding.word_embeddings.lora_embedding_A", "lora_embedding_A"),
        ("base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.bias", "query_key_value.bias"),
        ("base_model.model.transformer.encoder.layers.0.self_attention.dense.lora_B.bias", "lora_B.bias"),
        ("base_model.model.transformer.encoder.layers.0.self_attention.dense.lora_A.weight", "lacks lora_B of"),
        ("base_model.model.transformer.output_layer.modules_to_save.weight", "modules_to_save"),
    ],
)
def test_other_weights_in_the_file_are_named(name: str, what: str, tmp_path: Path) -> None:
    config, weights = weights_of("chatglm3")
    pairs = draw_pairs(weights, modules_of("chatglm3", ["query_key_value"]))
    tensors = {**named(pairs), name: torch.zeros(RANK, 16)}
    folder = write_adapter(tmp_path / "adapter", tensors, ["query_key_value"])
    with pytest.raises(ModelError, match=what):
        load_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    config, weights = weights_of("chatglm3")
    base = write_checkpoint(tmp_path / "base", config, weights)
    _, wider = weights_of("chatglm3", hidden_size=32)
    pairs = draw_pairs(wider, modules_of("chatglm3", ["query_key_value"]))
    folder = write_adapter(tmp_path / "wide", named(pairs), ["query_key_value"])
    with pytest.raises(ModelError, match=r"query_key_value has A \[3, 32\]"):
        load_adapter(opened(base), folder)
    first = draw_pairs(weights_of("chatglm")[1], modules_of("chatglm", ["query_key_value"]))
    folder = write_adapter(tmp_path / "first", named(first), ["query_key_value"])
    with pytest.raises(ModelError, match=r"no transformer.layers.0.attention.query_key_value and 1 others"):
        load_old_adapter(opened(base), folder)


class Code:
    """Pickled as a call of `os.mkdir`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("layout", ["chatglm", "chatglm3"])
def test_code_in_an_adapter_is_named_and_never_run(layout: str, tmp_path: Path) -> None:
    config, weights = weights_of(layout)
    folder = write_adapter(tmp_path / "adapter", {}, ["query_key_value"])
    torch.save({"base_model.model.x.lora_A.weight": Code(str(tmp_path / "ran"))}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="holds code besides weights"):
        load_adapter(opened(write_checkpoint(tmp_path / "base", config, weights)), folder)
    assert not (tmp_path / "ran").exists()
