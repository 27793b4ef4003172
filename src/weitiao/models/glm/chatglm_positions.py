"""Where the tokens of ChatGLM-6B's rows stand, and which of them see each other.

A row is a context, then ``<sop>`` and the answer. In the context stands a mask token: the answer takes its place. Each
token has two positions: in channel 0 context tokens count from 0 and the answer stands still where the mask token is;
in channel 1 the context has 0 and the answer counts from 1. So channel 1 alone tells where a context ends, and every
mask is made from it. (Du et al. 2022, "GLM", section 2.3; ChatGLM-6B has one gap, which is never filled in.)

Knows tensors only: nothing about layers or caches.

Shapes: b rows, s new tokens of each, p cached ones, D head size.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import ModelError
from ..prefix_lm import RowPrefix

_ROPE_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """The token ids that divide a row."""

    bos: int
    """``<sop>``, the first token of the answer."""
    gmask: int
    """``[gMASK]``: an answer of any length takes its place."""
    mask: int
    """``[MASK]``: a short one does; it counts only where there is no ``[gMASK]``."""

    def row_prefix(self, token_ids: Sequence[int]) -> RowPrefix:
        """The context of one row without padding.

        Raises:
            ModelError: it has no ``<sop>``, or no mask token before it.
        """
        tokens = list(token_ids)
        if self.bos not in tokens:
            raise ModelError(
                f"There is no <sop> (id {self.bos}) among the {len(tokens)} tokens, so there is no telling where the "
                f"context ends. End the prompt with [gMASK] <sop> (ids {self.gmask}, {self.bos}), "
                "or give position_ids of shape [batch, 2, length]."
            )
        context = tokens[: tokens.index(self.bos)]
        for mask_id in (self.gmask, self.mask):
            if mask_id in context:
                return RowPrefix(num_tokens=len(context), mask_position=context.index(mask_id))
        raise ModelError(
            f"There is no [gMASK] (id {self.gmask}) and no [MASK] (id {self.mask}) among the {len(context)} tokens "
            f"before <sop>, so the answer has no place. End the prompt with [gMASK] <sop> (ids {self.gmask}, "
            f"{self.bos}), or give position_ids of shape [batch, 2, length]."
        )


def positions_of(input_ids: Tensor, real: Tensor | None, special: SpecialIds) -> Tensor:
    """Positions ``[b, 2, s]`` of whole rows ``[b, s]``.

    Tokens count from the first real one, as if there were no padding; padding stands at 0 in both channels.

    Args:
        input_ids: the rows.
        real: ``[b, s]``, False at padding; None where every token counts.
        special: the ids that divide a row.

    Raises:
        ModelError: a row without context; the text names it.
    """
    counted = torch.ones_like(input_ids, dtype=torch.bool) if real is None else real
    prefixes = []
    for row, (tokens, kept) in enumerate(zip(input_ids.tolist(), counted.tolist())):
        try:
            prefixes.append(special.row_prefix([token for token, keep in zip(tokens, kept) if keep]))
        except ModelError as error:
            raise ModelError(f"Row {row} of the batch: {error}") from None
    num_context = torch.tensor([[prefix.num_tokens] for prefix in prefixes], device=input_ids.device)
    mask_position = torch.tensor([[prefix.mask_position] for prefix in prefixes], device=input_ids.device)
    places = places_of(counted)
    first = torch.where(places < num_context, places, mask_position)
    second = (places - num_context + 1).clamp(min=0)
    return torch.stack([first, second], dim=1).masked_fill(~counted[:, None], 0)


def real_tokens(attention_mask: Tensor, length: int) -> Tensor:
    """``[b, s]``, False at padding, of the last `length` columns of a mask.

    Args:
        attention_mask: ``[b, p + s]``, 1 at tokens and 0 at padding; or booleans ``[b, 1, s, p + s]``, True where a
            token must not look: padding does not look at itself.
        length: s.

    Raises:
        ModelError: it is neither.
    """
    if attention_mask.ndim == 2 and attention_mask.shape[-1] >= length:
        return attention_mask[:, -length:].bool()
    if attention_mask.ndim == 4 and attention_mask.dtype == torch.bool and attention_mask.shape[2] == length:
        return ~attention_mask[:, 0, :, -length:].diagonal(dim1=1, dim2=2)
    raise ModelError(
        f"ChatGLM cannot read an attention_mask of shape {list(attention_mask.shape)} and type {attention_mask.dtype} "
        f"for {length} tokens. Give 1 and 0 in [batch, length], or booleans [batch, 1, length, length], True where a "
        "token must not look."
    )


def over_all_columns(attention_mask: Tensor, num_columns: int) -> Tensor:
    """The mask, wide enough for the cached columns: those that it does not reach on its left are visible."""
    missing = num_columns - attention_mask.shape[-1]
    if missing < 0:
        raise ModelError(
            f"The attention_mask reaches over {attention_mask.shape[-1]} columns, but there are only {num_columns} "
            "cached and new tokens. Give the cache that the mask belongs to."
        )
    return torch.nn.functional.pad(attention_mask, (missing, 0), value=attention_mask.ndim == 2)


def places_of(real: Tensor) -> Tensor:
    """``[b, s]``: how many real tokens stand before each."""
    return real.long().cumsum(-1) - 1


def context_of(position_ids: Tensor) -> Tensor:
    """``[b, s]``, True in front of the first token of the answer: at the context and at padding on its left."""
    return (position_ids[:, 1] > 0).cumsum(-1) == 0


def context_blocks(position_ids: Tensor, num_cached: int) -> Tensor:
    """``[b, p + s]``: 0 at the context of the new tokens, whose tokens all see each other; -1 elsewhere."""
    blocks = torch.where(context_of(position_ids), 0, -1)
    return torch.nn.functional.pad(blocks, (num_cached, 0), value=-1)


def refuse_divided_context(position_ids: Tensor, real: Tensor | None) -> None:
    """Raises ModelError where a context began among the cached tokens and goes on: those no longer see the rest."""
    context = context_of(position_ids)
    if real is not None:
        context = context & real
    first = position_ids[:, 0].masked_fill(~context, torch.iinfo(position_ids.dtype).max).amin(-1)
    divided = (context.any(-1) & (first > 0)).nonzero()
    if divided.numel():
        row = int(divided[0])
        raise ModelError(
            f"Row {row} of the batch continues its context at position {int(first[row])}, but the tokens in the cache "
            "can no longer see it: all tokens of a context see each other. Give the whole prompt in one call "
            "(prefill_chunk_size=None)."
        )


def visible(position_ids: Tensor, real: Tensor) -> Tensor:
    """Which columns ``[b, s, s]`` each token of whole rows sees: all before it, the context, itself; no padding."""
    length = position_ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    context = context_of(position_ids)
    return (causal | (context[:, :, None] & context[:, None, :])) & real[:, None, :]


@lru_cache
def inverse_frequencies(dim: int) -> tuple[float, ...]:
    """The angles per position of a rotation of `dim` features, ``dim / 2`` of them.

    They are rounded to float16, as the released model was trained with: at 240 tokens that moves logits by 3e-2.
    """
    exact = (_ROPE_BASE ** (-2 * pair / dim) for pair in range(dim // 2))
    return tuple(struct.unpack("e", struct.pack("e", frequency))[0] for frequency in exact)


def rotation(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[b, 1, s, D]`` of the angles at positions ``[b, 2, s]``; channel 0 turns the first half of D.

    Computed in float32, whatever the model's precision: in float16 a cosine at position 2,047 is off by 0.43.
    """
    half = head_dim // 2
    frequencies = torch.tensor(inverse_frequencies(half), device=position_ids.device)
    angles = position_ids[..., None].float() * frequencies
    both = torch.cat([angles, angles], dim=-1)  # [b, 2, s, D / 2]
    table = torch.cat([both[:, 0], both[:, 1]], dim=-1)[:, None]
    return table.cos().to(dtype), table.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys ``[b, H, s, D]``, turned; in each half of D feature j is paired with feature j + D/4."""
    a, b, c, d = states.chunk(4, dim=-1)
    return states * cos + torch.cat([-b, a, -d, c], dim=-1) * sin
