"""Tiny random checkpoints of the GLM family as they were first released: original names and keys, real vocabularies.

The vocabularies belong to the models and are read from the shared folder; nothing of them is kept here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYOUTS = ("chatglm", "chatglm2", "chatglm3", "glm4")
_VOCABULARIES = {"chatglm": "chatglm_v1", "chatglm2": "chatglm2", "chatglm3": "chatglm3", "glm4": "glm4"}
_NUM_LAYERS, _HIDDEN, _HEADS, _GROUPS, _HEAD_SIZE, _FFN = 2, 32, 4, 2, 16, 48


def write_glm_folder(folder: Path, layout: str, shared: Path, *, vocabulary: bool = True, seed: int = 0) -> Path:
    """Write a checkpoint of `layout` into `folder`: 2 layers, hidden size 32, float32, in safetensors."""
    folder.mkdir(parents=True)
    config = _config_of(layout)
    generator = torch.Generator().manual_seed(seed)
    weights = _weights_of_chatglm(config, generator) if layout == "chatglm" else _weights_of_glm(config, generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if vocabulary:
        for file in (shared / "golden" / "tokenizers" / _VOCABULARIES[layout]).iterdir():
            if file.name != "goldens.json":
                shutil.copyfile(file, folder / file.name)
    return folder


def _config_of(layout: str) -> dict[str, Any]:
    code = "modeling_chatglm.ChatGLMForConditionalGeneration"
    common: dict[str, Any] = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": code},
        "layernorm_epsilon": 1e-5,
        "num_layers": _NUM_LAYERS,
        "num_attention_heads": _HEADS,
        "use_cache": True,
        "torch_dtype": "float16",
    }
    if layout == "chatglm":
        return common | {
            "_name_or_path": "THUDM/chatglm-6b",
            "bos_token_id": 130004,
            "eos_token_id": 130005,
            "mask_token_id": 130000,
            "gmask_token_id": 130001,
            "pad_token_id": 3,
            "hidden_size": _HIDDEN * 2,
            "inner_hidden_size": _FFN * 2,
            "max_sequence_length": 2048,
            "position_encoding_2d": True,
            "vocab_size": 130528,
        }
    glm4 = layout == "glm4"
    more = {"num_hidden_layers": _NUM_LAYERS, "rope_ratio": 500} if glm4 else {}
    names = {"chatglm2": "THUDM/chatglm2-6b", "chatglm3": "THUDM/chatglm3-6b", "glm4": "THUDM/glm-4-9b-chat"}
    return (
        common
        | {
            "_name_or_path": names[layout],
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "ffn_hidden_size": _FFN,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "hidden_size": _HIDDEN,
            "kv_channels": _HEAD_SIZE,
            "multi_query_attention": True,
            "multi_query_group_num": _GROUPS,
            "original_rope": True,
            "padded_vocab_size": 151552 if glm4 else 65024,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": 8192 if layout == "chatglm3" else 32768,
            "tie_word_embeddings": False,
            "eos_token_id": [151329, 151336, 151338] if glm4 else 2,
            "pad_token_id": 151329 if glm4 else 0,
        }
        | more
    )


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.2


def _weights_of_chatglm(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    hidden, inner = config["hidden_size"], config["inner_hidden_size"]
    weights = {"transformer.word_embeddings.weight": _random(generator, config["vocab_size"], hidden)}
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    shapes = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    for layer in range(_NUM_LAYERS):
        place = f"transformer.layers.{layer}"
        for name, shape in shapes.items():
            weights[f"{place}.{name}.weight"] = _random(generator, *shape)
            weights[f"{place}.{name}.bias"] = _random(generator, shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights |= _norm(f"{place}.{norm}", hidden, bias=True)
    return weights | _norm("transformer.final_layernorm", hidden, bias=True)


def _weights_of_glm(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    hidden, inner, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    heads = (config["num_attention_heads"] + 2 * config["multi_query_group_num"]) * config["kv_channels"]
    weights = {
        "transformer.embedding.word_embeddings.weight": _random(generator, vocabulary, hidden),
        "transformer.output_layer.weight": _random(generator, vocabulary, hidden),
        "transformer.rotary_pos_emb.inv_freq": torch.ones(config["kv_channels"] // 4),
    }
    shapes = {
        "self_attention.query_key_value": (heads, hidden),
        "self_attention.dense": (hidden, config["num_attention_heads"] * config["kv_channels"]),
        "mlp.dense_h_to_4h": (2 * inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    for layer in range(_NUM_LAYERS):
        place = f"transformer.encoder.layers.{layer}"
        for name, shape in shapes.items():
            weights[f"{place}.{name}.weight"] = _random(generator, *shape)
        weights[f"{place}.self_attention.query_key_value.bias"] = _random(generator, heads)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights |= _norm(f"{place}.{norm}", hidden, bias=False)
    return weights | _norm("transformer.encoder.final_layernorm", hidden, bias=False)


def _norm(name: str, size: int, *, bias: bool) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(size)} | ({f"{name}.bias": torch.zeros(size)} if bias else {})
