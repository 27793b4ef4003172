"""What moves the weights that learn: the optimiser and the schedule of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, get_scheduler

from ..recipe import Train
from ..tuning.pace import pace_of


def make_optimiser(model: PreTrainedModel | PeftModel, settings: Train) -> torch.optim.Optimizer:
    """AdamW; each parameter at its pace: matrices decay as a rule, biases and norms do not (tuning/pace.py)."""
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            pace = pace_of(parameter)
            groups.setdefault((pace.decays, pace.multiple), []).append(parameter)
    settled: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "lr": settings.learning_rate * multiple,
        }
        for (decays, multiple), parameters in groups.items()
        if parameters
    ]
    return torch.optim.AdamW(settled, lr=settings.learning_rate)


def make_scheduler(
    optimiser: torch.optim.Optimizer, settings: Train, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's way over `steps` steps, warming up first."""
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = math.ceil(settings.warmup * steps)
    scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(name, optimiser, warmup, steps)
    return scheduler
