"""Two models' answers to the same rows: what each is worth, which rows flipped, whether that is more than chance.

Refuses two sets that are not the same rows. Knows scored files and scores; the page's text and layout stand in
`compare.html.jinja`, the terminal's in `compare_shown.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError, Problem
from ..runs import write_bytes, write_json, writing
from ..tasks.base import Task
from .metric_texts import metric_text
from .pages import template
from .paired import LEVEL, Difference, Floats, difference, mcnemar, paired_bootstrap
from .prediction import Prediction
from .rows_shown import outcome, rows_json
from .score import Side, row_value, score_side
from .scored_files import Scored, find_evaluations, read_scored

RESAMPLES = 10_000
MAX_NAMED_ROWS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A row that one model gets right and the other does not."""

    kind: Literal["wrong → right", "right → wrong"]
    a: Prediction
    b: Prediction
    value_a: float
    """The row's score (0–1) with the first model's answer."""
    value_b: float
    reason: str
    """Why the answer that is not right has not the form; empty where it has."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        row = {"source": self.b.source, "task": self.b.task, "prompt": self.b.prompt, "gold": self.b.gold}
        return {**row, "kind": self.kind, "a": self.a.answer, "b": self.b.answer,
                "score_a": self.value_a, "score_b": self.value_b, "reason": self.reason}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskComparison:
    """Two models on the rows of one task."""

    task: str
    rows: int
    primary: str
    metrics: Mapping[str, Difference]
    """By name, those that a reader is shown first leading."""
    num_main: int
    """How many of `metrics` a reader is shown first."""
    only_a: int
    """Rows that the first model alone gets right."""
    only_b: int
    mcnemar: float | None
    """p-value of McNemar's exact test on the rows right; for labels, where right rows are what is scored."""

    @property
    def p_value(self) -> float:
        """How often chance alone would bring about the difference of the primary metric."""
        return self.metrics[self.primary].p_value if self.mcnemar is None else self.mcnemar

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {
            "task": self.task,
            "rows": self.rows,
            "primary": self.primary,
            "metrics": {name: one.to_json() for name, one in self.metrics.items()},
            "only_a": self.only_a,
            "only_b": self.only_b,
            "mcnemar": self.mcnemar,
            "p_value": self.p_value,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models' answers to the same rows."""

    a: str
    """What the first model is called."""
    b: str
    paths: tuple[str, str]
    tasks: tuple[Task, ...]
    sides: Mapping[str, Side]
    """The scored answers by `a` and `b`, both in the rows' order of `a`."""
    compared: tuple[TaskComparison, ...]
    """The tasks that have rows."""
    overall: Difference | None
    """The mean of the tasks' primary metrics; None for a single task."""
    flips: tuple[Flip, ...]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One sentence per task, and one for their mean: is the difference more than chance?"""
        own = [
            _verdict(self, one.task, metric_text(one.primary).label, one.metrics[one.primary], one.p_value, one.rows)
            for one in self.compared
        ]
        if self.overall is not None:
            rows = sum(one.rows for one in self.compared)
            own.append(_verdict(self, "all tasks", "mean", self.overall, self.overall.p_value, rows))
        return tuple(own)

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows that did not flip."""
        return {
            "a": {"name": self.a, "path": self.paths[0]},
            "b": {"name": self.b, "path": self.paths[1]},
            "verdicts": list(self.verdicts),
            "tasks": [one.to_json() for one in self.compared],
            "overall": self.overall.to_json() if self.overall is not None else None,
            "flips": [flip.to_json() for flip in self.flips],
        }

    def to_html(self) -> str:
        """One page that opens offline: the figures, the verdicts, every row with both answers."""
        rows = rows_json(self.tasks, self.sides, examined=self.b, reasons={}, free=None, flips=True)
        page = template("compare.html.jinja")
        return page.render(comparison=self, rows_json=rows, metric_text=metric_text, level=LEVEL, p_text=p_text)


def compare_runs(
    a: str | Path,
    b: str | Path,
    *,
    data: str | None = None,
    side_a: str | None = None,
    side_b: str | None = None,
    any_prompt: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two runs, evaluations or files of scored answers; `b` is held against `a`.

    ``compare_runs("runs/one", "runs/two")`` compares two tuned models, ``compare_runs("runs/one", "runs/one",
    side_a="base")`` a tuned one with its base.

    Args:
        a: a run folder, the folder of an evaluation, or a ``scored-SIDE.jsonl`` beside its report.
        b: another, of the same rows.
        data: name of the set, where runs were evaluated on several; ``dev`` unless said.
        side_a: which side of `a`; the one its report examined unless said.
        side_b: which side of `b`.
        any_prompt: let inputs differ, where the same rows were asked or shortened differently.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        RunError: there is no such evaluation or side.
        DataError: the two are not of the same rows; names those that differ.
    """
    found = find_evaluations((Path(a), Path(b)), data=data)
    first, second = (read_scored(path, side=side) for path, side in zip(found, (side_a, side_b), strict=True))
    names = _names(first, second)
    order = match_rows(first, second, names=names, any_prompt=any_prompt)
    sides = (
        score_side(first.predictions, first.tasks, resamples=0),
        score_side([second.predictions[place] for place in order], second.tasks, resamples=0),
    )
    compared, means = [], []
    for number, task in enumerate(second.tasks):
        places = [place for place, row in enumerate(sides[1].predictions) if row.task == task.name]
        if not places:
            continue
        both = (next(one for one in first.tasks if one.name == task.name), task)
        # A seed of its own for every task, so that their resamples are independent in the mean.
        one, resampled = _compare_task(both, sides, places, seed=seed + number, resamples=resamples)
        compared.append(one)
        means.append(resampled)
    return Comparison(
        a=names[0],
        b=names[1],
        paths=(str(first.path), str(second.path)),
        tasks=second.tasks,
        sides=dict(zip(names, sides, strict=True)),
        compared=tuple(compared),
        overall=_mean_of(compared, means) if len(compared) > 1 else None,
        flips=_flips(sides, second.tasks),
    )


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.html`` and ``compare.json`` into `folder`, each whole or not at all. Raises RunError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "compare.html", comparison.to_html().encode("utf-8", "backslashreplace"))
    write_json(folder / "compare.json", comparison.to_json())
    return [folder / "compare.html", folder / "compare.json"]


# ---- the same rows --------------------------------------------------------------------------------------------


def match_rows(a: Scored, b: Scored, *, names: tuple[str, str], any_prompt: bool = False) -> list[int]:
    """For each row of `a`, its place in `b`: the same task, label and input; labels may be spelled differently.

    Raises DataError naming the rows that only one of them has.
    """
    keys = [_row_keys(one, any_prompt=any_prompt) for one in (a, b)]
    waiting: dict[tuple[str, ...], list[int]] = {}
    for place, key in enumerate(keys[1]):
        waiting.setdefault(key, []).append(place)
    order: list[int] = []
    alone: list[int] = []
    for place, key in enumerate(keys[0]):
        matches = waiting.get(key)
        if matches:
            order.append(matches.pop(0))
        else:
            alone.append(place)
    spare = sorted(place for places in waiting.values() for place in places)
    if alone or spare:
        others = {(row.source, row.task): row for row in (b.predictions[place] for place in spare)}
        problems = [_problem(a.predictions[place], others, names) for place in alone]
        known = {(a.predictions[place].source, a.predictions[place].task) for place in alone}
        problems += [
            _only_in(row, names[1], names[0])
            for row in (b.predictions[place] for place in spare)
            if (row.source, row.task) not in known
        ]
        more = f" The first {MAX_NAMED_ROWS}:" if len(problems) > MAX_NAMED_ROWS else ""
        raise DataError(
            f"{names[0]} and {names[1]} were not scored on the same rows: {len(problems)} differ of "
            f"{len(a.predictions)} and {len(b.predictions)}.{more}",
            problems[:MAX_NAMED_ROWS],
        )
    return order


def _row_keys(scored: Scored, *, any_prompt: bool) -> list[tuple[str, ...]]:
    forms = {task.name: task.form for task in scored.tasks}
    keys: list[tuple[str, ...]] = []
    for row in scored.predictions:
        gold = json.dumps(forms[row.task].parse(row.gold), sort_keys=True) if row.task in forms else row.gold
        keys.append((row.task, gold, row.source.rpartition("/")[2] if any_prompt else row.prompt))
    return keys


def _problem(row: Prediction, others: Mapping[tuple[str, str], Prediction], names: tuple[str, str]) -> Problem:
    other = others.get((row.source, row.task))
    if other is None:
        return _only_in(row, names[0], names[1])
    if other.prompt != row.prompt:
        message = f"The input is not the same in {names[0]} and {names[1]}."
        fix = "Evaluate both on the same file; where they were only asked differently, compare with --any-prompt."
        return Problem(source=row.source, field="prompt", message=message, fix=fix)
    message = f"The label is not the same in {names[0]} and {names[1]}."
    return Problem(source=row.source, field="gold", message=message, fix="Evaluate both on the same file.")


def _only_in(row: Prediction, here: str, there: str) -> Problem:
    message = f"This row of {row.task} stands in {here} only, not in {there}."
    return Problem(source=row.source, field="row", message=message, fix="Evaluate both on the same file.")


def _names(a: Scored, b: Scored) -> tuple[str, str]:
    """The shortest names that tell the two apart: runs, sides, both, or paths."""
    for one, two in ((a.run, b.run), (a.side, b.side), (f"{a.run}, {a.side}", f"{b.run}, {b.side}")):
        if one != two:
            return one, two
    return (str(a.path), str(b.path)) if a.path != b.path else (f"{a.run} (A)", f"{b.run} (B)")


# ---- figures --------------------------------------------------------------------------------------------------


def _compare_task(
    tasks: tuple[Task, Task], sides: tuple[Side, Side], places: Sequence[int], *, seed: int, resamples: int
) -> tuple[TaskComparison, Floats]:
    task = tasks[1]
    rows = [[side.rows[place] for place in places] for side in sides]
    paired = paired_bootstrap(tasks, rows[0], rows[1], seed=seed, resamples=resamples)
    right = [[outcome(row) == "right" for row in own] for own in rows]
    only_a = sum(one and not two for one, two in zip(*right, strict=True))
    only_b = sum(two and not one for one, two in zip(*right, strict=True))
    typed = any(field.key.endswith("_type") for field in task.form.fields)
    names = [name for name in paired.differences if typed or name != "f1_typed"]
    main = [name for name in task.main_metrics if name in names]
    comparison = TaskComparison(
        task=task.name,
        rows=len(places),
        primary=task.primary_metric,
        metrics={name: paired.differences[name] for name in (*main, *(name for name in names if name not in main))},
        num_main=len(main),
        only_a=only_a,
        only_b=only_b,
        mcnemar=mcnemar(only_a, only_b) if task.kind == "labels" else None,
    )
    return comparison, paired.primary


def _mean_of(compared: Sequence[TaskComparison], resampled: Sequence[Floats]) -> Difference:
    primaries = [one.metrics[one.primary] for one in compared]
    a, b = (sum(values) / len(values) for values in ([one.a for one in primaries], [one.b for one in primaries]))
    return difference(a, b, np.mean(np.stack(resampled), axis=0))


def _flips(sides: tuple[Side, Side], tasks: Sequence[Task]) -> tuple[Flip, ...]:
    by_name = {task.name: task for task in tasks}
    flips = []
    for a, b, score_a, score_b in zip(sides[0].predictions, sides[1].predictions, sides[0].rows, sides[1].rows):
        before, after = outcome(score_a) == "right", outcome(score_b) == "right"
        if before != after:
            values = [row_value(by_name[b.task], score) for score in (score_a, score_b)]
            kind: Literal["wrong → right", "right → wrong"] = "wrong → right" if after else "right → wrong"
            reason = score_a.reason or score_b.reason
            flips.append(Flip(kind=kind, a=a, b=b, value_a=values[0], value_b=values[1], reason=reason))
    return tuple(sorted(flips, key=lambda flip: flip.kind))  # stable: the rows' order among equals


def _verdict(comparison: Comparison, where: str, metric: str, one: Difference, p_value: float, rows: int) -> str:
    change = f"{metric} {100 * one.a:.1f} → {100 * one.b:.1f} ({_signed(one.difference)}, 95 % interval "
    change += f"{_signed(one.interval[0])} to {_signed(one.interval[1])}, {p_text(p_value)})"
    if p_value < LEVEL:
        better = comparison.b if one.difference > 0 else comparison.a
        return f"{where}: {better} is better, by more than chance: {change}."
    reach = 100 * max(one.interval[1] - one.difference, one.difference - one.interval[0])
    limits = f"; on {rows} rows a difference below about {reach:.1f} points would not show" if reach else ""
    return f"{where}: no difference beyond chance: {change}{limits}."


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def p_text(p_value: float) -> str:
    """A p-value as people write it, such as ``p = 0.03``."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"
