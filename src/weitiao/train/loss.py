"""The loss at supervised positions only, piece by piece, its gradient computed in the forward pass.

With a vocabulary of 262,144 the logits of 4,096 tokens are 2 GB in bfloat16 and cost as much as half the model,
though only the answer's tokens count. Here the head sees supervised positions only, at most `CHUNK_BYTES` of logits
exist at a time in a buffer that is used again, and because the loss is a sum, the gradient is known as soon as the
probabilities are: the backward pass multiplies it by one number.

On a CPU with a plain frozen head the pieces of many positions are blocks of words (`vocabulary_blocks.py`); otherwise,
and where a loss is beyond what those can express, they are chunks of positions with all their logits.

Shapes: N supervised positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .vocabulary_blocks import loss_by_blocks

CHUNK_BYTES = 1 << 27
"""Logits in flight. 256 rows of 262,144 bfloat16 logits: larger chunks were no faster on a CPU, smaller ones slower."""

_ROUND_ROWS = 32
"""Chunks are filled up to a multiple of so many rows: oneDNN compiles a kernel for every new shape and keeps it."""

_SOFTMAX_BYTES = 1 << 23
"""Float32 probabilities in flight inside a chunk, small enough for the cache: 42 ms for 256 rows against 109 ms at
four times the size, and against 154 ms with fresh memory each time."""

_BLOCKED = (torch.float32, torch.bfloat16)
"""What blocks of words are computed in: exponentials beside a target's have no place in float16."""

_FEWEST_BLOCKED = 64
"""Of fewer positions than this blocks are slower (25 positions: 153 against 126 ms): reading the weight is the most."""

_EXACT_UNTIL = 80.0
"""A loss above this comes from a probability near the smallest normal float32 or below: its log may be 0.4 % off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The output layer of a causal model: ``logits = softcap(scale · (hidden Wᵀ + bias))``."""

    weight: Tensor
    """``[V, H]``, often the embedding itself."""
    bias: Tensor | None = None
    softcap: float | None = None
    """``softcap · tanh(logits / softcap)``, as in Gemma 2."""
    scale: float = 1.0


def head_of(model: nn.Module) -> Head:
    """The head of a transformers causal model, from its output layer and configuration.

    `check_head` proves the result against the model's own logits.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    scale = config.get("logit_scale") or 1.0
    scale /= config.get("logits_scaling") or 1.0
    return Head(weight=layer.weight, bias=layer.bias, softcap=config.get("final_logit_softcapping"), scale=scale)


def supervised_loss(
    hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, *, out: Tensor | None = None
) -> Tensor:
    """The weighted sum of cross-entropies, a float32 scalar that `backward` works on.

    Args:
        hidden: ``[N, H]`` hidden states at the positions that predict `targets`.
        targets: ``[N]`` token ids.
        weights: ``[N]`` float32, each position's share of the loss (1 / supervised tokens of the optimiser step
            gives their mean).
        head: the output layer.
        out: ``[N]`` float32; takes the cross-entropy of every position, unweighted and without gradient.
    """
    loss: Tensor = _SupervisedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, targets, weights, head.weight, head.bias, head.softcap, head.scale, out
    )
    return loss


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        out: Tensor | None,
    ) -> Tensor:
        learn_hidden, _, _, learn_weight, learn_bias, _, _, _ = ctx.needs_input_grad
        plain = bias is None and softcap is None and scale == 1.0
        blocked = plain and len(hidden) >= _FEWEST_BLOCKED and hidden.dtype in _BLOCKED
        if blocked and not learn_weight and hidden.device.type == "cpu":
            by_blocks = loss_by_blocks(hidden, targets, weights, weight, learn=learn_hidden)
            if by_blocks is not None:
                losses, grad = by_blocks
                if out is not None:
                    out.copy_(losses)
                ctx.grads = (grad, None, None)
                return (losses * weights).sum()
        vocabulary = weight.shape[0]
        rows = max(1, CHUNK_BYTES // (vocabulary * hidden.element_size()))
        grad_hidden = torch.empty_like(hidden) if learn_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learn_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if learn_bias and bias is not None else None
        buffer = _buffer("logits", _rounded(min(rows, len(hidden))) * vocabulary, hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            chunk = hidden[part]
            padded = buffer[: _rounded(len(chunk)) * vocabulary].view(-1, vocabulary)
            torch.mm(nn.functional.pad(chunk, (0, 0, 0, len(padded) - len(chunk))), weight.t(), out=padded)
            logits = padded[: len(chunk)]  # the rows below are zero and stay it
            if bias is not None:
                logits += bias
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            slopes = None if softcap is None else 1 - (logits / softcap) ** 2
            losses = _softmax_in_place(logits, targets[part])
            total += (losses * weights[part]).sum()
            if out is not None:
                out[part] = losses
            # `logits` now holds the probabilities; minus one at the target they are the gradient.
            logits[torch.arange(len(chunk), device=logits.device), targets[part]] -= 1
            if slopes is not None:
                logits *= slopes
            if grad_weight is not None or grad_bias is not None:
                weighted = logits.float() * (weights[part, None] * scale)
                if grad_weight is not None:
                    grad_weight.addmm_(weighted.t(), chunk.float())
                if grad_bias is not None:
                    grad_bias += weighted.sum(0)
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(padded, weight)[: len(chunk)] * (weights[part, None] * scale)
        ctx.grads = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (None if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.grads)
        return hidden, None, None, weight, bias, None, None, None


def _rounded(count: int) -> int:
    return -(-count // _ROUND_ROWS) * _ROUND_ROWS


def _softmax_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn `logits` ``[n, V]`` into probabilities in place; return the cross-entropies ``[n]`` in float32."""
    count, vocabulary = logits.shape
    rows = max(1, _SOFTMAX_BYTES // (vocabulary * 4))
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)
    buffer = _buffer("softmax", min(rows, count) * vocabulary, losses)
    for start in range(0, count, rows):
        block = logits[start : start + rows]
        wanted = targets[start : start + rows, None]
        probabilities = buffer[: block.numel()].view(block.shape)
        # log-softmax of a block costs a second pass; -log p is as exact until p is denormal (exp(-87.3)), checked below
        torch.softmax(block, -1, dtype=torch.float32, out=probabilities)
        loss = -probabilities.gather(1, wanted)[:, 0].log()
        if not (loss < _EXACT_UNTIL).all():  # not `>=`: NaN counts too
            loss = block.float().logsumexp(-1) - block.gather(1, wanted)[:, 0].float()
        losses[start : start + rows] = loss
        block.copy_(probabilities)
    return losses


_BUFFERS: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}


def _buffer(name: str, size: int, like: Tensor) -> Tensor:
    """A flat scratch tensor of at least `size` elements, kept between calls: fresh pages cost more than the work."""
    key = (name, like.device, like.dtype)
    if key not in _BUFFERS or _BUFFERS[key].numel() < size:
        _BUFFERS[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return _BUFFERS[key]
