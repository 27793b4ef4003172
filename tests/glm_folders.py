"""Tiny random checkpoints of the GLM family as they were first released: original names and keys, real vocabularies.

The vocabularies belong to the models and are read from the shared folder; nothing of them is kept here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_checkpoints import make_config, make_weights, write_checkpoint

LAYOUTS = ("chatglm", "chatglm2", "chatglm3", "glm4")
_VOCABULARIES = {"chatglm": "chatglm_v1", "chatglm2": "chatglm2", "chatglm3": "chatglm3", "glm4": "glm4"}


def write_glm_folder(folder: Path, layout: str, shared: Path, *, vocabulary: bool = True, seed: int = 0) -> Path:
    """Write a checkpoint of `layout` into `folder`: 2 layers, float32, in safetensors."""
    config = _config_of(layout)
    make = _weights_of_chatglm if layout == "chatglm" else make_weights
    write_checkpoint(folder, config, make(config, seed=seed))
    if vocabulary:
        for file in (shared / "golden" / "tokenizers" / _VOCABULARIES[layout]).iterdir():
            if file.name != "goldens.json":
                shutil.copyfile(file, folder / file.name)
    return folder


def _config_of(layout: str) -> dict[str, Any]:
    code = "modeling_chatglm.ChatGLMForConditionalGeneration"
    common: dict[str, Any] = {
        "model_type": "chatglm",
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": code},
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
            "hidden_size": 64,
            "inner_hidden_size": 96,
            "layernorm_epsilon": 1e-5,
            "max_sequence_length": 2048,
            "num_attention_heads": 4,
            "num_layers": 2,
            "position_encoding_2d": True,
            "use_cache": True,
            "vocab_size": 130528,
        }
    if layout == "glm4":
        stops = {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}
        sizes = {"padded_vocab_size": 151552, "num_hidden_layers": 2, "rope_ratio": 500, "seq_length": 131072}
        return make_config(**common, **stops, **sizes, hidden_size=32, _name_or_path="THUDM/glm-4-9b-chat")
    length = 8192 if layout == "chatglm3" else 32768
    names = {"chatglm2": "THUDM/chatglm2-6b", "chatglm3": "THUDM/chatglm3-6b"}
    sizes = {"padded_vocab_size": 65024, "hidden_size": 32, "seq_length": length}
    return make_config(**common, **sizes, _name_or_path=names[layout])


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.2


def _weights_of_chatglm(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["inner_hidden_size"]
    embedding = _random(generator, config["vocab_size"], hidden)
    weights = {"transformer.word_embeddings.weight": embedding, "lm_head.weight": embedding.clone()}
    shapes = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    norms = ["transformer.final_layernorm"]
    for layer in range(config["num_layers"]):
        place = f"transformer.layers.{layer}"
        for name, shape in shapes.items():
            weights[f"{place}.{name}.weight"] = _random(generator, *shape)
            weights[f"{place}.{name}.bias"] = _random(generator, shape[0])
        norms += [f"{place}.input_layernorm", f"{place}.post_attention_layernorm"]
    for norm in norms:
        weights |= {f"{norm}.weight": torch.ones(hidden), f"{norm}.bias": torch.zeros(hidden)}
    return weights
