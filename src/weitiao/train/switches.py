"""The recipe's switches that save memory: what each needs, said before anything is written, and what is to be known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from ..data.order import share_passes
from ..errors import RunError
from ..recipe import Train
from .deepspeed_file import read_deepspeed
from .optimisers import require_optimiser
from .ranks import ALONE, Ranks
from .several_optimisers import SeveralOptimisers, UpdatesInBackward


def require_switches(settings: Train, ranks: Ranks = ALONE) -> None:
    """Raise RunError when a package is missing, or a switch or a DeepSpeed configuration does not go with the rest."""
    require_optimiser(settings)
    read_deepspeed(settings, ranks)
    if settings.update_in_backward and ranks.size > 1:
        raise RunError(
            f"train.update_in_backward updates a weight before the gradients of the {ranks.size} processes are summed. "
            f"Train by one process, or set train.update_in_backward=false."
        )


def updates_in_backward(
    optimiser: torch.optim.Optimizer, settings: Train, accelerator: Accelerator, ranks: Ranks
) -> UpdatesInBackward | None:
    """What updates the weights of `optimiser` in the backward pass, where the recipe wants that.

    Raises:
        RunError: several processes train together, or the loss is scaled.
    """
    if not settings.update_in_backward:
        return None
    require_switches(settings, ranks)
    if accelerator.scaler is not None:
        raise RunError(
            "train.update_in_backward does not go with float16, whose gradients are scaled and looked through before "
            "any weight is updated. Set model.dtype=bfloat16 or float32, or train.update_in_backward=false."
        )
    assert isinstance(optimiser, SeveralOptimisers)
    return UpdatesInBackward(optimiser)


def notes_on_switches(settings: Train, lengths: Sequence[int], device: torch.device) -> list[str]:
    """What is to be said of switches that bring nothing here; `lengths` are those of the train rows in tokens."""
    notes = []
    if device.type == "cpu":
        if settings.offload_activations:
            notes.append("train.offload_activations does nothing without a GPU: all is in the machine's memory.")
        if settings.optimiser.startswith("paged_"):
            notes.append(
                f"train.optimiser={settings.optimiser} moves nothing without a GPU: all is in the machine's memory, "
                f"and the weights become those of {settings.optimiser.removeprefix('paged_')}."
            )
    if settings.update_in_backward:
        longest = sorted(lengths, reverse=True)[: settings.batch_size]
        limit = settings.tokens_per_pass if settings.packing else 1
        if len(share_passes(longest, tokens_per_pass=limit)) > 1:
            cure = f"train.tokens_per_pass={sum(longest)} or a smaller train.batch_size"
            notes.append(
                "train.update_in_backward frees gradients in the last pass of a step only, and the longest rows make "
                f"several passes. With {cure if settings.packing else 'train.batch_size=1'} every step is one pass."
            )
    return notes
