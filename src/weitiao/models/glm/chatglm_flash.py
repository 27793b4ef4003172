"""Flash attention over a context and an answer, whose kernels know no masks: one call for each, without padding.

Context tokens attend to all of the context, which is not causal; answer tokens attend to all before them, which is
causal when the last query and the last key are laid on each other. So both are what the kernels know.

Shapes: b rows, s new tokens of each, p cached ones, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

from ...errors import ModelError
from .chatglm_positions import context_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Which tokens attend to which, row after row."""

    causal: bool
    """Whether the n-th last query of a row sees all keys but the n last ones, or all."""
    queries: Tensor
    """Where the queries lie among all ``b · s`` tokens."""
    keys: Tensor
    """Where the keys lie among all ``b · (p + s)`` columns."""
    query_starts: Tensor
    """``[b + 1]``, the first query of each row, and the end."""
    key_starts: Tensor
    """``[b + 1]``, the first key of each row, and the end."""
    most_queries: int
    most_keys: int
    num_columns: int
    """p + s; a cache of fixed size has more."""


def _stretch(queries: Tensor, keys: Tensor, *, causal: bool) -> Stretch:
    """The stretch of the queries ``[b, s]`` and keys ``[b, p + s]`` that are True."""
    counts = [marks.sum(-1) for marks in (queries, keys)]
    starts = [nn.functional.pad(count.cumsum(0), (1, 0)).to(torch.int32) for count in counts]
    return Stretch(
        causal=causal,
        queries=queries.flatten().nonzero()[:, 0],
        keys=keys.flatten().nonzero()[:, 0],
        query_starts=starts[0],
        key_starts=starts[1],
        most_queries=int(counts[0].max()),
        most_keys=int(counts[1].max()),
        num_columns=keys.shape[1],
    )


def stretches(position_ids: Tensor, attention_mask: Tensor | None, num_cached: int) -> tuple[Stretch, Stretch]:
    """Context and answer of the tokens at positions ``[b, 2, s]``.

    Args:
        position_ids: see chatglm_positions.py.
        attention_mask: ``[b, p + s]``, 1 at tokens and 0 at padding; None where there is none.
        num_cached: p.
    """
    if flash_attn_supports_top_left_mask():
        raise ModelError(
            "This device's flash attention aligns queries with the first keys, which an answer after a context cannot "
            "use. Load the model with attn_implementation='sdpa'."
        )
    batch, _, length = position_ids.shape
    shape = (batch, num_cached + length)
    seen = torch.ones(shape, dtype=torch.bool, device=position_ids.device)
    if attention_mask is not None:
        seen = attention_mask.to(position_ids.device).bool().expand(shape)
    context, real = context_of(position_ids), seen[:, num_cached:]
    seen_by_context = seen & nn.functional.pad(context, (num_cached, 0), value=True)
    return (
        _stretch(context & real, seen_by_context, causal=False),
        _stretch(~context & real, seen, causal=True),
    )


def attend_by_stretches(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: tuple[Stretch, Stretch],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention ``[b, s, H, D]``, 0 at padding, by a function of transformers' flash attention interface.

    Args:
        attend: that function.
        module: the attention layer.
        query: ``[b, H, s, D]``.
        key: ``[b, H, p + s, D]``.
        value: the same.
        parts: which tokens attend to which.
        kwargs: handed on.
    """
    batch, heads, length, size = query.shape
    columns = parts[0].num_columns
    queries, keys, values = (
        states.transpose(1, 2).reshape(-1, heads, size)
        for states in (query, key[:, :, :columns], value[:, :, :columns])
    )
    out = queries.new_zeros(batch * length, heads, size)
    for part in parts:
        if not part.most_queries:
            continue
        states = (queries[part.queries], keys[part.keys], values[part.keys])
        attended, _ = attend(
            module,
            *(tokens[None].transpose(1, 2) for tokens in states),
            None,
            is_causal=part.causal,
            cu_seq_lens_q=part.query_starts,
            cu_seq_lens_k=part.key_starts,
            max_length_q=part.most_queries,
            max_length_k=part.most_keys,
            **kwargs,
        )
        out = out.index_copy(0, part.queries, attended[0].to(out.dtype))
    return out.view(batch, length, heads, size), None
