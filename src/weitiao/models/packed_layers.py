"""Linear layers with packed weights, whoever packed them: which they are, their float weights, the memory they hold.

    int8, int4                                   weitiao's own (quantized.py)
    bnb_int8                                     bitsandbytes: LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339)
    bnb_nf4, bnb_fp4, with _double behind them   bitsandbytes: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)
    torchao_int8                                 torchao: one scale for each row

All are `nn.Linear`, so that adapters find them. Neither library is imported here: a layer can only be one of theirs
once something else has.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .quantized import QuantizedLinear


def packing_of(layer: nn.Module) -> str | None:
    """How the weight of `layer` is packed, by the names of the recipe's `model.quantize`; None where it is not."""
    if isinstance(layer, QuantizedLinear):
        return f"int{layer.bits}"
    if not isinstance(layer, nn.Linear):
        return None
    bnb, torchao = sys.modules.get("bitsandbytes"), sys.modules.get("torchao")
    if bnb is not None and isinstance(layer, bnb.nn.Linear8bitLt):
        return "bnb_int8"
    if bnb is not None and isinstance(layer, bnb.nn.Linear4bit):
        weight: Any = layer.weight
        return f"bnb_{weight.quant_type}{'_double' if weight.compress_statistics else ''}"
    if torchao is not None and isinstance(layer.weight, torchao.utils.TorchAOBaseTensor):
        return "torchao_int8" if type(layer.weight).__name__ == "Int8Tensor" else f"torchao's {type(layer.weight)}"
    return None


def is_packed(layer: nn.Module) -> bool:
    """Whether `layer` is a linear layer whose weight is packed."""
    return packing_of(layer) is not None


def model_packing(model: nn.Module) -> str | None:
    """How the packed layers of `model` are packed: that of the first; None when there are none."""
    return next((found for module in model.modules() if (found := packing_of(module)) is not None), None)


def float_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` of `layer` in `dtype`: unpacked, without gradient; a plain weight's own numbers."""
    packing = packing_of(layer)
    weight: Any = layer.weight
    if isinstance(layer, QuantizedLinear):
        return layer.float_weight(dtype)
    if packing is None:
        return layer.weight.detach().to(dtype)
    if packing == "bnb_int8":
        steps: Tensor = weight.data.float() * (_int8_scale(layer) / 127)[:, None]
        return steps.to(dtype)
    if packing.startswith("bnb_"):
        state = copy.copy(weight.quant_state)
        state.dtype = dtype  # else the numbers are rounded to the dtype that they were packed from
        whole: Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state)
        return whole
    unpacked: Tensor = weight.detach().dequantize(torch.float32)
    return unpacked.to(dtype)


def _int8_scale(layer: Any) -> Tensor:
    """The scales ``[out]`` of a layer of LLM.int8, which the first forward pass moves."""
    scale: Tensor = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return scale


def plain_linear(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A frozen plain layer with the unpacked weight of `layer` in `dtype`; the bias is a copy in `dtype`."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(float_weight(layer, dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype).clone(), requires_grad=False)
    return linear.train(layer.training)


def unpack_model(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Put plain linear layers with the unpacked weights in `dtype` where packed ones stand, also under adapters.

    This is what merging an adapter starts from. The model computes the same as before, as far as `dtype` holds the
    products and packed layers do not round their inputs, as those of LLM.int8 do.

    Returns:
        The full names of the layers that were replaced.
    """
    names = [name for name, module in model.named_modules() if is_packed(module)]
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, plain_linear(layer, dtype))
    return names


def num_weights(model: nn.Module) -> int:
    """The parameters of `model`; tied ones count once, packed ones as the numbers that they stand for."""
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    return sum(parameter.numel() for parameter in parameters) + sum(
        module.in_features * module.out_features - module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and is_packed(module)
    )


def held_bytes(model: nn.Module) -> int:
    """The memory that the parameters and buffers of `model` hold: packed weights as they are, with their scales.

    A packed weight tells of another size: torchao's of the dtype it stands for, bitsandbytes' of its numbers alone.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    own = sum(_bytes_of(tensor) for tensor in tensors)
    return own + sum(_bytes_of(tensor) for module in model.modules() for tensor in _statistics(module))


def _bytes_of(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes_of(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _statistics(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that bitsandbytes keeps beside the packed weight of `module`, which no parameter or buffer holds."""
    packing = packing_of(module)
    if packing == "bnb_int8":
        yield _int8_scale(module)
    elif packing is not None and packing.startswith("bnb_"):
        layer: Any = module
        state = layer.weight.quant_state
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
