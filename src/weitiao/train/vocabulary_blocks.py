"""Cross-entropies and their gradient block of words by block of words, so that a position's logits never exist at once.

With l the logits of a position and t its target, all that is needed are sums over the vocabulary of ``exp(l - l_t)``:

    S = Σ_{v ≠ t} exp(l_v - l_t)        loss = log(1 + S)
    G = Σ_{v ≠ t} exp(l_v - l_t) W_v    gradient of the hidden state = (G - S W_t) / (1 + S)

so a block of words is multiplied, exponentiated and multiplied back while it lies in the cache, and the weight is read
from memory once instead of once a product. The target's own logit keeps the exponentials near 1, as the greatest logit
does in a softmax, but is known beforehand: in bfloat16 that is more exact than the greatest one for losses below 16,
less beyond. It is left out of the sums: ``1 - p_t`` is then exact where p_t is near 1.

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_WORDS = 1024
"""Words in a block of `_CHUNK_ROWS` positions: on an AMX core 1.3 MB of logits beside 1.3 MB of weights. Blocks of 512
and 2,048 words were 4 to 10 % slower; of few positions blocks are up to four times as long."""

_CHUNK_ROWS = 640
"""Of more positions the weights are read again for every so many; their sums would no longer stay in the cache."""

_ROUND_ROWS = 32
"""Chunks are filled up to a multiple of so many rows: oneDNN compiles a kernel for every new shape and keeps it."""

_GREATEST_LOSS = 80.0
"""Beyond it sums would leave the range of float32, which ends at exp(88.7)."""


def loss_by_blocks(
    hidden: Tensor, targets: Tensor, weights: Tensor, weight: Tensor, *, learn: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The cross-entropies ``[N]`` of the logits ``hidden · weightᵀ`` in float32, and a gradient ``[N, H]``.

    The gradient, computed with `learn` only, is that of their sum weighted by `weights`, by the hidden states, in their
    dtype. None when a loss is not finite or too large for this way of computing it.

    Args:
        hidden: ``[N, H]`` in float32 or bfloat16.
        targets: ``[N]`` token ids.
        weights: ``[N]`` float32.
        weight: ``[V, H]``, in the dtype of `hidden`.
        learn: whether the gradient is wanted.
    """
    losses = torch.empty(len(hidden), dtype=torch.float32)
    grad = torch.empty_like(hidden) if learn else None
    num_chunks = -(-len(hidden) // _CHUNK_ROWS)
    size = _rounded(-(-len(hidden) // max(1, num_chunks)))
    for start in range(0, len(hidden), max(1, size)):
        part = slice(start, start + size)
        sums, weighted, rest = _sums(hidden[part], targets[part], weight, learn=learn)
        scale = rest.exp()  # sums are relative to the target's logit as rounded, which this much was taken from
        found = torch.log1p(sums / scale)
        if not (found < _GREATEST_LOSS).all():  # not `>=`: NaN counts too
            return None
        losses[part] = found
        if grad is not None and weighted is not None:
            weighted.addcmul_(weight[targets[part]].float(), sums[:, None], value=-1)
            grad[part] = weighted.mul_((weights[part] / (scale + sums))[:, None])
    return losses, grad


def _sums(hidden: Tensor, targets: Tensor, weight: Tensor, *, learn: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """S ``[n]`` and G ``[n, H]`` of the module's docstring, relative to the targets' logits in the dtype of `hidden`.

    Third comes what that rounding took from them, ``[n]``. All in float32.
    """
    count = len(hidden)
    exact = (hidden.float() * weight[targets].float()).sum(-1)
    reference = exact.to(hidden.dtype)
    filling = _rounded(count) - count
    words_at_once = BLOCK_WORDS * max(1, min(4, _CHUNK_ROWS // (count + filling)))
    starts = range(0, len(weight), words_at_once)
    order = targets.argsort()
    bounds = torch.searchsorted(targets[order], torch.tensor([*starts, len(weight)])).tolist()
    padded, subtracted = pad(hidden, (0, 0, 0, filling)), pad(reference, (0, filling))[:, None]
    sums = torch.zeros(len(padded), dtype=torch.float32)
    weighted = torch.zeros(padded.shape, dtype=torch.float32) if learn else None
    buffer = hidden.new_empty(len(padded) * min(words_at_once, len(weight)))
    product = torch.empty_like(padded)
    for number, start in enumerate(starts):
        words = weight[start : start + words_at_once]
        block = buffer[: len(padded) * len(words)].view(len(padded), -1)
        torch.mm(padded, words.t(), out=block)
        block.sub_(subtracted).exp_()
        here = order[bounds[number] : bounds[number + 1]]
        if len(here):
            block[here, targets[here] - start] = 0
        sums += block.sum(1, dtype=torch.float32)
        if weighted is not None:
            torch.mm(block, words, out=product)
            weighted += product
    return sums[:count], None if weighted is None else weighted[:count], exact - reference.float()


def _rounded(count: int) -> int:
    return -(-count // _ROUND_ROWS) * _ROUND_ROWS
