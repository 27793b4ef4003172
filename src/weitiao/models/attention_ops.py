"""What an attention over rows end to end needs beside its forward and backward to be an operator of torch's.

Such an operator takes ``(q, k, v, …, scaling, window)``: first what may learn, then where rows begin and the like, then
two numbers. Its backward takes the output's gradient before them and gives those of what may learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_differentiable(forward: Any, backward: Any, *, num_learnt: int) -> None:
    """Register shapes and gradients of the custom operator `forward`.

    Args:
        forward: the operator; gives ``[1, T, H, D]`` of queries ``[1, H, T, D]``.
        backward: the operator of its gradients, contiguous.
        num_learnt: how many of its first arguments have a gradient.
    """

    @forward.register_fake  # type: ignore[untyped-decorator]
    def _(q: Tensor, *_: object) -> Tensor:
        return q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])

    @backward.register_fake  # type: ignore[untyped-decorator]
    def _(_grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:num_learnt])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, scaling, window = inputs
        ctx.save_for_backward(*tensors)
        ctx.scaling, ctx.window = scaling, window

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = backward(grad, *saved, ctx.scaling, ctx.window)
        return (*found, *[None] * (len(saved) - num_learnt + 2))

    forward.register_autograd(gradients, setup_context=keep)
