"""PEFT's LoRA layer with leaner arithmetic, and right beside packed weights.

PEFT casts the layer's input to the adapter's fp32, runs two thin products and adds in three more passes. Here the
adapter's weights stay fp32 parameters (what the optimiser updates and the checkpoint holds) and are cast to the
compute dtype instead: 16 × 640 numbers rather than a whole activation; around a bare frozen layer the thin products
are added in place (`lora_products.py`). Everything PEFT can do beyond plain LoRA
(DoRA, merged weights, several adapters) still goes through PEFT's own forward.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn

from ..errors import ModelError
from .dora import PackedDora
from .lora_products import lora_linear, lora_output
from .packed_layers import is_packed


class LoraLinear(PeftLoraLinear):
    """A `peft` LoRA layer around `nn.Linear`: same parameters, same state dict, faster arithmetic.

    With W the frozen weight ``[out, in]``, A ``[r, in]``, B ``[out, r]``:
    ``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` (Hu et al. 2021, arXiv:2106.09685).

    Around packed weights of any kind (packed_layers.py) it does LoRA and DoRA, and refuses what needs the float weight
    itself.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's kinds of LoRA by their settings; beside packed weights only those that are right there."""
        if is_packed(self.get_base_layer()):
            return {(): None, ("use_dora",): PackedDora}
        variants: dict[tuple[str, ...], Any] = super().lora_variants
        return variants

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add the adapter `adapter_name`. Raises ModelError when it would start from a packed weight's numbers."""
        start = config.init_lora_weights
        packed = is_packed(self.get_base_layer())
        if packed and isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal"):
            raise ModelError(
                f"An adapter with init_lora_weights={start!r} starts from the float weights, and this model's are "
                f"packed. Open the model without quantisation, or use init_lora_weights=true."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the base weight, as PEFT does. Raises ModelError when the base weight is packed."""
        if is_packed(self.get_base_layer()):
            raise ModelError(
                "An adapter cannot be merged into packed weights, whose steps are coarser than what it learnt. "
                "Unpack them first: weitiao.models.packed_layers.unpack_model(model, torch.float16)."
            )
        super().merge(safe_merge, adapter_names)

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
            return super().forward(x, *args, **kwargs)
        name = adapters[0]
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        assert isinstance(lora_a, nn.Linear)
        assert isinstance(lora_b, nn.Linear)
        if self._is_bare(name, x):
            compute = lora_linear if torch.is_grad_enabled() else lora_output
            base = self.base_layer
            assert isinstance(base, nn.Linear)
            return compute(x, base.weight, base.bias, lora_a.weight, lora_b.weight, self.scaling[name])[0]
        a = lora_a.weight.to(x.dtype)
        b = (lora_b.weight * self.scaling[name]).to(x.dtype)
        low = nn.functional.linear(self.lora_dropout[name](x), a)
        return torch.add(self.base_layer(x), nn.functional.linear(low, b))

    def _is_bare(self, name: str, x: Tensor) -> bool:
        """Whether the layer is a frozen `nn.Linear` and nothing else: not packed, sharded, hooked, cast or dropped out.

        Only then its weight may be multiplied without calling it.
        """
        base, dropout = self.base_layer, self.lora_dropout[name]
        return (
            type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and base.weight.dtype == x.dtype
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and (isinstance(dropout, nn.Identity) or not dropout.training)
            and not torch.is_autocast_enabled(x.device.type)
        )


def use_lean_layers(config: PeftConfig) -> None:
    """Make PEFT build `LoraLinear` where `config` would have it build its own layer around `nn.Linear`."""
    if isinstance(config, LoraConfig):
        config._register_custom_module({nn.Linear: LoraLinear})


@contextlib.contextmanager
def ignoring_peft_warnings() -> Iterator[None]:
    """Within this, PEFT is silent about a renamed property and about lacking weights, which we check ourselves."""
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        yield
