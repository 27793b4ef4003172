"""Which figure of a scoring chooses the best checkpoint, tried before there is a model to score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import get_args

from ..data.records import Record
from ..errors import RecipeError
from ..tasks.base import LOWER_IS_BETTER, Task
from ..tasks.forms import AnswerForm, Shape
from .prediction import Prediction
from .score import TaskScore, overall, score_side
from .user_metrics import UserMetric, measure_rows

OVERALL = "overall"


def choose_figure(scores: Sequence[TaskScore], best_by: str = OVERALL) -> float:
    """The figure that `best_by` names, turned so that higher is better.

    Args:
        scores: of the tasks; those without rows have no figures.
        best_by: ``overall`` for the mean of the primary metrics, or ``TASK.METRIC`` such as ``triples.f1_relaxed``;
            user metrics are named like the others. A minus before it, ``-chat.repetition``, turns a metric of which
            less is better: the figure is then its negative.

    Raises:
        RecipeError: there is no such figure, or the sign would choose the worst checkpoint; names what there is.
    """
    name = best_by.removeprefix("-")
    turned = name != best_by
    if name == OVERALL:
        if turned:
            raise RecipeError(f"evaluate.best_by is {best_by!r}, which would choose the worst step. Write {OVERALL}.")
        return overall(scores)
    figures = {f"{score.task}.{metric}": (metric, value) for score in scores for metric, value in score.metrics.items()}
    if name not in figures:
        known = ", ".join([OVERALL, *(_signed(full, metric) for full, (metric, _) in figures.items())])
        raise RecipeError(
            f"evaluate.best_by is {best_by!r}, but the rows scored while training have no such figure. Known: {known}."
        )
    metric, value = figures[name]
    lower = metric in LOWER_IS_BETTER
    if lower != turned and metric in _built_in():  # of a user's own metric either may be better
        better = "less" if lower else "more"
        raise RecipeError(
            f"evaluate.best_by is {best_by!r}, but {better} of {metric} is better, so the worst step would be chosen. "
            f"Write {_signed(name, metric)}."
        )
    return -value if turned else value


def rehearse(
    records: Sequence[Record],
    assigned: Sequence[Task],
    tasks: Sequence[Task],
    *,
    best_by: str = OVERALL,
    metrics: Sequence[UserMetric] = (),
) -> None:
    """Score the labels as if they were answers, so that a mistake shows before training and not after its first epoch.

    Args:
        records: the labelled rows that are scored while training.
        assigned: for each record, its task.
        tasks: all tasks.
        best_by: the figure that is to choose the best checkpoint.
        metrics: the user's own.

    Raises:
        RecipeError: `best_by` names no figure of these rows, or a metric of the user's fails on one of them.
    """
    if best_by == OVERALL and not metrics:
        return
    labels = [
        Prediction(source=record.source, task=task.name, prompt=record.prompt, gold=gold, answer=gold)
        for record, task in zip(records, assigned, strict=True)
        for gold in [task.write_target(record)]
    ]
    extra = measure_rows(metrics, labels, tasks, [record.raw for record in records]) if metrics else ()
    choose_figure(score_side(labels, tasks, resamples=0, extra=extra).scores, best_by)


def _signed(name: str, metric: str) -> str:
    return f"-{name}" if metric in LOWER_IS_BETTER else name


@cache
def _built_in() -> frozenset[str]:
    """The metrics that any task may have."""
    tasks = [Task(name=shape, form=AnswerForm(shape=shape)) for shape in get_args(Shape)]
    return frozenset(name for task in tasks for name in (*task.metric_names, *task.set_figures([])))
