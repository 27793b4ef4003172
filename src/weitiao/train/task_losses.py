"""The loss told apart by task, so that a few hundred labels are not drowned unseen by long answers of another task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .batches import Batch

TaskSums = Mapping[str, tuple[float, int]]
"""For each task, the sum of its tokens' losses and how many tokens they are."""


def sum_by_task(batches: Sequence[Batch], token_losses: Sequence[Tensor], row_tasks: Sequence[str]) -> TaskSums:
    """The losses of one optimiser step by task.

    Args:
        batches: the step's passes.
        token_losses: for each pass, the losses of its learnt tokens.
        row_tasks: for each of the step's rows, the name of its task.
    """
    sums, counts = torch.zeros(len(row_tasks), dtype=torch.float64), torch.zeros(len(row_tasks), dtype=torch.long)
    for batch, losses in zip(batches, token_losses, strict=True):
        sums.index_add_(0, batch.owners, losses.double().cpu())
        counts += torch.bincount(batch.owners, minlength=len(row_tasks))
    found: dict[str, tuple[float, int]] = {}
    for task, total, count in zip(row_tasks, sums.tolist(), counts.tolist(), strict=True):
        before = found.get(task, (0.0, 0))
        found[task] = (before[0] + total, before[1] + count)
    return found


def add_sums(one: TaskSums, other: TaskSums) -> TaskSums:
    """Both together."""
    none = (0.0, 0)
    return {
        task: (one.get(task, none)[0] + other.get(task, none)[0], one.get(task, none)[1] + other.get(task, none)[1])
        for task in {**one, **other}
    }


def mean_by_task(sums: TaskSums) -> dict[str, float]:
    """The mean loss per token of each task, by name; empty where the rows were given no tasks."""
    return {task: total / max(1, count) for task, (total, count) in sorted(sums.items()) if task}
