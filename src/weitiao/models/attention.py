"""Attention over many rows laid end to end in one sequence, without padding and without a mask over all of them.

Every linear layer of a model sees one sequence ``[1, total_tokens, hidden]``; only attention has to know where
one row ends and the next begins. `PACKED` is registered in transformers' own attention interface, so any model
that supports that interface (Gemma, Qwen, Llama, GLM …) can train on packed rows. On a CPU the alternative, a
dense block-diagonal mask, pushes attention off its fast kernel.

A token sees itself and what came before it in its row (`packed_attention`). Two things may be seen beside that
(`prefixed_attention`): the row's context, in the rows of prefix language models, and keys and values that were learnt
and stand before every row (P-Tuning v2). In a row of four tokens whose first two are context, behind one learnt key::

    1  1 1 . .
    1  1 1 . .
    1  1 1 1 .
    1  1 1 1 1

Rows that begin alike may share what they have in common (`tree_attention`, in a module of its own).

This module knows tensors only: nothing about batches, losses or adapters.

Shapes: T packed tokens, H query heads, K key/value heads (H a multiple of K), D head size, R rows, L layers, P learnt
keys of each layer and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import ModelError
from .attention_ops import make_differentiable
from .row_attention import round_up, row_attention, row_gradients
from .tree_attention import tree_attention

PACKED = "weitiao_packed"
"""The name under which packed attention is known to transformers (`model.set_attn_implementation(PACKED)`)."""


@torch.library.custom_op("weitiao::packed_attention", mutates_args=())
def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scaling: float, window: int) -> Tensor:
    """Attention output ``[1, T, H, D]``, each row attending only to itself.

    Args:
        q: ``[1, H, T, D]``.
        k: ``[1, K, T, D]``.
        v: ``[1, K, T, D]``.
        starts: ``[R + 1]`` integer offsets of the rows on the CPU, from 0 to T.
        scaling: factor on the scores.
        window: sliding window in tokens, 0 for none.
    """
    out = torch.empty(1, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
    bounds = starts.tolist()
    for a, b in pairwise(bounds):
        row = row_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scaling, window=window)
        out[:, a:b] = row.transpose(1, 2)
    return out


@torch.library.custom_op("weitiao::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scaling: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` with respect to q, k and v, in their shapes; scores are recomputed."""
    grads = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
    )
    bounds = starts.tolist()
    for a, b in pairwise(bounds):
        end = min(a + round_up(b - a), q.shape[2])
        # Tokens of the next row complete the last block: without a gradient and out of sight, they change nothing.
        grad = nn.functional.pad(grad_out[:, a:b], (0, 0, 0, 0, 0, end - b)).transpose(1, 2)
        row = (q[:, :, a:end], k[:, :, a:end], v[:, :, a:end])
        for whole, part in zip(grads, row_gradients(grad, *row, scaling, window=window), strict=True):
            whole[:, :, a:b] = part[:, :, : b - a]
    return grads


make_differentiable(packed_attention, packed_attention_backward, num_learnt=3)


# --- Rows that see a context and learnt keys -------------------------------------------------------------------------


@torch.library.custom_op("weitiao::prefixed_attention", mutates_args=())
def prefixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    starts: Tensor,
    contexts: Tensor,
    scaling: float,
    window: int,
) -> Tensor:
    """As `packed_attention`, of rows whose tokens all see the row's context, and learnt keys before it.

    Args:
        q: ``[1, H, T, D]``.
        k: ``[1, K, T, D]``.
        v: ``[1, K, T, D]``.
        past_k: ``[K, P, D]``, the same before every row; P may be 0.
        past_v: ``[K, P, D]``.
        starts: ``[R + 1]`` integer offsets of the rows on the CPU, from 0 to T.
        contexts: ``[R]`` integers on the CPU: how many tokens, from the first on, every token of the row sees.
        scaling: factor on the scores.
        window: sliding window over the row's own tokens, 0 for none; contexts have none.
    """
    out = torch.empty(1, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
    past = past_k.shape[1]
    for a, b, context in _rows_with_contexts(starts, contexts, window):
        row = (q[:, :, a:b], _behind(past_k, k[:, :, a:b]), _behind(past_v, v[:, :, a:b]))
        out[:, a:b] = row_attention(*row, scaling, window=window, past=past, context=context).transpose(1, 2)
    return out


def _rows_with_contexts(starts: Tensor, contexts: Tensor, window: int) -> list[tuple[int, int, int]]:
    """Where each row begins and ends in the sequence, and the length of its context."""
    rows = [(a, b, context) for (a, b), context in zip(pairwise(starts.tolist()), contexts.tolist(), strict=True)]
    for a, b, context in rows:
        if not 0 <= context <= b - a:
            raise ValueError(f"A row of {b - a} tokens cannot have {context} tokens of context.")
        if context and window:
            raise ModelError(
                f"A sliding window of {window} tokens would hide a part of the context from tokens that must see all "
                "of it. Rows with a context need layers of full attention."
            )
    return rows


def _behind(past: Tensor, row: Tensor) -> Tensor:
    """A row's keys or values ``[1, K, P + S, D]``, the learnt ones ``[K, P, D]`` first."""
    return torch.cat([past[None], row], dim=2) if past.shape[1] else row


@torch.library.custom_op("weitiao::prefixed_attention_backward", mutates_args=())
def prefixed_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    starts: Tensor,
    contexts: Tensor,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `prefixed_attention` with respect to q, k, v and the learnt keys and values, in their shapes."""
    past = past_k.shape[1]
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (past_k, past_v)]  # over the rows
    for a, b, context in _rows_with_contexts(starts, contexts, window):
        end = min(a + round_up(b - a), q.shape[2])
        # As in packed_attention_backward: what completes the last block stands behind every context.
        grad = nn.functional.pad(grad_out[:, a:b], (0, 0, 0, 0, 0, end - b)).transpose(1, 2)
        row = (q[:, :, a:end], _behind(past_k, k[:, :, a:end]), _behind(past_v, v[:, :, a:end]))
        part_q, part_k, part_v = row_gradients(grad, *row, scaling, window=window, past=past, context=context)
        grad_q[:, :, a:b] = part_q[:, :, : b - a]
        grad_k[:, :, a:b] = part_k[:, :, past : past + b - a]
        grad_v[:, :, a:b] = part_v[:, :, past : past + b - a]
        for total, part in zip(sums, (part_k, part_v), strict=True):
            total += part[0, :, :past]
    return grad_q, grad_k, grad_v, sums[0].to(past_k.dtype), sums[1].to(past_v.dtype)


make_differentiable(prefixed_attention, prefixed_attention_backward, num_learnt=5)


# --- The function transformers calls ---------------------------------------------------------------------------------


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    row_starts: Tensor | None = None,
    row_prefixes: Tensor | None = None,
    row_parents: Tensor | None = None,
    past_states: tuple[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor] | None = None,
    **_: object,  # transformers hands every attention function the same wide set of arguments
) -> tuple[Tensor, None]:
    """The function transformers calls; what it must know of the rows reaches it through the model's forward keywords.

    Args:
        module: the attention layer.
        query: ``[1, H, T, D]``.
        key: ``[1, K, T, D]``.
        value: the same.
        attention_mask: none, see `_no_mask`.
        dropout: refused.
        scaling: factor on the scores.
        sliding_window: how many tokens a token may look at, itself included.
        softcap: refused.
        row_starts: ``[R + 1]`` offsets of the rows, on the CPU.
        row_prefixes: ``[R]``, how many tokens of each row are its context, on the CPU; None where rows have none.
        row_parents: ``[R]``, which rows go on from which others, on the CPU (`tree_attention`); None where none do.
        past_states: learnt keys and values, of each ``[L, K, P, D]`` or for each layer ``[K, P, D]``; None for none.
    """
    if row_starts is None:
        raise ModelError(
            "Packed attention was called without row_starts, so it cannot know where rows begin. "
            "Call the model through weitiao's training step, or set another attention implementation."
        )
    if dropout or softcap or attention_mask is not None:
        raise ModelError(
            f"Packed attention cannot honour dropout={dropout}, softcap={softcap} or an explicit mask. "
            "Set train.packing=false in the recipe."
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or 0
    if row_prefixes is None and row_parents is None and past_states is None:
        return packed_attention(query, key, value, row_starts, float(scale), window), None
    if past_states is None:
        past_k = past_v = key.new_empty(key.shape[1], 0, key.shape[3])
    else:
        past_k, past_v = (states.to(key.dtype) for states in _past_of_layer(module, past_states))
    if row_parents is not None:
        if row_prefixes is not None:
            raise ModelError("Contexts that are read in both directions cannot be shared by rows.")
        return tree_attention(query, key, value, past_k, past_v, row_starts, row_parents, float(scale), window), None
    contexts = torch.zeros_like(row_starts[1:]) if row_prefixes is None else row_prefixes
    return prefixed_attention(query, key, value, past_k, past_v, row_starts, contexts, float(scale), window), None


# A break in a compiled graph, or else each layer would be compiled anew for the sake of its number.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _past_of_layer(
    module: nn.Module, past_states: tuple[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor]
) -> tuple[Tensor, Tensor]:
    """The learnt keys and values of one layer, ``[K, P, D]`` each."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    return past_states[0][layer], past_states[1][layer]


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """Packed attention needs no mask, so none is built."""


AttentionInterface.register(PACKED, _attention_forward)
AttentionMaskInterface.register(PACKED, _no_mask)
