"""Which rows a loss that went wrong came from: one that is no number, one that jumped, no step for a long time."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..recipe import Train
from ..render.base import Example
from .model import TrainedModel
from .step import step_batches

NameRow = Callable[[int], str]
"""Where an example came from, such as ``train.jsonl:37``, by its place among the examples."""

_HISTORY, _FEWEST = 100, 20
_MADS = 6.0
_LEAST_JUMP = 0.25
"""Smaller jumps, as a share of the median, are not told: where losses hardly scatter, six deviations are nothing."""

_SMALL_LOSS = 0.01
"""Below this a loss is learnt as well as can be, and how it scatters tells nothing."""

_MOST_NAMED = 10
_NUM_OTHERS = 4


class SpikeWatch:
    """Tells when a step's loss jumps out of what the steps before it had; once for a jump, however long it lasts.

    A jump is more than six median absolute deviations above the median of the logarithms of the last hundred losses,
    and more than a quarter above their median. Of logarithms, because losses lie skew above zero: where these scatter
    normally, a jump is told in every five thousandth step without one; with the losses themselves, in every hundredth.
    """

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=_HISTORY)
        self._inside = False

    def jumped_from(self, loss: float) -> float | None:
        """The median that `loss` jumped from; None when it did not, or was told as jumped already."""
        here = math.log(max(loss, 0.0) + _SMALL_LOSS)
        median, limit = math.inf, math.inf
        if len(self._logs) >= _FEWEST:
            median = statistics.median(self._logs)
            deviation = statistics.median(abs(one - median) for one in self._logs)
            limit = median + max(_MADS * deviation, math.log1p(_LEAST_JUMP))
        self._logs.append(here)
        began = here > limit and not self._inside
        self._inside = here > ((median + limit) / 2 if self._inside else limit)  # not in and out again at the limit
        return math.exp(median) - _SMALL_LOSS if began else None


def worst_rows(row_sums: Tensor, rows: Sequence[int], *, count: int = 3) -> list[tuple[int, float]]:
    """The `count` rows of a step with the highest mean loss per learnt token: place among the examples, that loss.

    `rows` are the places of the step's rows, `row_sums` their losses, as `sum_by_row` gives them.
    """
    means = (row_sums[0] / row_sums[1].clamp(min=1)).tolist()
    return sorted(zip(rows, means, strict=True), key=lambda pair: -pair[1])[:count]


def describe_spike(step: int, loss: float, median: float, worst: Iterable[tuple[int, float]], name: NameRow) -> str:
    """The line that tells of a jump of the loss."""
    told = ", ".join(f"{name(row)} ({own:.2f})" for row, own in worst)
    return (
        f"Step {step}: the loss jumped to {loss:.2f}; the median of the steps before is {median:.2f}. The highest rows "
        f"of this step: {told}. Training goes on."
    )


def explain_divergence(
    trained: TrainedModel,
    examples: Sequence[Example],
    rows: Sequence[int],
    settings: Train,
    name: NameRow,
) -> tuple[bool, str]:
    """Whether the rows of a step whose loss or gradient was no number are at fault, and what to say of that.

    The step was not taken, so the weights are those of the step before. With these each row is tried alone, and a few
    other rows beside them: where these have a finite loss, the weights are good, and the rows without one are at fault.

    Args:
        trained: the model, as it was before the step.
        examples: all training examples.
        rows: the places of the step's rows among them.
        settings: the recipe's `train` part.
        name: tells where an example came from.
    """
    step_rows = list(dict.fromkeys(rows))
    others = [row for row in range(len(examples)) if row not in set(step_rows)][:_NUM_OTHERS]
    bad = [row for row in step_rows if not math.isfinite(_loss_of(trained, examples[row], settings))]
    others_bad = [row for row in others if not math.isfinite(_loss_of(trained, examples[row], settings))]
    good_weights = len(bad) < len(step_rows) if not others else len(others_bad) < len(others)
    if bad and good_weights:
        whose = "this row" if len(bad) == 1 else f"these {len(bad)} rows"
        gives, them = ("gives", "it") if len(bad) == 1 else ("give", "them")
        return True, (
            f"The weights are good, since other rows have a finite loss; {whose} alone {gives} none: "
            f"{_named(bad, name)}. Mend {them} or leave {them} out, and start again with name=OTHER."
        )
    if bad:
        return False, (
            f"No row has a finite loss any more: the model has diverged, the rows are not at fault. The step's rows: "
            f"{_named(step_rows, name)}."
        )
    return False, (
        f"Each row of the step has a finite loss alone: the gradient is at fault, the model is diverging. The step's "
        f"rows: {_named(step_rows, name)}."
    )


def _named(rows: Sequence[int], name: NameRow) -> str:
    more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
    return ", ".join(name(row) for row in rows[:_MOST_NAMED]) + more


def _loss_of(trained: TrainedModel, example: Example, settings: Train) -> float:
    """The mean loss of one row, with dropout off."""
    even = settings.model_copy(update={"row_balance": 0.0, "task_weights": {}})
    trained.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            batches = step_batches([example], [""], even, trained.model.device, row_prefix=trained.row_prefix)
            return math.fsum(float(trained(batch)) for batch in batches)
    finally:
        trained.train()
