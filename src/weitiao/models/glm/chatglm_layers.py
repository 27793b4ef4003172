"""The layers of ChatGLM-6B; parameters have the released checkpoint's names.

Shapes: b rows, s new tokens of each, p cached ones, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .chatglm_config import ChatGlmConfig
from .chatglm_flash import Stretch, attend_by_stretches
from .chatglm_positions import rotate


def _attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: object,  # transformers hands every attention function the same wide set of arguments
) -> tuple[Tensor, Tensor]:
    """Attention ``[b, s, H, D]`` and its weights ``[b, H, s, p + s]``, by plain products; softmax in float32."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3)).float()
    if attention_mask is not None:
        scores = scores + attention_mask  # in float16 the sum could be -inf in every column of a padding row
    weights = scores.softmax(-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ChatGlmAttention(nn.Module):
    """Self-attention; which tokens see each other, the mask or the chosen attention function says."""

    def __init__(self, config: ChatGlmConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        rotations: tuple[Tensor, Tensor],
        attention_mask: Tensor | tuple[Stretch, Stretch] | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        together = self.query_key_value(hidden_states).view(*shape, -1, 3 * self.head_dim)
        query, key, value = together.transpose(1, 2).chunk(3, dim=-1)
        query, key = rotate(query, *rotations), rotate(key, *rotations)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _attend_eagerly
        )
        if isinstance(attention_mask, tuple):
            attend = partial(attend_by_stretches, attend)
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.dense(out.reshape(*shape, -1)), weights


class ChatGlmMLP(nn.Module):
    """Two layers with the tanh form of GELU between; no gate."""

    def __init__(self, config: ChatGlmConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh")
        out: Tensor = self.dense_4h_to_h(inner)
        return out


class ChatGlmBlock(GradientCheckpointingLayer):
    """One layer."""

    def __init__(self, config: ChatGlmConfig, layer_idx: int) -> None:
        super().__init__()
        self.alpha = (2 * config.residual_layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGlmAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGlmMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        rotations: tuple[Tensor, Tensor],
        attention_mask: Tensor | tuple[Stretch, Stretch] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(normed, rotations, attention_mask, past_key_values, **kwargs)
        normed = self.post_attention_layernorm(normed * self.alpha + attended)
        out: Tensor = normed * self.alpha + self.mlp(normed)
        return out
