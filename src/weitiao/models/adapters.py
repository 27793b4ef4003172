"""Adapters on a model: reading them from a PEFT folder, and PEFT's LoRA layer with leaner arithmetic.

PEFT casts the layer's input to the adapter's fp32, runs two thin products and adds in three more passes. Here the
adapter's weights stay fp32 parameters (what the optimiser updates and the checkpoint holds) and are cast to the
compute dtype instead: 16 × 640 numbers rather than a whole activation. Everything PEFT can do beyond plain LoRA
(DoRA, merged weights, several adapters) still goes through PEFT's own forward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError


class LoraLinear(PeftLoraLinear):
    """A `peft` LoRA layer around `nn.Linear`: same parameters, same state dict, faster arithmetic.

    With W the frozen weight ``[out, in]``, A ``[r, in]``, B ``[out, r]``:
    ``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` (Hu et al. 2021, arXiv:2106.09685).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``[..., out]`` in the dtype of `x`."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        plain = (
            not args
            and not kwargs
            and not self.disable_adapters
            and not self.merged
            and len(adapters) == 1
            and adapters[0] not in self.lora_variant
            and not self.lora_bias[adapters[0]]
            and isinstance(self.base_layer, nn.Linear)
        )
        if not plain:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        name = adapters[0]
        a = self.lora_A[name].weight.to(x.dtype)
        b = (self.lora_B[name].weight * self.scaling[name]).to(x.dtype)
        y = self.base_layer(x)
        low = nn.functional.linear(self.lora_dropout[name](x), a)
        return torch.add(y, nn.functional.linear(low, b))


def use_lean_layers(config: PeftConfig) -> None:
    """Make PEFT build `LoraLinear` where `config` would have it build its own layer around `nn.Linear`."""
    if isinstance(config, LoraConfig):
        config._register_custom_module({nn.Linear: LoraLinear})


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the PEFT adapter in `folder` on it, frozen, for inference.

    Raises:
        ModelError: the folder holds no adapter, or one that does not fit the model.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"The folder {folder} holds no adapter: it has no adapter_config.json.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        use_lean_layers(config)
        return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=False)
    except Exception as error:  # a cut file or wrong shapes raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"The adapter in {folder} cannot be put on this model ({reason}).") from None
