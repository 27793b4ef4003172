"""DoRA beside a packed weight: PEFT's parameters and results, without keeping a float copy of the weight.

With W the frozen weight, A and B the low-rank pair, s their scaling and m the learnt magnitudes, one per row
(Liu et al. 2024, arXiv:2402.09353):

    y = m / ‖W + s B A‖ · (x Wᵀ + s x Aᵀ Bᵀ) + bias

where ‖·‖ is the length of each row, taken as a constant in the backward pass as §4.3 of the paper does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from .packed_layers import float_weight
from .quantized import QuantizedLinear, dequantize_weight, row_blocks


@torch.library.custom_op("weitiao::tuned_row_lengths", mutates_args=())
def tuned_row_lengths(packed: Tensor, scale: Tensor, bits: int, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``‖W + scaling · B A‖`` of each row, float32 ``[out]``; W unpacked in blocks of rows. Has no gradient."""
    out = torch.empty(packed.shape[0], dtype=torch.float32, device=packed.device)
    for start, stop in row_blocks(packed.shape[0], a.shape[1], packed.device):
        rows = dequantize_weight(packed[start:stop], scale[start:stop], bits, torch.float32)
        rows.addmm_(b[start:stop].float(), a.float(), alpha=scaling)
        out[start:stop] = torch.linalg.vector_norm(rows, dim=1)
    return out


@tuned_row_lengths.register_fake
def _(packed: Tensor, scale: Tensor, bits: int, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.empty(packed.shape[0], dtype=torch.float32, device=packed.device)


class PackedDora(DoraLinearVariant):
    """PEFT's DoRA for a base layer that may be packed. Merging is PEFT's own, once the base layer is unpacked."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Start the magnitudes from the rows' lengths, so that the fresh adapter changes nothing."""
        a = module.lora_A[adapter_name].weight
        lengths = _row_lengths(module, adapter_name)
        magnitudes: nn.Module = DoraLinearLayer(fan_in_fan_out=False)
        magnitudes.weight = nn.Parameter(lengths.to(a.device, a.dtype))
        module.lora_magnitude_vector[adapter_name] = magnitudes

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The tuned layer's output, from `result`, the base layer's."""
        base_layer = module.get_base_layer()
        dropout = module.lora_dropout[active_adapter]
        base = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base = base_layer(x)
        if base_layer.bias is not None:
            base = base - base_layer.bias
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        factor = module.lora_magnitude_vector[active_adapter].weight / _row_lengths(module, active_adapter)
        tuned: Tensor = result + (factor - 1) * base + factor * low
        return tuned


@torch.no_grad()
def _row_lengths(module: Any, adapter_name: str) -> Tensor:
    a, b = module.lora_A[adapter_name].weight.detach(), module.lora_B[adapter_name].weight.detach()
    scaling, base = module.scaling[adapter_name], module.get_base_layer()
    lengths: Tensor
    if isinstance(base, QuantizedLinear):
        lengths = tuned_row_lengths(base.weight, base.weight_scale, base.bits, a, b, scaling)
    else:
        lengths = torch.linalg.vector_norm(float_weight(base, torch.float32) + scaling * (b.float() @ a.float()), dim=1)
    return lengths
