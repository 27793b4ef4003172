"""A model's own weights as what is tuned: all of them, or some; kept apart from the base model like any adapter.

While they learn they are float32 parameters, whatever the model computes in: the steps of an optimiser are smaller than
what bfloat16 can add to a weight. Their modules compute with a copy in the model's own dtype, made in every pass; so
neither the loop, nor the optimiser, nor checkpoints know of it. What is saved is that copy, half the size: it is what
was scored, and what use computes with. It is a folder of two files, and the base model is needed as for any adapter:

    adapter_config.json            `peft_type` CHANGED_WEIGHTS, which PEFT refuses by this name
    changed_weights.safetensors    the parameters by the names that they have in the opened model
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ..errors import ModelError
from .packed_layers import is_packed
from .shards import read_tensors
from .sources import adapter_type

WEIGHTS_FILE = "changed_weights.safetensors"
_CONFIG_FILE = "adapter_config.json"
_PEFT_TYPE = "CHANGED_WEIGHTS"
_ATTRIBUTE = "changed_weights"


@dataclass(kw_only=True, slots=True)
class ChangedWeights:
    """Which of a model's own parameters are not those of its base model."""

    names: tuple[str, ...]
    others: dict[str, Tensor] | None = field(default=None, repr=False)
    """The base model's values of them, on the CPU or the device; while it is switched off, the tuned ones. None while
    they learn: nothing asks for them then, and they would take as much memory as the weights."""
    on: bool = True


class _InDtype(nn.Module):
    """A parameter as its module computes with it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` in the dtype of the model; gradients come back in float32."""
        return weight.to(self.dtype)


def changed_weights_of(model: PreTrainedModel | PeftModel) -> ChangedWeights | None:
    """What is known of the changed weights of `model`; None where its weights are those of its base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = getattr(base, _ATTRIBUTE, None)
    return found if isinstance(found, ChangedWeights) else None


def computing_dtype(model: PreTrainedModel | PeftModel) -> torch.dtype:
    """The dtype of the activations of `model`, which is not that of its parameters where these learn."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def learn_weights(model: PreTrainedModel, names: Sequence[str]) -> PreTrainedModel:
    """`model` itself, its parameters `names` trainable and in float32, all others frozen.

    Raises:
        ModelError: one of them is packed in 4 or 8 bits.
    """
    model.requires_grad_(False)
    own = dict(model.named_parameters())
    packed = [name for name in names if _is_packed_weight(model, name)]
    if packed:
        raise ModelError(
            f"{len(packed)} of the weights that are to learn are packed in 4 or 8 bits ({packed[0]} …), which cannot "
            f"learn. Set model.quantize: none, or tune by LoRA."
        )
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # tied weights have several
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, kind))
    for name in names:
        parameter = own[name]
        if parameter.dtype == torch.float32:
            parameter.requires_grad_(True)
            continue
        dtype = parameter.dtype
        master = nn.Parameter(parameter.detach().float())
        for module, kind in places[id(parameter)]:
            setattr(module, kind, master)
            parametrize.register_parametrization(module, kind, _InDtype(dtype), unsafe=True)  # another dtype comes out
    setattr(model, _ATTRIBUTE, ChangedWeights(names=tuple(names)))
    return model


def _is_packed_weight(model: PreTrainedModel, name: str) -> bool:
    module, _, kind = name.rpartition(".")
    return kind == "weight" and is_packed(model.get_submodule(module))


@contextmanager
def casting_once() -> Iterator[None]:
    """Within this, learning weights are cast to the model's dtype once and not in every pass; they must not change."""
    with parametrize.cached():
        yield


def save_weights(model: PreTrainedModel, folder: Path, whole: Mapping[str, Tensor] | None = None) -> None:
    """Write the changed weights of `model` into `folder`, which exists, in the dtype that the model computes in.

    `whole` are their values, where the model has them spread over processes.
    """
    changed = changed_weights_of(model)
    if changed is None or not changed.on:
        raise ModelError("The model's weights are those of its base model, so there are none to be written.")
    values = whole or {name: _current(model, name).detach() for name in changed.names}
    tensors = {name: values[name].cpu().contiguous() for name in changed.names}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": _PEFT_TYPE,
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": str(computing_dtype(model)).removeprefix("torch."),
    }
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _current(model: PreTrainedModel, name: str) -> Tensor:
    """The parameter `name` as its module computes with it."""
    module, _, kind = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), kind)
    return found


def holds_weights(folder: Path) -> bool:
    """Whether `folder` is an adapter that `save_weights` wrote. Raises ModelError when its configuration is broken."""
    return adapter_type(folder) == _PEFT_TYPE


def load_weights(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` itself with the changed weights in `folder`, frozen; those of its base model are kept for comparison.

    Raises:
        ModelError: the file is missing or damaged, or holds weights that the model has not.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ModelError(f"The adapter in {folder} is incomplete: {WEIGHTS_FILE} is missing. Copy it there.")
    tensors = read_tensors(file)
    own = dict(model.named_parameters())
    strange = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    packed = [name for name in tensors if name in own and _is_packed_weight(model, name)]
    if strange or packed:
        what = "are packed in the model" if packed else "have no place in the model"
        raise ModelError(
            f"The adapter in {folder} cannot be put on this model: {len(packed or strange)} of its {len(tensors)} "
            f"weights {what} ({(packed or strange)[0]} …). Open the model that it was tuned on, as it was opened then."
        )
    model.requires_grad_(False)
    others = {}
    for name, tensor in tensors.items():
        parameter = own[name]
        others[name] = parameter.data
        parameter.data = tensor.to(parameter.device, parameter.dtype)
    setattr(model, _ATTRIBUTE, ChangedWeights(names=tuple(tensors), others=others))
    return model


def take_weights_off(model: PreTrainedModel) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
    """Make `model`, just after `load_weights`, its base model again.

    Returns:
        Of each parameter that was changed: itself, the base model's values and the tuned ones.
    """
    changed = changed_weights_of(model)
    assert changed is not None and changed.others is not None and changed.on, "the weights were loaded for use"
    tuned = {name: parameter.data for name, parameter in model.named_parameters() if name in changed.others}
    _swap(model, changed, on=False)
    delattr(model, _ATTRIBUTE)
    own = dict(model.named_parameters())
    return [(own[name], own[name].data, values) for name, values in tuned.items()]


@contextmanager
def with_base_weights(model: PreTrainedModel) -> Iterator[None]:
    """Within this `model` computes with the weights of its base model.

    Raises:
        ModelError: the weights are learning, and those of the base model were not kept.
    """
    changed = changed_weights_of(model)
    if changed is None or not changed.on:
        yield
        return
    if changed.others is None:
        raise ModelError(
            "The base model's own weights are not kept while they learn. Open the finished run, which has both."
        )
    try:
        _swap(model, changed, on=False)
        yield
    finally:
        _swap(model, changed, on=True)


def _swap(model: PreTrainedModel, changed: ChangedWeights, *, on: bool) -> None:
    assert changed.others is not None
    own = dict(model.named_parameters())
    for name, other in changed.others.items():
        parameter = own[name]
        changed.others[name], parameter.data = parameter.data, other.to(parameter.device)
    changed.on = on
