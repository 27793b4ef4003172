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

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, FormError, Problem
from ..runs import write_bytes
from ..tasks import labels
from ..tasks.base import Counts, RowScore, Task, add_counts

Finish = Literal["stop", "length"]

CHUNK_CELLS = 5_000_000
"""Bootstrap draws are made for at most this many rows × resamples at a time (40 MB)."""

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_PLACE = re.compile(r"\b(Item|character) \d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a model answered to one row: one line of the predictions file."""

    source: str
    """Where the row came from, such as ``dev.jsonl:37``."""
    task: str
    prompt: str
    """The input as the model was asked it."""
    gold: str
    """The labelled answer as the model was trained to write it."""
    answer: str
    finish: Finish = "stop"
    """`stop`: the model ended its answer; `length`: the answer was cut at the token limit."""
    before: tuple[tuple[str, str], ...] = ()
    """What the model was shown before `prompt`, as (speaker, text): the tools on offer, the system message, the earlier
    turns."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal. Without `before` where nothing stands there."""
        before = {"before": [list(turn) for turn in self.before]} if self.before else {}
        return {
            "source": self.source,
            "task": self.task,
            "prompt": self.prompt,
            "gold": self.gold,
            "answer": self.answer,
            "finish": self.finish,
            **before,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prediction:
        """The prediction that `to_json` wrote. Raises ValueError, in a sentence, for anything else."""
        fields = ("source", "task", "prompt", "gold", "answer", "finish")
        if not isinstance(data, Mapping) or set(data) - {"before"} != set(fields):
            raise ValueError(f"A prediction is an object with exactly the keys {', '.join(fields)}, and maybe before.")
        wrong = [field for field in fields if not isinstance(data[field], str)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} must be text.")
        if data["finish"] not in ("stop", "length"):
            raise ValueError(f'finish is "stop" or "length", not {data["finish"]!r}.')
        before = data.get("before", [])
        if not (isinstance(before, list) and all(_is_turn(turn) for turn in before)):
            raise ValueError("before must be a list of pairs: who speaks, and the text.")
        return cls(**{**data, "before": tuple((speaker, text) for speaker, text in before)})


def _is_turn(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


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


# ---- the predictions file -------------------------------------------------------------------------------------


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write one JSON line per prediction; the file appears whole or not at all."""
    lines = (json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in predictions)
    # A lone surrogate cannot be UTF-8; as the escape \udXXX it is JSON and reads back equal.
    write_bytes(path, "".join(lines).encode("utf-8", "backslashreplace"))


def read_predictions(path: Path) -> tuple[Prediction, ...]:
    """The predictions in `path`. Raises DataError naming every line that is not one."""
    rows: list[Prediction] = []
    problems: list[Problem] = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(Prediction.from_json(json.loads(line)))
            except ValueError as error:
                fix = "Predict again, or remove the line."
                problems.append(Problem(source=f"{path.name}:{number}", field="row", message=f"{error}", fix=fix))
    if problems:
        raise DataError(f"{len(problems)} line(s) of {path} are not predictions.", problems)
    return tuple(rows)


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
    predictions: Sequence[Prediction], tasks: Sequence[Task], *, seed: int = 0, resamples: int = 1000
) -> Side:
    """`predictions` with the scores of every row and every task: what a report is made from."""
    rows = row_scores(predictions, tasks)
    scores = []
    for task in tasks:
        own = [(prediction, row) for prediction, row in zip(predictions, rows) if prediction.task == task.name]
        cut = sum(prediction.finish == "length" for prediction, _ in own)
        scores.append(_task_score(task, [row for _, row in own], cut=cut, seed=seed, resamples=resamples))
    return Side(predictions=tuple(predictions), rows=rows, scores=tuple(scores))


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
        rows.append(task.score(gold, prediction.answer))
    if problems:
        raise DataError(f"{len(problems)} of {len(predictions)} predictions cannot be scored.", problems)
    return tuple(rows)


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


def _task_score(task: Task, rows: Sequence[RowScore], *, cut: int, seed: int, resamples: int) -> TaskScore:
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
        cut=cut,
        refusals=group_reasons([row.reason for row in rows if not row.valid]),
    )


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
    samples = [task.summarise(counts) for counts in _resampled_counts(task, rows, seed=seed, resamples=resamples)]
    bounds = {name: np.percentile([sample[name] for sample in samples], [2.5, 97.5]) for name in samples[0]}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def _resampled_counts(task: Task, rows: Sequence[RowScore], *, seed: int, resamples: int) -> Iterator[Counts]:
    """Summed counts of `resamples` draws of ``len(rows)`` rows with replacement."""
    keys = sorted({key for row in rows for key in row.counts if _summarise_reads(task, key)})
    table = np.array([[row.counts.get(key, 0.0) for key in keys] for row in rows])
    generator = np.random.default_rng(seed)
    chance = np.full(len(rows), 1 / len(rows))
    step = max(1, CHUNK_CELLS // len(rows))
    for start in range(0, resamples, step):
        times_drawn = generator.multinomial(len(rows), chance, size=min(step, resamples - start))
        for sums in (times_drawn @ table).tolist():
            # A label that was not drawn must be absent, not zero: macro-F1 is a mean over the labels that occur.
            yield {key: value for key, value in zip(keys, sums) if value or ":" not in key}


def _summarise_reads(task: Task, key: str) -> bool:
    """Whether the metrics depend on the count `key`; the per-predicate counts and confusion pairs they do not."""
    return ":" not in key or (task.kind == "labels" and not key.startswith("pair:"))
