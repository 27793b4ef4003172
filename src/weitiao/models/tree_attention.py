"""Attention over rows of which some begin alike, the common beginning laid out once: a tree of segments end to end.

Two rows that share their first four tokens are three segments: the common one, and each row's rest. A token of a rest
sees the segments that its own grows from, up to the root, and what came before it in its own::

    common  1 . . .
            1 1 . .
            1 1 1 .
            1 1 1 1
    rest    1 1 1 1  1 .
            1 1 1 1  1 1
    rest    1 1 1 1  . .  1

So every token sees what it would see in its row alone, sliding windows and learnt keys before the row included; the
gradients of what is shared are the sums over the rows that share it. Contexts that are read in both directions cannot
be shared: a token of such a context sees tokens in which the rows differ.

Shapes: T tokens of all segments, R segments, H query heads, K key/value heads (H a multiple of K), D head size, P
learnt keys of each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .attention_ops import make_differentiable
from .row_attention import rest_attention, round_up, row_attention, row_gradients


@torch.library.custom_op("weitiao::tree_attention", mutates_args=())
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    starts: Tensor,
    parents: Tensor,
    scaling: float,
    window: int,
) -> Tensor:
    """Attention output ``[1, T, H, D]``, each segment attending to itself and to those that it grows from.

    Args:
        q: ``[1, H, T, D]``.
        k: ``[1, K, T, D]``.
        v: ``[1, K, T, D]``.
        past_k: ``[K, P, D]``, seen by every token; P may be 0.
        past_v: ``[K, P, D]``.
        starts: ``[R + 1]`` integer offsets of the segments on the CPU, from 0 to T.
        parents: ``[R]`` integers on the CPU: the segment that each grows from, which stands before it; -1 for none.
        scaling: factor on the scores.
        window: sliding window over a row's own tokens, 0 for none.
    """
    out = torch.empty(1, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
    past = past_k.shape[1]
    for (a, b), above in _segments(starts, parents, window):
        before = _total(above)
        keys, values = (_row_of(*pair, above, a, b) for pair in ((past_k, k), (past_v, v)))
        if before:
            part = rest_attention(q[:, :, a:b], keys, values, scaling, before=before, window=window, past=past)
        else:
            part = row_attention(q[:, :, a:b], keys, values, scaling, window=window, past=past)
        out[:, a:b] = part.transpose(1, 2)
    return out


Span = tuple[int, int]
"""From which place of the sequence up to which."""


def _segments(starts: Tensor, parents: Tensor, window: int) -> list[tuple[Span, list[Span]]]:
    """Where each segment lies, and the places before it that a window lets its tokens see, from the root on."""
    spans = list(pairwise(starts.tolist()))
    paths: list[list[Span]] = []
    for number, parent in enumerate(parents.tolist()):
        if not -1 <= parent < number:
            raise ValueError(f"Segment {number} grows from segment {parent}, which does not stand before it.")
        paths.append([] if parent < 0 else [*paths[parent], spans[parent]])
    if window:
        paths = [_last(path, window - 1) for path in paths]
    return list(zip(spans, paths, strict=True))


def _last(path: Sequence[Span], count: int) -> list[Span]:
    """The last `count` places of `path`."""
    kept: list[Span] = []
    for a, b in reversed(path):
        if count <= 0:
            break
        kept.insert(0, (max(a, b - count), b))
        count -= b - a
    return kept


def _total(spans: Sequence[Span]) -> int:
    return sum(b - a for a, b in spans)


def _row_of(past: Tensor, states: Tensor, above: Sequence[Span], a: int, b: int) -> Tensor:
    """Keys or values ``[1, K, P + S, D]`` of one segment's row: the learnt ones, those above it, its own."""
    parts = [states[:, :, start:stop] for start, stop in (*above, (a, b))]
    return torch.cat([past[None], *parts] if past.shape[1] else parts, dim=2) if above or past.shape[1] else parts[0]


@torch.library.custom_op("weitiao::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    starts: Tensor,
    parents: Tensor,
    scaling: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `tree_attention` with respect to q, k, v and the learnt keys and values, in their shapes."""
    past = past_k.shape[1]
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v)]
    past_sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (past_k, past_v)]
    for (a, b), above in _segments(starts, parents, window):
        end = min(a + round_up(b - a), q.shape[2])
        before = _total(above)
        # As in packed_attention_backward: what completes the last block has no gradient and is out of sight.
        grad = nn.functional.pad(grad_out[:, a:b], (0, 0, 0, 0, 0, end - b)).transpose(1, 2)
        keys, values = (_row_of(*pair, above, a, end) for pair in ((past_k, k), (past_v, v)))
        part_q, *parts = row_gradients(
            grad, q[:, :, a:end], keys, values, scaling, window=window, past=past, before=before
        )
        grad_q[:, :, a:b] = part_q[:, :, : b - a]
        for total, past_total, part in zip(sums, past_sums, parts, strict=True):
            past_total += part[0, :, :past]
            place = past
            for start, stop in (*above, (a, b)):
                total[:, :, start:stop] += part[:, :, place : place + stop - start]
                place += stop - start
    grad_k, grad_v = (total.to(k.dtype) for total in sums)
    return grad_q, grad_k, grad_v, past_sums[0].to(past_k.dtype), past_sums[1].to(past_v.dtype)


make_differentiable(tree_attention, tree_attention_backward, num_learnt=5)
