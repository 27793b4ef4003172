"""Which ways there are to pack a model's weights, what each needs, and packing a model by one of them.

Weights are packed as they are read where transformers reads them, so that the float model is never whole in memory; or
else in place, layer by layer. Either way what comes out is a model with packed layers (packed_layers.py) and nothing
else: what transformers attaches to a quantised model, and would refuse casts and training by, is taken off again.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from ..errors import ModelError
from .packed_layers import is_packed, model_packing, packing_of
from .quantized import quantize_model, replace_linears

Library = Literal["weitiao", "bitsandbytes", "torchao"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """One way to hold the matrices of a model's layers."""

    name: str
    """As the recipe's `model.quantize` says it."""
    library: Library
    bits: int
    four_bit_type: Literal["nf4", "fp4"] | None = None
    double: bool = False
    """Whether the scales are quantised too (QLoRA's double quantisation)."""

    @property
    def bytes_per_weight(self) -> float:
        """What a number of a large matrix takes, its share of the scales with it."""
        if self.four_bit_type is None:
            return self.bits / 8
        # a float32 scale for every 64 numbers; or a byte, and a float32 for every 256 of these
        return self.bits / 8 + (1 + 4 / 256 if self.double else 4) / 64


PACKINGS = {
    packing.name: packing
    for packing in (
        Packing(name="int8", library="weitiao", bits=8),
        Packing(name="int4", library="weitiao", bits=4),
        Packing(name="bnb_int8", library="bitsandbytes", bits=8),
        Packing(name="bnb_nf4", library="bitsandbytes", bits=4, four_bit_type="nf4"),
        Packing(name="bnb_nf4_double", library="bitsandbytes", bits=4, four_bit_type="nf4", double=True),
        Packing(name="bnb_fp4", library="bitsandbytes", bits=4, four_bit_type="fp4"),
        Packing(name="torchao_int8", library="torchao", bits=8),
    )
}
"""All of them, by their names; none is no packing."""

_INSTALL = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "gptq": "gptqmodel optimum",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "eetq": "kernels",
    "auto-round": "auto-round",
}
"""What pip installs to open checkpoints that were packed so, by the names that their config.json has."""


def packing_named(quantize: str) -> Packing | None:
    """The packing that a recipe's `model.quantize` names; None for ``none``. Raises ModelError for an unknown one."""
    if quantize == "none":
        return None
    if quantize not in PACKINGS:
        raise ModelError(f"model.quantize is {quantize!r}, which is unknown. Choose none, {', '.join(PACKINGS)}.")
    return PACKINGS[quantize]


def require_packing(packing: Packing, device: torch.device) -> None:
    """Raise ModelError where the library of `packing` is missing, or cannot compute on `device`."""
    if packing.library == "weitiao":
        return
    if importlib.util.find_spec(packing.library) is None:
        raise ModelError(
            f"model.quantize is {packing.name}, which needs the package {packing.library}. Install it with "
            f'pip install "weitiao[{packing.library}]", or set model.quantize: int{packing.bits}, which needs none.'
        )
    if packing.library == "bitsandbytes":
        supported: set[str] = importlib.import_module("bitsandbytes").supported_torch_devices
        if device.type not in supported:
            raise ModelError(
                f"model.quantize is {packing.name}, and bitsandbytes does not compute on the device {device.type!r}, "
                f"only on {', '.join(sorted(supported))}. Set model.quantize: int{packing.bits}, which runs wherever "
                f"torch does."
            )


def loading_config(packing: Packing, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    """What transformers is told, to pack weights as it reads them; the model computes in `dtype`."""
    if packing.library == "bitsandbytes" and packing.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if packing.library == "bitsandbytes":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=packing.four_bit_type,
            bnb_4bit_use_double_quant=packing.double,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(quant_type=Int8WeightOnlyConfig())


def pack_model(model: PreTrainedModel, packing: Packing) -> list[str]:
    """Pack the weights of the decoder's linear layers of `model` in place, one by one; their full names.

    Raises:
        ModelError: the layers cannot be told, are packed or adapted already, or a weight cannot be packed.
    """
    require_packing(packing, model.device)
    if packing.library == "weitiao":
        return quantize_model(model, packing.bits)
    if (already := model_packing(model)) is not None:
        raise ModelError(f"This {type(model).__name__} is quantised already ({already}).")
    pack = _torchao_layer if packing.library == "torchao" else _bitsandbytes_layer
    names = replace_linears(model, lambda linear: pack(linear, packing))
    adopt(model)
    return names


def _bitsandbytes_layer(linear: nn.Linear, packing: Packing) -> nn.Linear:
    layers = importlib.import_module("bitsandbytes.nn")
    weight, device = linear.weight.detach(), linear.weight.device
    size, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer: Any
    if packing.bits == 8:
        layer = layers.Linear8bitLt(*size, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = layers.Linear4bit(
            *size,
            bias=has_bias,
            compute_dtype=weight.dtype,
            compress_statistics=packing.double,
            quant_type=packing.four_bit_type,
            device="meta",
        )
        layer.weight = layers.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=packing.double,
            quant_type=packing.four_bit_type,
            module=layer,
        )
    layer.weight = layer.weight.to(device)  # which is what packs it
    layer.bias = linear.bias
    packed: nn.Linear = layer.train(linear.training)
    return packed


def _torchao_layer(linear: nn.Linear, packing: Packing) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear.requires_grad_(False)
    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def adopt(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself as a model of packed layers and no more; left as it is where they are not of kinds known here.

    bitsandbytes' second layout for four bits on a CPU is switched off. The first forward pass in evaluation mode would
    change to it for good: scales in bfloat16, double quantisation undone, and no gradient from then on, so that a
    model scored while it trains would learn no more. Prompts of 512 tokens take ten times as long in it.

    Raises:
        ModelError: bitsandbytes would compute something else than what is stored.
    """
    if model_packing(model) is None:
        return model
    _require_whole_blocks(model)
    for module in model.modules():
        if is_packed(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - to mypy a module has tensors alone
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        _forget_unpacking(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, name):
            delattr(model, name)
    return model


def _forget_unpacking(model: Any) -> None:
    """Take the steps of reading packed weights out of those that transformers would undo when it writes the model.

    They are kept in `_weight_conversions` of a model read from a packed checkpoint, and cannot be undone.
    """
    if (steps := getattr(model, "_weight_conversions", None)) is None:
        return
    model._weight_conversions = [
        step
        for step in steps
        if not any(".integrations." in type(done).__module__ for done in getattr(step, "operations", ()))
    ]


def _require_whole_blocks(model: PreTrainedModel) -> None:
    """Raise ModelError where rows of four bits do not end with a block, and are on a CPU.

    Seen in bitsandbytes 0.50.2: its kernel for CPUs then takes the scales of other blocks, and the weights that it
    unpacks are off by 20 to 40 % where NF4 is off by 9 %. Packing is right, and so is a GPU.
    """
    for name, module in model.named_modules():
        if not (packing_of(module) or "").startswith(("bnb_nf4", "bnb_fp4")):
            continue
        layer: Any = module
        block = layer.weight.quant_state.blocksize
        if layer.weight.device.type == "cpu" and layer.in_features % block:
            raise ModelError(
                f"bitsandbytes cannot compute with {name} in 4 bits on a CPU: its {layer.in_features} inputs are no "
                f"multiple of {block}, as its kernel takes for granted. Set model.quantize: int4 or bnb_int8, or use "
                f"a GPU."
            )


# --- Checkpoints that are stored packed ------------------------------------------------------------------------------


def stored_packing(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint with this config.json is stored: the name of a packing, else that of what packed it, or None."""
    told = config.get("quantization_config")
    if not told:
        return None
    method = str(told.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in told else "unknown"))
    if method == "bitsandbytes":
        if told.get("load_in_8bit"):
            return "bnb_int8"
        double = "_double" if told.get("bnb_4bit_use_double_quant") else ""
        return f"bnb_{told.get('bnb_4bit_quant_type', 'fp4')}{double}"
    if method == "torchao":
        kind = str(told.get("quant_type", ""))
        return "torchao_int8" if "Int8WeightOnly" in kind or "int8_weight_only" in kind else method
    return method


def require_stored(folder: Path, config: Mapping[str, Any], device: torch.device) -> None:
    """Raise ModelError where the checkpoint in `folder` is stored packed by a library that is missing here.

    What else a library wants of the machine it says itself when the checkpoint is opened.
    """
    stored = stored_packing(config)
    if stored is None:
        return
    packing = PACKINGS.get(stored)
    method = packing.library if packing else "bitsandbytes" if stored.startswith("bnb_") else stored
    wanted = _INSTALL.get(method)
    if wanted is None:
        return
    missing = [name for name in wanted.split() if importlib.util.find_spec(name.replace("-", "_")) is None]
    if method == "quanto":
        missing = [] if importlib.util.find_spec("optimum") else missing
    if missing:
        raise ModelError(
            f"The model in {folder} is stored quantised ({method}), which needs {' and '.join(missing)} to be opened. "
            f"Install with pip install {' '.join(missing)}, or take the model that is not quantised."
        )
    if packing is not None:
        require_packing(packing, device)
