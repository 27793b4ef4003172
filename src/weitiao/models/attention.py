"""Causal attention over many rows laid end to end in one sequence, without padding and without a mask.

Every linear layer of a model sees one sequence ``[1, total_tokens, hidden]``; only attention has to know where
one row ends and the next begins. `PACKED` is registered in transformers' own attention interface, so any model
that supports that interface (Gemma, Qwen, Llama, GLM …) can train on packed rows. On a CPU the alternative, a
dense block-diagonal mask, pushes attention off its fast kernel.

This module knows tensors only: nothing about batches, losses or adapters.

Shapes: T packed tokens, H query heads, K key/value heads (H a multiple of K), D head size, R rows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import ModelError

PACKED = "weitiao_packed"
"""The name under which packed attention is known to transformers (`model.set_attn_implementation(PACKED)`)."""

_BLOCK = 256
"""Queries per block of the backward pass. On 2 AMX cores, 4 query heads of 256, forward + backward of 128 tokens take
1.05 ms this way against 1.56 ms with SDPA's own backward."""


_ROUND_ROW = 32
"""Rows are taken up to a multiple of so many tokens in the backward pass: oneDNN compiles and keeps a kernel for every
new shape, and rows have as many lengths as there are."""


def _window_mask(start: int, stop: int, first: int, window: int, device: torch.device) -> Tensor:
    """Boolean ``[stop - start, stop - first]``: True where query start… may look at key first….

    Itself and what came before; with a window > 0, itself and the `window - 1` tokens before it.
    """
    query = torch.arange(start, stop, device=device)[:, None]
    key = torch.arange(first, stop, device=device)[None, :]
    return (key <= query) & (key > query - window) if window > 0 else key <= query


def _row_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int) -> Tensor:
    """Causal attention of one row: q ``[1, H, S, D]``, k and v ``[1, K, S, D]`` → ``[1, H, S, D]``."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if 0 < window < q.shape[2]:
        mask = _window_mask(0, q.shape[2], 0, window, q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)


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
        row = _row_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scaling, window)
        out[:, a:b] = row.transpose(1, 2)
    return out


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scaling: float, window: int) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])


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
        end = min(a + -(-(b - a) // _ROUND_ROW) * _ROUND_ROW, q.shape[2])
        # Tokens of the next row complete the last block: without a gradient and out of sight, they change nothing.
        grad = nn.functional.pad(grad_out[:, a:b], (0, 0, 0, 0, 0, end - b)).transpose(1, 2)
        row = (q[:, :, a:end], k[:, :, a:end], v[:, :, a:end])
        for whole, part in zip(grads, _row_backward(grad, *row, scaling, window), strict=True):
            whole[:, :, a:b] = part[:, :, : b - a]
    return grads


@packed_attention_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scaling: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
    )


def _row_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one row, one block of queries after the other, so that scores stay ``[H, block, S]`` at most.

    Query heads that share a key head are stacked, so keys are never repeated.
    """
    _, num_heads, length, size = q.shape
    num_kv = k.shape[1]
    groups = num_heads // num_kv

    def stacked(x: Tensor, a: int, b: int) -> Tensor:
        return x[0, :, a:b].reshape(num_kv, groups * (b - a), size)

    if length <= _BLOCK:
        hidden = _hidden_keys(0, length, 0, window, q.device)
        grad_q, grad_k, grad_v = _block_backward(
            stacked(grad, 0, length), stacked(q, 0, length), k[0], v[0], hidden, scaling
        )
        return grad_q.view(1, num_heads, length, size), grad_k[None], grad_v[None]
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(num_kv, length, size, dtype=torch.float32, device=q.device) for _ in "kv")
    for a in range(0, length, _BLOCK):
        b = min(a + _BLOCK, length)
        first = max(0, a - window + 1) if window > 0 else 0
        hidden = _hidden_keys(a, b, first, window, q.device)
        part_q, part_k, part_v = _block_backward(
            stacked(grad, a, b), stacked(q, a, b), k[0, :, first:b], v[0, :, first:b], hidden, scaling
        )
        grad_q[0, :, a:b] = part_q.view(num_heads, b - a, size)
        grad_k[:, first:b] += part_k
        grad_v[:, first:b] += part_v
    return grad_q, grad_k[None].to(k.dtype), grad_v[None].to(v.dtype)


def _block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries ``[K, groups · Q, D]`` over keys ``[K, S, D]``; `hidden` ``[Q, S]`` is True out of sight."""
    num_kv = len(q)
    scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scaling)
    scores.view(num_kv, -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    probabilities = scores.softmax(-1)
    grad_p = torch.bmm(grad, v.transpose(1, 2)).float()
    centre = (grad_p * probabilities).sum(-1, keepdim=True)
    grad_scores = grad_p.sub_(centre).mul_(probabilities).mul_(scaling).to(q.dtype)
    return (
        torch.bmm(grad_scores, k),
        torch.bmm(grad_scores.transpose(1, 2), q),
        torch.bmm(probabilities.to(q.dtype).transpose(1, 2), grad),
    )


@lru_cache(maxsize=256)
def _hidden_keys(start: int, stop: int, first: int, window: int, device: torch.device) -> Tensor:
    """The opposite of `_window_mask`, kept: making it took as long as a product of the backward pass."""
    return ~_window_mask(start, stop, first, window, device)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, float, int],
    output: Tensor,
) -> None:
    q, k, v, starts, scaling, window = inputs
    ctx.save_for_backward(q, k, v, starts)
    ctx.scaling, ctx.window = scaling, window  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts = ctx.saved_tensors  # type: ignore[attr-defined]
    scaling, window = ctx.scaling, ctx.window  # type: ignore[attr-defined]
    grads = packed_attention_backward(grad, q, k, v, starts, scaling, window)
    return (*grads, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_setup_context)


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
    **_: object,  # transformers hands every attention function the same wide set of arguments
) -> tuple[Tensor, None]:
    """The function transformers calls; `row_starts` reaches it through the model's forward keywords."""
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
    return packed_attention(query, key, value, row_starts, float(scale), sliding_window or 0), None


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """Packed attention needs no mask, so none is built."""


AttentionInterface.register(PACKED, _attention_forward)
AttentionMaskInterface.register(PACKED, _no_mask)
