"""The original config.json of ChatGLM2, ChatGLM3 and GLM-4 as a configuration of transformers' Glm classes.

What the originals can be configured to compute and Glm cannot is refused by name. Keys that are not mentioned here have
no effect in the originals either: nothing there reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GlmConfig

from ...errors import ModelError
from .layouts import GlmLayout

_COMPUTED: Mapping[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0,
}
"""The one value of each key that Glm computes; it is the originals' default as well."""

WITHOUT_EFFECT = (
    "apply_query_key_layer_scaling",  # scales the scores and takes it back: nothing is left with torch's own attention
    "attention_softmax_in_fp32",
    "attn_implementation",  # several ways to the same numbers
    "bias_dropout_fusion",
    "original_rope",  # kept and never read
    "use_cache",
)
"""Keys of the originals that change no number, whatever their value."""

_DEFAULTS: Mapping[str, Any] = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": False,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "rope_ratio": 1,
    "attention_dropout": 0,
}
"""What the originals take for keys that a config.json lacks."""

_SPECIAL_IDS: Mapping[GlmLayout, tuple[int | list[int], int]] = {
    "chatglm2": (2, 0),
    "chatglm3": (2, 0),
    "glm4": ([151329, 151336, 151338], 151329),
}
"""End and padding tokens of the released vocabularies, for a config.json that does not name them."""


def glm_config(
    config: Mapping[str, Any], layout: GlmLayout, *, dtype: torch.dtype, tie_word_embeddings: bool
) -> GlmConfig:
    """The configuration of the `GlmForCausalLM` that computes what an original with this `config` computes.

    It keeps `multi_query_attention`, which says in which order the rows of an original ``query_key_value`` lie.

    Raises:
        ModelError: Glm cannot compute it, or its numbers do not fit each other; all reasons are named.
    """
    told = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    heads, kv_heads = told["num_attention_heads"], told["num_attention_heads"]
    if told["multi_query_attention"]:
        kv_heads = told["multi_query_group_num"]
    wrong = [
        f"{key} is {config[key]!r}, where {value!r} is known"
        for key, value in _COMPUTED.items()
        if config.get(key) is not None and config[key] != value
    ]
    wrong += [f"{key} is {told[key]!r}" for key in ("num_layers", "num_attention_heads") if not _is_count(told[key])]
    if not wrong and heads % kv_heads:
        wrong.append(f"num_attention_heads is {heads}, which is no multiple of multi_query_group_num, {kv_heads}")
    if not wrong and told["kv_channels"] % 4:
        wrong.append(f"kv_channels is {told['kv_channels']}, and half of it is to be rotated in pairs")
    if wrong:
        raise ModelError(f"The model of this config.json cannot be computed here: {'; '.join(wrong)}.")
    eos, pad = _SPECIAL_IDS[layout]
    keys = {
        "vocab_size": told["padded_vocab_size"],
        "hidden_size": told["hidden_size"],
        "intermediate_size": told["ffn_hidden_size"],
        "num_hidden_layers": told["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": told["kv_channels"],
        "max_position_embeddings": told["seq_length"],
        "rms_norm_eps": float(told["layernorm_epsilon"]),
        "rope_parameters": _rope_parameters(told["rope_ratio"], layout),
        "attention_bias": bool(told["add_qkv_bias"]),
        # ChatGLM2 and ChatGLM3 read the key and never drop out: torch's own attention is called without
        "attention_dropout": told["attention_dropout"] if layout == "glm4" else 0.0,
        "tie_word_embeddings": tie_word_embeddings,
        "eos_token_id": told.get("eos_token_id", eos),
        "pad_token_id": told.get("pad_token_id", pad),
        "bos_token_id": told.get("bos_token_id"),
        "dtype": dtype,
        "multi_query_attention": bool(told["multi_query_attention"]),
    }
    return GlmConfig.from_dict(keys)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _rope_parameters(ratio: float, layout: GlmLayout) -> dict[str, Any]:
    """Half of each head is rotated. ChatGLM2-6B-32K divides positions by the ratio, its successors stretch the base."""
    shared = {"partial_rotary_factor": 0.5}
    if layout == "chatglm2" and ratio != 1:
        return {"rope_type": "linear", "rope_theta": 10_000.0, "factor": float(ratio), **shared}
    return {"rope_type": "default", "rope_theta": 10_000.0 * ratio, **shared}
