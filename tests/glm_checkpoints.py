"""Original ChatGLM and GLM-4 checkpoints for tests: the reference fixtures, and random ones of any size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from weitiao.models.glm.original import open_original, original_name_map

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
NATIVE = ("chatglm2", "chatglm3", "chatglm3_32k", "glm4", "glm4_rope1")
"""Fixtures whose architecture is transformers' own."""


def golden_folder(name: str) -> Path:
    """The fixture `name`; skips the test where the fixtures are not there."""
    folder = GOLDEN / name
    if not folder.is_dir():
        pytest.skip(f"the reference fixtures are not in {GOLDEN}")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def opened(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return open_original(folder, config_of(folder), dtype=dtype, **options)


class Golden:
    """The arrays of one fixture as tensors, ``golden["single/logits"]``."""

    def __init__(self, name: str) -> None:
        with np.load(golden_folder(name) / "goldens.npz") as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]).copy())

    def cases(self, start: str) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.arrays if key.startswith(start)})


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in `folder`."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def original_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients of `model` by original names, those of queries, keys and values put together."""
    gradients = {}
    for name, parts in original_name_map(model).items():
        for kind, _ in model.get_submodule(parts[0].name).named_parameters(recurse=False):
            own = [getattr(model.get_submodule(part.name), kind).grad for part in parts]
            whole = torch.empty(sum(map(len, own)), *own[0].shape[1:])
            for part, rows in zip(parts, own, strict=True):
                part.put(rows, whole)
            gradients[f"{name}.{kind}"] = whole
    return gradients


def make_config(**changes: Any) -> dict[str, Any]:
    """A small ChatGLM3 configuration with its original keys."""
    config = {
        "model_type": "chatglm",
        "_name_or_path": "tiny-chatglm3",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_residual_connection_post_layernorm": False,
        "ffn_hidden_size": 24,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": 16,
        "kv_channels": 8,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 4,
        "num_layers": 2,
        "padded_vocab_size": 40,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {**config, **changes}


def make_chatglm_config(**changes: Any) -> dict[str, Any]:
    """A small ChatGLM-6B configuration with its original keys."""
    config = {
        "model_type": "chatglm",
        "_name_or_path": "tiny-chatglm",
        "bos_token_id": 36,
        "eos_token_id": 37,
        "gmask_token_id": 35,
        "hidden_size": 16,
        "inner_hidden_size": 24,
        "layernorm_epsilon": 1e-5,
        "mask_token_id": 34,
        "max_sequence_length": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "pad_token_id": 3,
        "position_encoding_2d": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 40,
    }
    return {**config, **changes}


def make_weights(config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of an original checkpoint with this `config`, by their original names."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random) * 0.3).to(dtype)

    if "padded_vocab_size" not in config:
        return _chatglm_weights(config, draw)
    hidden, size, heads = config["hidden_size"], config["kv_channels"], config["num_attention_heads"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    weights = {
        "transformer.embedding.word_embeddings.weight": draw(config["padded_vocab_size"], hidden),
        "transformer.rotary_pos_emb.inv_freq": 1 / 10_000.0 ** (torch.arange(0, size // 2, 2) / (size // 2)).to(dtype),
        "transformer.encoder.final_layernorm.weight": 1 + draw(hidden),
        "transformer.output_layer.weight": draw(config["padded_vocab_size"], hidden),
    }
    for number in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{number}"
        rows = (heads + 2 * groups) * size
        weights |= {
            f"{layer}.input_layernorm.weight": 1 + draw(hidden),
            f"{layer}.post_attention_layernorm.weight": 1 + draw(hidden),
            f"{layer}.self_attention.query_key_value.weight": draw(rows, hidden),
            f"{layer}.self_attention.dense.weight": draw(hidden, heads * size),
            f"{layer}.mlp.dense_h_to_4h.weight": draw(2 * config["ffn_hidden_size"], hidden),
            f"{layer}.mlp.dense_4h_to_h.weight": draw(hidden, config["ffn_hidden_size"]),
        }
        if config["add_qkv_bias"]:
            weights[f"{layer}.self_attention.query_key_value.bias"] = draw(rows)
    return weights


def _chatglm_weights(config: dict[str, Any], draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    hidden, inner = config["hidden_size"], config["inner_hidden_size"]
    size = hidden // config["num_attention_heads"] // 2
    embedding = draw(config["vocab_size"], hidden)
    weights = {"transformer.word_embeddings.weight": embedding, "lm_head.weight": embedding.clone()}
    norms = ["transformer.final_layernorm"]
    for number in range(config["num_layers"]):
        layer = f"transformer.layers.{number}"
        table = (1 / 10_000.0 ** (torch.arange(0, size, 2) / size)).half()
        weights[f"{layer}.attention.rotary_emb.inv_freq"] = table.to(embedding.dtype)
        for name, rows, columns in (
            ("attention.query_key_value", 3 * hidden, hidden),
            ("attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", inner, hidden),
            ("mlp.dense_4h_to_h", hidden, inner),
        ):
            weights |= {f"{layer}.{name}.weight": draw(rows, columns), f"{layer}.{name}.bias": draw(rows)}
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    for norm in norms:
        weights |= {f"{norm}.weight": 1 + draw(hidden), f"{norm}.bias": draw(hidden)}
    return weights


def write_checkpoint(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], *, kind: str = "safetensors", num_files: int = 1
) -> Path:
    """Write a checkpoint as ``safetensors``, ``bin`` or ``old bin`` (no archive), in several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names, places = list(weights), {}
    for number in range(num_files):
        part = f"-{number + 1:05}-of-{num_files:05}" if num_files > 1 else ""
        file = f"{stem}{part}.{suffix}"
        tensors = {name: weights[name].contiguous() for name in names[number::num_files]}
        places |= dict.fromkeys(tensors, file)
        if kind == "safetensors":
            save_file(tensors, folder / file, {"format": "pt"})
        else:
            torch.save(tensors, folder / file, _use_new_zipfile_serialization=kind == "bin")
    if num_files > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
