"""What the layers computed and the backward pass needs: computed once more instead of kept, or kept elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from ..recipe import Train

_LEAST_BYTES = 1 << 16
"""Smaller tensors stay where they are: starting a copy costs more than they take."""


def checkpoint_layers(model: PreTrainedModel, settings: Train) -> None:
    """Have the decoder layers of `model` compute once more in the backward pass, as far as the recipe says.

    Kept is what goes into such a layer. ``selective`` has every second one do so.
    """
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(every_n_layers=2 if settings.gradient_checkpointing == "selective" else 1)
        # which has the embeddings ask for a gradient, as reentrant checkpoints need: it would be computed down to them
        # where only the last layers learn
        model.disable_input_require_grads()


class Offloading(saved_tensors_hooks):
    """Within this, what a forward pass on a GPU keeps for the backward pass lies in the machine's memory until then.

    Weights stay where they are, which `torch.autograd.graph.save_on_cpu` would copy in every pass.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """
        Args:
            model: whose weights and buffers stay.
            device: what is on it is moved.
        """
        super().__init__(self._pack, self._unpack)
        self.device = device
        self.num_moved = 0
        kept = [*model.parameters(), *model.buffers()]
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in kept}

    def _pack(self, tensor: Tensor) -> Any:
        stays = (
            tensor.device.type != self.device.type
            or tensor.nbytes < _LEAST_BYTES
            or tensor.layout != torch.strided
            or tensor.untyped_storage().data_ptr() in self._weights
        )
        if stays:
            return tensor
        self.num_moved += 1
        pinned = self.device.type == "cuda"  # only then is the way back asynchronous
        there = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        there.copy_(tensor)
        return (tensor.device, there)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, there = packed
        moved: Tensor = there.to(device, non_blocking=True)
        return moved
