"""From predictions to figures: scores of every row, then of every task, with bootstrap intervals.

Knows predictions and tasks; knows nothing of models, tokens or pages. What one answer is worth is the task's own
business (`tasks/`); this module only adds up, resamples and groups.

    >>> from weitiao.tasks.forms import AnswerForm
    >>> task = Task(name="topics", form=AnswerForm(shape="label", labels=("手机", "水果")))
    >>> rows = [Prediction(source=f"dev.jsonl:{n}", task="topics", prompt="…", gold="水果", answer=answer)
    ...         for n, answer in enumerate(["水果", "手机", "不知道"], start=1)]
    >>> score = score_predictions(rows, [task])[0]
    >>> round(score.metrics["accuracy"], 3), score.refusals
    (0.333, {'"…" is not one of the 2 labels.': 1})
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, FormError, Problem
from ..tasks import extraction, labels, text
from ..tasks.base import Counts, RowScore, Task, add_counts
from ..tasks.forms import Answer
from .prediction import FieldConfidence, Finish, Prediction, read_predictions, write_predictions

__all__ = [
    "FieldConfidence", "Finish", "PartScore", "Prediction", "Side", "TaskScore", "draws", "group_reasons", "overall",
    "read_predictions", "resampled_counts", "row_scores", "row_value", "score_predictions", "score_side",
    "write_predictions",
]  # fmt: skip

CHUNK_CELLS = 5_000_000
"""Bootstrap draws are made for at most this many rows × resamples at a time (40 MB)."""

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_PLACE = re.compile(r"\b(Item|character) \d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartScore:
    """The score of one predicate, key or label."""

    name: str
    support: int
    """How often the labels hold it."""
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """The figures of one task over one set of predictions. All shares and metrics are 0–1."""

    task: str
    kind: str
    rows: int
    primary: str
    """Name of the metric that stands for the task where one number is needed."""
    metrics: Mapping[str, float]
    """Metric by name, the primary first; empty when there are no rows."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap interval of each metric; empty when not asked for."""
    breakdown: tuple[PartScore, ...] = ()
    """Per predicate, key or label, most frequent first."""
    confusion: Mapping[str, Mapping[str, int]] | None = None
    """``{gold: {given: rows}}`` for label tasks."""
    cut: int = 0
    """Answers that hit the length limit."""
    refused: int = 0
    """Answers that the engine refused to give."""
    refusals: Mapping[str, int]
    """Why answers did not have the labelled form, most frequent reason first."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal."""
        data = asdict(self)
        data["intervals"] = {name: list(bounds) for name, bounds in self.intervals.items()}
        data["breakdown"] = [asdict(part) for part in self.breakdown]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskScore:
        """The score that `to_json` wrote."""
        values = dict(data)
        values["intervals"] = {name: (low, high) for name, (low, high) in values["intervals"].items()}
        values["breakdown"] = tuple(PartScore(**part) for part in values["breakdown"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One model's predictions with their scores: `rows[i]` is the score of `predictions[i]`."""

    predictions: tuple[Prediction, ...]
    rows: tuple[RowScore, ...]
    scores: tuple[TaskScore, ...]
    extra: tuple[Mapping[str, float], ...] = ()
    """For each prediction, what the user's own metrics say of it; empty when there are none."""


# ---- scoring --------------------------------------------------------------------------------------------------


def score_predictions(
    predictions: Sequence[Prediction], tasks: Sequence[Task], *, seed: int = 0, resamples: int = 1000
) -> tuple[TaskScore, ...]:
    """One score per task, in the order of `tasks`, a task without rows included.

    Args:
        seed: of the bootstrap. The same rows are drawn for every set of predictions of the same length.
        resamples: bootstrap resamples; 0 leaves the intervals out.

    Raises:
        DataError: names every prediction whose task is unknown or whose gold answer does not fit its form.
    """
    return score_side(predictions, tasks, seed=seed, resamples=resamples).scores


def score_side(
    predictions: Sequence[Prediction],
    tasks: Sequence[Task],
    *,
    seed: int = 0,
    resamples: int = 1000,
    extra: Sequence[Mapping[str, float]] = (),
) -> Side:
    """`predictions` with the scores of every row and every task: what a report is made from.

    Args:
        predictions: the answers of one model.
        tasks: the tasks they belong to.
        seed: of the bootstrap.
        resamples: bootstrap resamples; 0 leaves the intervals out.
        extra: for each prediction the figures of further metrics, such as ``{"polite": 1.0}``; the mean over the rows
            of a task that have it becomes a metric of the task, with an interval like the others.

    Raises:
        DataError: as `score_predictions`; also when `extra` has another length or takes the name of a metric.
    """
    if extra and len(extra) != len(predictions):
        raise DataError(f"There are {len(predictions)} predictions but further metrics of {len(extra)}. Give one each.")
    rows = row_scores(predictions, tasks)
    scores = []
    for task in tasks:
        places = [place for place, prediction in enumerate(predictions) if prediction.task == task.name]
        score = _task_score(task, [rows[place] for place in places], seed=seed, resamples=resamples)
        finishes = Counter(predictions[place].finish for place in places)
        given = [predictions[place].answer for place in places if predictions[place].finish != "refused"]
        figures = task.set_figures(given) if given else {}
        score = replace(
            score, metrics={**score.metrics, **figures}, cut=finishes["length"], refused=finishes["refused"]
        )
        own = [extra[place] for place in places] if extra else []
        scores.append(_with_extra(score, own, seed=seed, resamples=resamples))
    return Side(predictions=tuple(predictions), rows=rows, scores=tuple(scores), extra=tuple(extra))


def row_scores(predictions: Sequence[Prediction], tasks: Sequence[Task]) -> tuple[RowScore, ...]:
    """The score of each prediction. Raises DataError naming every one that cannot be scored."""
    by_name = {task.name: task for task in tasks}
    rows: list[RowScore] = []
    problems: list[Problem] = []
    for prediction in predictions:
        task = by_name.get(prediction.task)
        if task is None:
            message = f"There is no task {prediction.task!r}."
            fix = f"Score it with the tasks it was predicted with; these are {', '.join(by_name) or 'none'}."
            problems.append(Problem(source=prediction.source, field="task", message=message, fix=fix))
            continue
        try:
            gold = task.form.read_target(prediction.gold)
        except FormError as error:
            fix = f"Correct the label to be {task.form.describe()}."
            problems.append(Problem(source=prediction.source, field="gold", message=f"{error}", fix=fix))
            continue
        refused = prediction.finish == "refused"
        rows.append(_refused(task, gold, prediction.refusal) if refused else task.score(gold, prediction.answer))
    if problems:
        raise DataError(f"{len(problems)} of {len(predictions)} predictions cannot be scored.", problems)
    return tuple(rows)


def _refused(task: Task, gold: Answer, why: str) -> RowScore:
    """The score of an answer that the engine refused to give: not in the form and worth nothing."""
    scorer = {"extraction": extraction, "labels": labels, "text": text}[task.kind]
    counts = {"rows": 1.0, "valid": 0.0, "exact": 0.0, **scorer.count(task.form, gold, None)}
    return RowScore(valid=False, reason=why or "The engine gave no answer.", exact=False, counts=counts)


def row_value(task: Task, row: RowScore) -> float:
    """How good one answer is (0–1): the primary metric of this row alone, 1 when exact, 0 when refused.

    An exact answer is worth 1 even where the metric is undefined: no facts labelled, none given.
    """
    if row.exact or not row.valid:
        return float(row.exact)
    return task.summarise(row.counts)[task.primary_metric]


def overall(scores: Sequence[TaskScore]) -> float:
    """The unweighted mean of the primary metrics of all tasks that have rows: what chooses the best checkpoint."""
    primaries = [score.metrics[score.primary] for score in scores if score.rows]
    return sum(primaries) / len(primaries) if primaries else 0.0


def _task_score(task: Task, rows: Sequence[RowScore], *, seed: int, resamples: int) -> TaskScore:
    total = add_counts([row.counts for row in rows])
    parts = [PartScore(**part) for part in task.breakdown(total)]
    return TaskScore(
        task=task.name,
        kind=task.kind,
        rows=len(rows),
        primary=task.primary_metric,
        metrics=task.summarise(total),
        intervals=_intervals(task, rows, seed=seed, resamples=resamples) if rows and resamples else {},
        breakdown=tuple(sorted(parts, key=lambda part: (-part.support, part.name))),
        confusion=_sorted_table(labels.confusion(total)) if task.kind == "labels" else None,
        refusals=group_reasons([row.reason for row in rows if not row.valid]),
    )


def _with_extra(score: TaskScore, rows: Sequence[Mapping[str, float]], *, seed: int, resamples: int) -> TaskScore:
    """`score` with the means of further metrics, each over the rows that have it, and their intervals."""
    names = sorted({name for row in rows for name in row})
    taken = [name for name in names if name in score.metrics]
    if taken:
        raise DataError(f"{score.task} has a metric {', '.join(taken)} already. Give yours another name.")
    if not names:
        return score
    table = np.array([[row.get(name, math.nan) for name in names] for row in rows], dtype=float)
    present = ~np.isnan(table)
    table = np.where(present, table, 0.0)
    means = dict(zip(names, (table.sum(axis=0) / present.sum(axis=0)).tolist(), strict=True))
    bounds: dict[str, tuple[float, float]] = {}
    if resamples:
        drawn = np.concatenate(list(draws(len(rows), seed=seed, resamples=resamples)))
        sums, counts = drawn @ table, drawn @ present.astype(float)
        for name, total, count in zip(names, sums.T, counts.T, strict=True):
            low, high = np.percentile(total[count > 0] / count[count > 0], [2.5, 97.5])
            bounds[name] = float(low), float(high)
    return replace(score, metrics={**score.metrics, **means}, intervals={**score.intervals, **bounds})


def _sorted_table(table: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    return {gold: dict(sorted(given.items())) for gold, given in sorted(table.items())}


def group_reasons(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason occurs, most frequent first, the answer's own words left out.

    >>> group_reasons(['"梨" is not one of the 2 labels. Labels: 手机, 水果.', '"水" is not one of the 2 labels.'])
    {'"…" is not one of the 2 labels.': 2}
    """
    counted = Counter(_plain_reason(reason) for reason in reasons)
    return dict(sorted(counted.items(), key=lambda pair: (-pair[1], pair[0])))


def _plain_reason(reason: str) -> str:
    """The first sentence of `reason`, with quotations and places blanked; code fences and ``','`` stay."""

    def blank(match: re.Match[str]) -> str:
        text = match.group()
        ours = text.startswith("'```") or (text.startswith("'") and len(text) <= 3)
        return text if ours else f"{text[0]}…{text[0]}"

    plain = _PLACE.sub(r"\1 N", _QUOTED.sub(blank, reason))
    first, dot, _ = plain.partition(". ")
    return first + "." if dot else plain


# ---- bootstrap ------------------------------------------------------------------------------------------------


def _intervals(task: Task, rows: Sequence[RowScore], *, seed: int, resamples: int) -> dict[str, tuple[float, float]]:
    """The 2.5th and 97.5th percentile of each metric over resampled rows (Efron's percentile interval)."""
    drawn = draws(len(rows), seed=seed, resamples=resamples)
    samples = [task.summarise(counts) for counts in resampled_counts(task, rows, drawn)]
    bounds = {name: np.percentile([sample[name] for sample in samples], [2.5, 97.5]) for name in samples[0]}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def draws(num_rows: int, *, seed: int, resamples: int) -> Iterator[npt.NDArray[np.int64]]:
    """How often each row is drawn, resample by row, in blocks of resamples: the same for every set of that length."""
    generator = np.random.default_rng(seed)
    chance = np.full(num_rows, 1 / num_rows)
    step = max(1, CHUNK_CELLS // num_rows)
    for start in range(0, resamples, step):
        yield generator.multinomial(num_rows, chance, size=min(step, resamples - start))


def resampled_counts(task: Task, rows: Sequence[RowScore], drawn: Iterable[npt.NDArray[np.int64]]) -> Iterator[Counts]:
    """The summed counts of each resample that `drawn` holds."""
    keys = sorted({key for row in rows for key in row.counts if _summarise_reads(task, key)})
    table = np.array([[row.counts.get(key, 0.0) for key in keys] for row in rows])
    for times_drawn in drawn:
        for sums in (times_drawn @ table).tolist():
            # A label that was not drawn must be absent, not zero: macro-F1 is a mean over the labels that occur.
            yield {key: value for key, value in zip(keys, sums) if value or ":" not in key}


def _summarise_reads(task: Task, key: str) -> bool:
    """Whether the metrics depend on the count `key`; the per-predicate counts and confusion pairs they do not."""
    return ":" not in key or (task.kind == "labels" and not key.startswith("pair:"))
