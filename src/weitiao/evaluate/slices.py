"""Where a model is good and where it is not: its score by length of the input, by file, by rarity in training.

Knows scored predictions; knows nothing of pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..data.records import Record
from ..tasks.base import RowScore, Task, add_counts, prf
from .prediction import Prediction
from .score import Side, draws, resampled_counts

MIN_ROWS = 8
"""With fewer rows a quarter of them says nothing."""
MAX_FILES = 20
RESAMPLES = 300
RARITY_BOUNDS = (0, 9, 99, 999)
"""Names seen in training this often at most share a line; those seen more often have the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Some of a task's rows, or of its labels, and how good each side is on them."""

    name: str
    size: int
    """Rows on the examined side; for rarity, how often its labels hold one of the names."""
    values: Mapping[str, float]
    """The score (0–1) of each side that has something here."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the examined side's score; None where it was not drawn."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        interval = list(self.interval) if self.interval else None
        return {"name": self.name, "size": self.size, "values": dict(self.values), "interval": interval}


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceTable:
    """One way to cut a task's rows."""

    title: str
    unit: str
    """What `Slice.size` counts."""
    metric: str
    slices: tuple[Slice, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        slices = [one.to_json() for one in self.slices]
        return {"title": self.title, "unit": self.unit, "metric": self.metric, "slices": slices}


def slice_tables(
    task: Task, sides: Mapping[str, Side], *, examined: str, train_counts: Mapping[str, int] | None = None
) -> tuple[SliceTable, ...]:
    """The tables of `task` that have at least two lines.

    Args:
        task: the task whose rows are cut.
        sides: scored predictions by name.
        examined: the side whose rows decide where to cut, and which gets intervals.
        train_counts: how often each label, predicate or key occurs in the training rows.
    """
    own = {name: _rows_of(side, task) for name, side in sides.items()}
    tables = [_by_length(task, own, examined), _by_file(task, own, examined)]
    if train_counts is not None:
        tables.append(_by_rarity(own, examined, train_counts))
    return tuple(table for table in tables if table is not None and len(table.slices) > 1)


def count_labels(records: Sequence[Record], tasks: Sequence[Task]) -> dict[str, dict[str, int]]:
    """For each task by its name, how many of `records` hold each label, predicate or key: what `train_counts` takes.

    Args:
        records: labelled rows, such as those a model learns from.
        tasks: for each of them, its task.
    """
    answers: Counter[tuple[str, str]] = Counter()
    for record, task in zip(records, tasks, strict=True):
        if task.kind != "text":
            answers[task.name, task.write_target(record)] += 1
    by_name = {task.name: task for task in tasks}
    counts: dict[str, Counter[str]] = {name: Counter() for name in by_name}
    for (name, answer), times in answers.items():
        task = by_name[name]
        for key in task.score(task.form.parse(answer), answer).counts:
            if key.startswith("tp:"):
                counts[name][key.removeprefix("tp:")] += times
    return {name: dict(found) for name, found in counts.items()}


Rows = Sequence[tuple[Prediction, RowScore]]


def _rows_of(side: Side, task: Task) -> Rows:
    return [pair for pair in zip(side.predictions, side.rows, strict=True) if pair[0].task == task.name]


def _by_length(task: Task, own: Mapping[str, Rows], examined: str) -> SliceTable | None:
    lengths = [prediction.num_characters for prediction, _ in own[examined]]
    if len(lengths) < MIN_ROWS or len(set(lengths)) == 1:
        return None
    bounds = sorted({int(bound) for bound in np.percentile(lengths, [25, 50, 75])} - {max(lengths)})
    starts = [min(lengths), *(bound + 1 for bound in bounds)]
    names = [f"{start}–{end}" for start, end in zip(starts, [*bounds, max(lengths)], strict=True)]

    def place(prediction: Prediction) -> str:
        return names[int(np.searchsorted(bounds, prediction.num_characters, side="left"))]

    slices = _slices(task, own, examined, names, place)
    return SliceTable(
        title="By length of the input, in characters", unit="rows", metric=task.primary_metric, slices=slices
    )


def _by_file(task: Task, own: Mapping[str, Rows], examined: str) -> SliceTable | None:
    counted = Counter(prediction.file for prediction, _ in own[examined])
    names = [name for name, _ in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))]
    shown = names if len(names) <= MAX_FILES else [*names[: MAX_FILES - 1], "other files"]

    def place(prediction: Prediction) -> str:
        return prediction.file if prediction.file in shown else "other files"

    slices = _slices(task, own, examined, shown, place)
    return SliceTable(title="By file", unit="rows", metric=task.primary_metric, slices=slices)


def _slices(task: Task, own: Mapping[str, Rows], examined: str, names: Sequence[str], place: Any) -> tuple[Slice, ...]:
    grouped: dict[str, dict[str, list[RowScore]]] = {name: {} for name in names}
    for side, rows in own.items():
        for prediction, score in rows:
            grouped.get(place(prediction), {}).setdefault(side, []).append(score)
    return tuple(
        Slice(
            name=name,
            size=len(members.get(examined, ())),
            values={
                side: task.summarise(add_counts([r.counts for r in rows]))[task.primary_metric]
                for side, rows in members.items()
            },
            interval=_interval(task, members[examined]),
        )
        for name, members in grouped.items()
        if examined in members
    )


def _interval(task: Task, rows: Sequence[RowScore]) -> tuple[float, float]:
    drawn = draws(len(rows), seed=0, resamples=RESAMPLES)
    values = [task.summarise(counts)[task.primary_metric] for counts in resampled_counts(task, rows, drawn)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _by_rarity(own: Mapping[str, Rows], examined: str, train_counts: Mapping[str, int]) -> SliceTable:
    """F1 over all labels, predicates or keys that occurred about equally often in training."""
    names = _rarity_names()
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for side, rows in own.items():
        for key, value in _named_counts(rows):
            part, _, label = key.partition(":")
            group = names[int(np.searchsorted(RARITY_BOUNDS, train_counts.get(label, 0), side="left"))]
            sums[group].setdefault(side, [0.0, 0.0, 0.0])[("tp", "fp", "fn").index(part)] += value
    slices = tuple(
        Slice(
            name=name,
            size=int(parts[examined][0] + parts[examined][2]),
            values={side: prf(tp, fp, fn)[2] for side, (tp, fp, fn) in parts.items()},
            interval=None,
        )
        for name, parts in sums.items()
        if examined in parts and parts[examined][0] + parts[examined][2]  # names that answers alone give have no F1
    )
    return SliceTable(title="By how often training showed it", unit="labelled", metric="f1", slices=slices)


def _named_counts(rows: Rows) -> Iterable[tuple[str, float]]:
    total = add_counts([score.counts for _, score in rows])
    return ((key, value) for key, value in total.items() if key.startswith(("tp:", "fp:", "fn:")))


def _rarity_names() -> list[str]:
    middle = [f"{low + 1}–{high} times" for low, high in pairwise(RARITY_BOUNDS)]
    return ["never", *middle, f"{RARITY_BOUNDS[-1] + 1} times or more"]
