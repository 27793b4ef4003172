"""Tiny random models with contexts and learnt prefixes, their rows, and attention over both as a plain formula."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weitiao.models.glm.chatglm import ChatGlmForCausalLM
from weitiao.models.glm.chatglm_config import ChatGlmConfig
from weitiao.models.ptuning import attach_prefix

VOCABULARY = 96
MASK, GMASK, SOP, EOP = 90, 91, 94, 95
SHARED = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip


def tiny(
    family: str, *, past: int = 0, vocab_size: int = VOCABULARY, projection: bool = False, std: float = 0.2, **ids: int
) -> PreTrainedModel:
    """A tiny random model behind `past` learnt keys; with a higher `std` its scores are wider apart."""
    torch.manual_seed(7)
    shared: dict[str, Any] = {**SHARED, "vocab_size": vocab_size}
    model: PreTrainedModel
    if family == "chatglm":
        special = {"mask_token_id": MASK, "gmask_token_id": GMASK, "bos_token_id": SOP, "eos_token_id": EOP} | ids
        sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 4, "inner_hidden_size": 48}
        config = ChatGlmConfig(
            vocab_size=vocab_size, max_sequence_length=256, tie_word_embeddings=False, **sizes, **special
        )
        model = ChatGlmForCausalLM(config)
    elif family == "glm":
        model = GlmForCausalLM(GlmConfig(**shared, head_dim=8, attention_bias=True, partial_rotary_factor=0.5))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared))
    elif family == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**shared, head_dim=8, sliding_window=6, layer_types=layers, tie_word_embeddings=False)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**shared))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "bias" not in name), std=std)
    if past:
        attach_prefix(model, num_virtual_tokens=past, projection=projection, seed=3)
    return model.float().eval()


def a_row(draw: random.Random, family: str, *, context: int, answer: int) -> list[int]:
    """`context` tokens, with their mask token anywhere among them, <sop> and `answer` tokens; or any tokens."""
    tokens = [draw.randrange(4, MASK) for _ in range(context + 1 + answer)]
    if family == "chatglm":
        tokens[draw.choice([context - 1, draw.randrange(context)])] = draw.choice([MASK, GMASK])
        tokens[context] = SOP
    return tokens


def plain_formula(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **known: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q kᵀ) v of one row over [learnt keys, its own], with the mask written out, in float64."""
    past_k, past_v = (states[module.layer_idx][None] for states in known["past_states"])
    keys, values = (torch.cat(pair, dim=2).double() for pair in ((past_k, key), (past_v, value)))
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    length, num_past, context = query.shape[2], past_k.shape[2], known["context"]
    seen = torch.tensor(
        [[j < num_past + context or j - num_past <= i for j in range(num_past + length)] for i in range(length)]
    )
    scores = (scaling * query.double() @ keys.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ values).to(query.dtype).transpose(1, 2), None


AttentionInterface.register("plain_formula", plain_formula)
AttentionMaskInterface.register("plain_formula", lambda *_, **__: None)
