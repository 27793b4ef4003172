"""The products of one LoRA layer, forward and backward, each result written once.

With W the frozen weight, A and B the low-rank pair and s their scaling:

    h = x Aᵀ             y = x Wᵀ + bias + h (sB)ᵀ
    u = g sB             gradients: of x, g W + u A; of A, uᵀ x; of B, s gᵀ h

Written as separate operations, the update of y and that of the input's gradient are each a matrix of their own size
that is written, read again and added, which costs as much as a third of the frozen product. Here they are added by the
thin product itself, rounded once. As operators of torch's they are the same with `torch.compile`.

Shapes: ``...`` tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def lora_output(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The output ``[..., O]`` and h ``[T, r]`` in the dtype of `x`. Knows no gradient: see `lora_linear`.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``, in the dtype of `x`.
        bias: ``[O]`` or none.
        a: ``[r, I]`` in any dtype; computed with in that of `x`.
        b: ``[O, r]``, the same.
        scaling: factor on the update.
    """
    low = torch.mm(x.reshape(-1, x.shape[-1]), a.to(x.dtype).t())
    y = nn.functional.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(low, (b * scaling).to(x.dtype).t())
    return y, low


@torch.library.custom_op("weitiao::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """`lora_output` with gradients by x, a and b; the second result, which the backward pass needs, has none."""
    return lora_output(x, weight, bias, a, b, scaling)


@torch.library.custom_op("weitiao::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    grad: Tensor, x: Tensor, low: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, input_learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear` by x (empty unless `input_learns`), a and b, in their shapes and dtypes."""
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    raised = torch.mm(flat_grad, (b * scaling).to(x.dtype))
    # a thin matrix on the left, its rows contiguous: half the time of gᵀ h for oneDNN
    grad_a = torch.mm(raised.t().contiguous(), flat_x).to(a.dtype)
    grad_b = (torch.mm(low.t().contiguous(), flat_grad).to(b.dtype) * scaling).t().contiguous()
    if not input_learns:
        return x.new_empty(0), grad_a, grad_b
    grad_x = torch.mm(flat_grad, weight).addmm_(raised, a.to(x.dtype))
    return grad_x.view(x.shape), grad_a, grad_b


@lora_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(x.numel() // x.shape[-1], a.shape[0])


@lora_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, low: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, input_learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if input_learns else 0), a.new_empty(a.shape), b.new_empty(b.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, a, b)
    ctx.scaling = scaling


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    learns = ctx.needs_input_grad[0]
    grad_x, grad_a, grad_b = lora_linear_backward(grad, *ctx.saved_tensors, ctx.scaling, learns)
    return grad_x if learns else None, None, None, grad_a, grad_b, None


lora_linear.register_autograd(_gradients, setup_context=_keep)
