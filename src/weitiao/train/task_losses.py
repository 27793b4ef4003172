"""The loss told apart by task, so that a few hundred labels are not drowned unseen by long answers of another task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .batches import Batch
from .ranks import ALONE, Ranks

TaskSums = Mapping[str, tuple[float, int]]
"""For each task, the sum of its tokens' losses and how many tokens they are."""


def sum_by_row(batches: Sequence[Batch], token_losses: Sequence[Tensor], num_rows: int, ranks: Ranks = ALONE) -> Tensor:
    """For each of a step's rows the sum of its tokens' losses and how many they are, ``[2, num_rows]`` float64.

    Args:
        batches: the passes that this process computed.
        token_losses: for each of them, the losses of its learnt tokens.
        num_rows: how many rows the step has.
        ranks: the processes that computed the step together; each is given all rows.
    """
    sums = torch.zeros(2, num_rows, dtype=torch.float64)
    for batch, losses in zip(batches, token_losses, strict=True):
        sums[0].index_add_(0, batch.owners, losses.double().cpu())
        sums[1] += torch.bincount(batch.owners, minlength=num_rows)
    return ranks.add(sums)


def sum_by_task(row_sums: Tensor, row_tasks: Sequence[str]) -> TaskSums:
    """The losses of one optimiser step by task.

    Args:
        row_sums: as `sum_by_row` gives them.
        row_tasks: for each of the step's rows, the name of its task.
    """
    found: dict[str, tuple[float, int]] = {}
    for task, total, count in zip(row_tasks, *row_sums.tolist(), strict=True):
        before = found.get(task, (0.0, 0))
        found[task] = (before[0] + total, before[1] + int(count))
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
