"""Adapters on a model: read from a folder of any kind, written, switched off; PEFT's LoRA layer with leaner arithmetic.

An adapted model is a `PeftModel` around the transformers model, or the transformers model itself with a P-Tuning
prefix (ptuning.py). Which of the two it is matters here and in few other places.

PEFT casts the layer's input to the adapter's fp32, runs two thin products and adds in three more passes. Here the
adapter's weights stay fp32 parameters (what the optimiser updates and the checkpoint holds) and are cast to the
compute dtype instead: 16 × 640 numbers rather than a whole activation. Everything PEFT can do beyond plain LoRA
(DoRA, merged weights, several adapters) still goes through PEFT's own forward.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .dora import PackedDora
from .original import read_prefix
from .prefix_files import PREFIX_FILE, holds_prefix, load_original_prefix, load_prefix, save_prefix
from .ptuning import prefix_encoder_of, without_prefix
from .quantized import QuantizedLinear
from .sources import first_line


class LoraLinear(PeftLoraLinear):
    """A `peft` LoRA layer around `nn.Linear`: same parameters, same state dict, faster arithmetic.

    With W the frozen weight ``[out, in]``, A ``[r, in]``, B ``[out, r]``:
    ``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` (Hu et al. 2021, arXiv:2106.09685).

    Around packed weights (`QuantizedLinear`) it does LoRA and DoRA, and refuses what needs the float weight itself.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's kinds of LoRA by their settings; beside packed weights only those that are right there."""
        if isinstance(self.get_base_layer(), QuantizedLinear):
            return {(): None, ("use_dora",): PackedDora}
        variants: dict[tuple[str, ...], Any] = super().lora_variants
        return variants

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add the adapter `adapter_name`. Raises ModelError when it would start from a packed weight's numbers."""
        start = config.init_lora_weights
        packed = isinstance(self.get_base_layer(), QuantizedLinear)
        if packed and isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal"):
            raise ModelError(
                f"An adapter with init_lora_weights={start!r} starts from the float weights, and this model's are "
                f"packed. Open the model without quantisation, or use init_lora_weights=true."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the base weight, as PEFT does. Raises ModelError when the base weight is packed."""
        if isinstance(self.get_base_layer(), QuantizedLinear):
            raise ModelError(
                "An adapter cannot be merged into packed weights, whose steps are coarser than what it learnt. "
                "Unpack them first: weitiao.models.quantized.dequantize_model(model, torch.float16)."
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
        a = lora_a.weight.to(x.dtype)
        b = (lora_b.weight * self.scaling[name]).to(x.dtype)
        low = nn.functional.linear(self.lora_dropout[name](x), a)
        return torch.add(self.base_layer(x), nn.functional.linear(low, b))


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside `model`, or `model` itself; adapter layers and prefix stay in place."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def has_adapter(model: PreTrainedModel | PeftModel) -> bool:
    """Whether `model` computes with an adapter of any kind."""
    return isinstance(model, PeftModel) or prefix_encoder_of(model) is not None


@contextlib.contextmanager
def without_adapter(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within this `model` computes as the model that was tuned: PEFT's adapter is off, or else the prefix.

    A prefix under a PEFT adapter belongs to the model that was tuned and stays on.
    """
    with model.disable_adapter() if isinstance(model, PeftModel) else without_prefix(model):
        yield


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


def save_adapter(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Write the adapter of `model` into `folder`: in PEFT's format, or as `save_prefix` does."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        save_prefix(model, folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel | PeftModel:
    """`model` with the adapter in `folder` on it, frozen, for inference.

    The folder is PEFT's, of any version; a P-Tuning prefix that `save_adapter` wrote; or a P-Tuning checkpoint of the
    ChatGLM originals.

    Raises:
        ModelError: the folder holds no adapter, a damaged one, or one that does not fit the model.
    """
    if not (folder / "adapter_config.json").is_file():
        if not any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise ModelError(f"The folder {folder} holds no adapter: it has no adapter_config.json.")
        return load_original_prefix(model, folder)
    if holds_prefix(folder):
        return load_prefix(model, folder)
    if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
        from .old_adapters import load_old_adapter

        return load_old_adapter(model, folder)
    return _load_peft_adapter(model, folder)


def _load_peft_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    try:
        config = PeftConfig.from_pretrained(str(folder))
        use_lean_layers(config)
        with ignoring_peft_warnings():
            tuned = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=False)
            # Loaded once more, because only this tells which weights were lacking and which had no place.
            found = tuned.load_adapter(str(folder), "default", is_trainable=False)
    except Exception as error:  # noqa: BLE001 - a cut file or wrong shapes raise many types
        raise ModelError(f"The adapter in {folder} cannot be put on this model ({first_line(error)}).") from None
    lacking, strange = found.missing_keys, found.unexpected_keys
    if lacking or strange:
        what = "it has no weights" if lacking else "the model has no place"
        name, count = (lacking or strange)[0], len(lacking or strange)
        raise ModelError(
            f"The adapter in {folder} cannot be put on this model ({what} for {name}, and {count - 1} others like it)."
        )
    return tuned


def adapter_fingerprint(folder: Path) -> str:
    """SHA-256 of the weights of the adapter in `folder`, which `load_adapter` reads."""
    for name in ("adapter_model.safetensors", "adapter_model.bin", PREFIX_FILE):
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for name, tensor in sorted((read_prefix(folder) or {}).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
