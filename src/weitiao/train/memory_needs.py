"""What a training needs in memory, by arithmetic: before a model has taken a pass, and for what passes do not tell."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..models.own_weights import changed_weights_of
from ..models.packed_layers import held_bytes
from ..recipe import Train

_PROGRAM_BYTES = 600 << 20
"""Python with torch and transformers 0.35 GB, a tokenizer of 262,144 words 0.25 GB."""

HEAD_BYTES = 160 << 20
"""The loss's buffers: 128 MB of logits in flight and the softmax of a part of them."""

_KERNEL_BYTES, _KERNEL_STEPS = 750 << 20, 60
"""On a CPU a kernel is made and kept for every new shape: 2.7 GB after three steps of Gemma 3 270M, the one with the
largest pass among them, were 3.5 GB after 60."""

_LEAST_IN_8_BITS = 4096
"""bitsandbytes keeps the states of smaller parameters in float32."""


def later_bytes(device: torch.device, *, steps: int) -> int:
    """Memory that a run of so many `steps` takes beyond its first ones: on a CPU, the kernels kept for every shape.

    Compiling adds none: with the compiler and its processes, 8 steps took 3.0 GB where they take 3.1 GB without it.
    """
    return round(_KERNEL_BYTES * min(1.0, steps / _KERNEL_STEPS)) if device.type == "cpu" else 0


def state_bytes(model: PreTrainedModel, settings: Train) -> int:
    """What the recipe's optimiser keeps of the parameters of `model` that learn, from the first step on."""
    tables = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    in_tables = {id(p) for module in model.modules() if id(module) in tables for p in module.parameters()}
    total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            total += _state_of(parameter, settings.optimiser, in_table=id(parameter) in in_tables)
    return round(total)


def _state_of(parameter: torch.nn.Parameter, optimiser: str, *, in_table: bool) -> float:
    count = parameter.numel()
    if optimiser.endswith("_8bit") and count >= _LEAST_IN_8_BITS:
        return 2 * count * (1 + 4 / 256)  # two bytes, and a scale for every 256 of each
    if optimiser == "adafactor" and parameter.ndim >= 2:
        rows, columns = parameter.shape[-2:]
        return 4 * count * (1 / rows + 1 / columns)
    one_moment = optimiser == "adafactor" or (optimiser == "muon" and parameter.ndim == 2 and not in_table)
    return (4 if one_moment else 8) * count


def gradient_bytes(model: PreTrainedModel, settings: Train) -> int:
    """The gradients of what learns that exist at a time."""
    sizes = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    return max(sizes, default=0) if settings.update_in_backward else sum(sizes)


def needed_bytes(model: PreTrainedModel, settings: Train, *, tokens: int) -> int:
    """What the process takes in its first steps, the largest pass being of so many `tokens`, by arithmetic alone.

    Weights, gradients and optimiser of what learns, what a pass keeps for its way back, the head's buffers, and on a
    CPU the program itself.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    item = head.element_size()
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    per_layer = (24 * hidden + 6 * getattr(config, "intermediate_size", 4 * hidden)) * item
    whole = {False: layers, "selective": 1 + layers // 2, True: 2}[settings.gradient_checkpointing]
    inputs = {False: 0, "selective": -(-layers // 2), True: layers}[settings.gradient_checkpointing] * hidden * item
    copies = 0
    if changed_weights_of(model) is not None:  # cast for every pass; the head's gradient is summed in float32 beside
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        copies = (item * trainable if item < 4 else 0) + (2 * 4 * head.numel() if head.requires_grad else 0)
    program = _PROGRAM_BYTES if model.device.type == "cpu" else 0
    learning = gradient_bytes(model, settings) + state_bytes(model, settings)
    total: int = held_bytes(model) + learning + copies + tokens * (whole * per_layer + inputs) + HEAD_BYTES + program
    return total
