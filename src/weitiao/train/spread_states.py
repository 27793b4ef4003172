"""What learns and is spread over processes, on the disk: each writes its part, and any number of processes reads all.

torch's distributed checkpoints, as safetensors: one file for each process, with the places of its parts in the whole
tensors. So nothing is ever whole in one process, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import RunError

_OPTIMISER = "optimiser/"
_PARTS = "parts"


def parts_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The spread tensors of `model` that learn and of its optimiser, by the names that they are written under.

    Empty where none are spread.
    """
    parts: dict[str, Tensor] = {
        name: one.detach() for name, one in model.named_parameters() if one.requires_grad and isinstance(one, DTensor)
    }
    names = {id(one): name for name, one in model.named_parameters()}
    for parameter, state in optimiser.state.items():
        for kind, value in state.items():
            if isinstance(value, DTensor):
                parts[f"{_OPTIMISER}{names[id(parameter)]}/{kind}"] = value
    return parts


def write_parts(folder: Path, parts: Mapping[str, Tensor]) -> None:
    """Write this process's part of each of `parts` into `folder`; called by all processes at once.

    Raises:
        RunError: one of them could not.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(parts), storage_writer=writer)
    except CheckpointException as error:
        raise RunError(f"The checkpoint cannot be written: {_told(error)}. What was saved before stands.") from None


def read_parts(folder: Path, parts: Mapping[str, Tensor]) -> None:
    """Fill `parts`, spread or whole, from the safetensors files in `folder`; called by all processes at once.

    Raises:
        RunError: they cannot be read.
    """
    try:
        load(dict(parts), storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise RunError(f"The checkpoint {folder} cannot be read: {_told(error)}.") from None


def _told(error: CheckpointException) -> str:
    rank, (why, _) = min(error.failures.items())
    return f"process {rank} says {type(why).__name__}: {str(why).partition(chr(10))[0]:.200}"


def without_parts(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of `optimiser` with the kinds of its spread tensors, under "parts", in the place of these."""
    state = optimiser.state_dict()
    kinds: dict[int, list[str]] = {}
    rest: dict[int, dict[str, Any]] = {}
    for number, own in state["state"].items():
        kinds[number] = [kind for kind, value in own.items() if isinstance(value, DTensor)]
        rest[number] = {kind: value for kind, value in own.items() if not isinstance(value, DTensor)}
    return {**state, "state": rest, _PARTS: kinds} if any(kinds.values()) else state


def load_spread(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put model and optimiser into the state saved in `folder`, by one process or by several, into one or several.

    Called by all processes at once, whether they have their weights spread or whole.

    Args:
        folder: the checkpoint.
        model: takes the weights that learn.
        optimiser: takes `state`, and what is in parts of it.
        state: what `without_parts` gave, or the whole state of an optimiser.
    """
    learnt = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    names = {id(one): name for name, one in model.named_parameters()}
    kinds: Mapping[int, list[str]] = state.pop(_PARTS, {})
    parameters = [one for group in optimiser.param_groups for one in group["params"]]
    wanted = dict(learnt)
    for number, parameter in enumerate(parameters):
        own = state["state"].get(number, {})
        for kind, value in own.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                own[kind] = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
        for kind in kinds.get(number, ()):
            own[kind] = torch.zeros_like(parameter)
            wanted[f"{_OPTIMISER}{names[id(parameter)]}/{kind}"] = own[kind]
    read_parts(folder, wanted)
    optimiser.load_state_dict(state)
