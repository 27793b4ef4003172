"""Scored predictions of one or several models on one data set, as JSON, Markdown and one self-contained HTML page.

Knows scores, tasks and pages; knows nothing of models or of how the predictions came about. The pages' texts and
layout stand in the templates beside this module. Nothing in a report depends on the clock, the machine or the order
of a set: the same input gives the same bytes.

Input texts and answers are untrusted: the page escapes them, shows control characters as visible signs, and carries
a content security policy that runs no script but its own and fetches nothing.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..runs import write_bytes, writing
from ..tasks.base import RowScore, Task
from .constrained import FREE, ConstraintEffect, constraint_effects, free_side
from .differences import Span, label_in_answers_order, mark_differences
from .fact_errors import KIND_TEXTS, ErrorKind, ShownError, error_kinds_of, errors_of
from .metric_texts import METRICS, metric_text
from .pages import figure, heat, template
from .prediction import Prediction, write_predictions
from .rows_shown import rows_json
from .score import Side, TaskScore, overall, row_value
from .slices import SliceTable, slice_tables
from .suspects import Suspect, find_suspects, write_suspects

NUM_WORST_ROWS = 50
NUM_WORST_ROWS_MARKDOWN = 10
NUM_PARTS_MARKDOWN = 15
NUM_SUSPECTS_SHOWN = 20
MAX_LABELS_IN_CONFUSION = 64


class CalibrationTable(Protocol):
    """How confidence and correctness go together on one set."""

    @property
    def bins(self) -> Sequence[tuple[float, float, int, float, float]]:
        """(low, high, rows, mean confidence, accuracy) of each bin of confidence."""

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean distance of confidence and accuracy, weighted by rows."""

    @property
    def table(self) -> Sequence[tuple[float, float, float]]:
        """(threshold, share of rows kept, precision of the rows kept)."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstRow:
    """One of the lowest-scored answers."""

    task: Task
    prediction: Prediction
    score: RowScore
    value: float
    """The row's own score, 0–1."""

    @property
    def marks(self) -> tuple[list[Span], list[Span]]:
        """Label and answer in pieces, marked where they differ."""
        row = self.prediction
        gold = label_in_answers_order(self.task.form, row.gold, row.answer)
        return mark_differences(gold, row.answer, keep_space=self.task.kind == "text")

    @property
    def errors(self) -> list[ShownError]:
        """For extraction: the facts that are missing, invented or nearly right."""
        return errors_of(self.task, self.prediction, self.score)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        own = {"score": self.value, "refused": self.score.reason, "errors": [one._asdict() for one in self.errors]}
        return {**self.prediction.to_json(), **own}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one model, or several, answered to one data set, and how good that was."""

    title: str
    created: str
    """Date (and time) as it is to be shown; the report itself never looks at the clock."""
    run: str
    models: Mapping[str, str]
    """The model behind each side."""
    data_file: str
    data_fingerprint: str
    facts: Mapping[str, str]
    """Anything else worth stating: machine, versions, wall time, decoding …"""
    tasks: tuple[Task, ...]
    sides: Mapping[str, Side]
    """By name, such as ``base``, ``8-shot``, ``tuned`` and ``tuned, unconstrained``. The first is compared against; the
    last that is held to the form is the one examined."""
    train_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """For each task, how often its labels, predicates or keys occur in the training rows."""
    calibration: Mapping[str, CalibrationTable] = field(default_factory=dict)
    """For each task, how the examined side's confidence and correctness go together."""

    def __post_init__(self) -> None:
        assert self.sides, "a report shows at least one side"

    @property
    def examined(self) -> str:
        """Name of the side whose breakdown and rows are shown."""
        free = {name + FREE for name in self.sides}
        return [name for name in self.sides if name not in free][-1]

    @property
    def baseline(self) -> str | None:
        """Name of the first side, None when it is the examined one."""
        first = next(iter(self.sides))
        return first if first != self.examined else None

    def score(self, side: str, task: Task) -> TaskScore | None:
        """The score of `task` on `side`; None when that side has no rows of it."""
        return next((score for score in self.sides[side].scores if score.task == task.name and score.rows), None)

    def change(self, task: Task) -> float | None:
        """How much the primary metric rose from the baseline to the examined side."""
        before = self.score(self.baseline, task) if self.baseline is not None else None
        after = self.score(self.examined, task)
        if before is None or after is None:
            return None
        return after.metrics[after.primary] - before.metrics[before.primary]

    def metric_names(self, task: Task) -> list[str]:
        """The metrics of `task`, those that a reader is shown first leading; typed F1 only where there are types."""
        scores = [score for side in self.sides if (score := self.score(side, task))]
        typed = any(one.key.endswith("_type") for one in task.form.fields)
        names = dict.fromkeys(name for score in scores for name in score.metrics)
        known = [name for name in task.main_metrics if name in names]
        own = [name for name in names if name not in METRICS]
        further = [name for name in names if name not in known and name not in own]
        return [name for name in (*known, *own, *further) if typed or name != "f1_typed"]

    def main_metric_names(self, task: Task) -> list[str]:
        """The metrics of `task` that a reader is shown first, the user's own among them."""
        names = self.metric_names(task)
        return [name for name in names if name in task.main_metrics or name not in METRICS]

    def plain_metrics(self) -> frozenset[str]:
        """The user's own metrics that are no shares: some value lies outside 0–1, so per cent would mislead."""
        scores = [score for side in self.sides.values() for score in side.scores]
        return frozenset(
            name
            for score in scores
            for name, value in score.metrics.items()
            if name not in METRICS and not 0 <= value <= 1
        )

    def worst_rows(self, limit: int = NUM_WORST_ROWS) -> list[WorstRow]:
        """The examined side's lowest-scored answers, refused ones first; right answers are never among them.

        Every task gets an equal share of the places as far as it has faulty rows, so that one weak task cannot
        hide the faults of another.
        """
        side, tasks = self.sides[self.examined], {task.name: task for task in self.tasks}
        faulty = [
            WorstRow(task=task, prediction=prediction, score=score, value=value)
            for prediction, score in zip(side.predictions, side.rows)
            if (value := row_value(task := tasks[prediction.task], score)) < 1
        ]
        faulty.sort(key=lambda row: (row.score.valid, row.value))  # stable: file order among equals
        share = limit // max(1, len({row.task.name for row in faulty}))
        places = {name: [row for row in faulty if row.task.name == name][:share] for name in tasks}
        chosen = {id(row) for rows in places.values() for row in rows}
        spare = [row for row in faulty if id(row) not in chosen][: limit - len(chosen)]
        chosen |= {id(row) for row in spare}
        return [row for row in faulty if id(row) in chosen]

    def findings(self) -> Findings:
        """What the examined side's rows show beyond the scores. Costs a second or two on ten thousand rows."""
        side, free = self.sides[self.examined], free_side(self.sides, self.examined)
        others = {name: other for name, other in self.sides.items() if name.removesuffix(FREE) != self.examined}
        return Findings(
            worst=tuple(self.worst_rows()),
            slices={
                task.name: slice_tables(
                    task, self.sides, examined=self.examined, train_counts=self.train_counts.get(task.name)
                )
                for task in self.tasks
            },
            errors={task.name: error_kinds_of(side, task) for task in self.tasks if task.kind == "extraction"},
            constraint=constraint_effects(side, free, self.tasks) if free is not None else (),
            suspects=find_suspects(side, self.tasks, others=others),
        )

    def to_json(self, findings: Findings | None = None) -> dict[str, Any]:
        """Everything but the rows that are not among the worst; floats to six digits."""
        found, files = findings or self.findings(), scored_files(self.sides)
        data = {
            "title": self.title,
            "created": self.created,
            "run": self.run,
            "models": dict(self.models),
            "data": {"file": self.data_file, "fingerprint": self.data_fingerprint},
            "facts": dict(self.facts),
            "tasks": [task.to_json() for task in self.tasks],
            "sides": {
                name: {
                    "file": files[name],
                    "overall": overall(side.scores),
                    "scores": [score.to_json() for score in side.scores],
                }
                for name, side in self.sides.items()
            },
            "examined": self.examined,
            **found.to_json(),
            "calibration": {task: one.to_json() for task, one in self.calibration.items()},
        }
        rounded: dict[str, Any] = _rounded(data)
        return rounded

    def to_markdown(self, findings: Findings | None = None) -> str:
        """The tables and the ten worst rows."""
        return self._render("report.md.jinja", findings, worst=self.worst_rows(NUM_WORST_ROWS_MARKDOWN))

    def to_html(self, findings: Findings | None = None) -> str:
        """One page that opens offline: tables, bars, confusion, and every row with its differences."""
        found = findings or self.findings()
        rows = rows_json(
            self.tasks,
            self.sides,
            examined=self.examined,
            reasons={suspect.place: suspect.reason for suspect in found.suspects},
            free=self.examined + FREE,
        )
        return self._render("report.html.jinja", found, worst=found.worst, rows_json=rows)

    def _render(self, name: str, findings: Findings | None, **more: Any) -> str:
        metrics = dict.fromkeys(metric for task in self.tasks for metric in self.metric_names(task))
        return template(name).render(
            report=self,
            found=findings or self.findings(),
            metrics={metric: metric_text(metric) for metric in metrics},
            metric_text=metric_text,
            overall=overall,
            figure=functools.partial(figure, plain=self.plain_metrics()),
            plain=self.plain_metrics(),
            heat=heat,
            other_f1=self._other_f1,
            measured=self._is_measured(),
            any_refused=self._any_refused,
            kind_texts=KIND_TEXTS,
            max_labels=MAX_LABELS_IN_CONFUSION,
            num_suspects=NUM_SUSPECTS_SHOWN,
            num_parts=NUM_PARTS_MARKDOWN,
            **more,
        )

    def _other_f1(self, task: Task) -> list[dict[str, float]]:
        """For each side but the examined one, the F1 of every label, predicate or key."""
        scores = [self.score(side, task) for side in self.sides if side != self.examined]
        return [{part.name: part.f1 for part in score.breakdown} if score else {} for score in scores]

    def _any_refused(self, task: Task) -> bool:
        """Whether the engine refused an answer of `task` on any side."""
        return any(score.refused for side in self.sides if (score := self.score(side, task)))

    def _is_measured(self) -> bool:
        """Whether confidence or loss is known of any row, so that suspects could be looked for."""
        rows = self.sides[self.examined].predictions
        return any(row.confidence is not None or row.loss is not None for row in rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What the examined side's rows show beyond the scores."""

    worst: tuple[WorstRow, ...]
    slices: Mapping[str, tuple[SliceTable, ...]]
    """By task."""
    errors: Mapping[str, tuple[ErrorKind, ...]]
    """By task, for extraction."""
    constraint: tuple[ConstraintEffect, ...]
    """Per task; empty without an unconstrained side."""
    suspects: tuple[Suspect, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; suspects have a file of their own and are only counted."""
        return {
            "slices": {task: [table.to_json() for table in tables] for task, tables in self.slices.items()},
            "errors": {task: [kind.to_json() for kind in kinds] for task, kinds in self.errors.items()},
            "constraint": [effect.to_json() for effect in self.constraint],
            "suspects": len(self.suspects),
            "worst": [row.to_json() for row in self.worst],
        }


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the report into `folder`, each file whole or not at all, and return their paths.

    ``report.json``, ``report.md`` and ``report.html``; ``suspects.jsonl``, the rows whose label looks wrong; and for
    each side ``scored-SIDE.jsonl``, its predictions with their labels, from which runs are compared.

    Raises RunError when the folder or a file cannot be written.
    """
    findings = report.findings()
    texts = {
        "report.json": json.dumps(report.to_json(findings), ensure_ascii=False, indent=2) + "\n",
        "report.md": report.to_markdown(findings),
        "report.html": report.to_html(findings),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    scored = {folder / file: report.sides[name] for name, file in scored_files(report.sides).items()}
    for path, side in scored.items():
        write_predictions(side.predictions, path)
    write_suspects(findings.suspects, folder / "suspects.jsonl")
    for name, text in texts.items():
        # A lone surrogate cannot be UTF-8; as the escape \udXXX it is plain text, and in JSON it reads back equal.
        write_bytes(folder / name, text.encode("utf-8", "backslashreplace"))
    return [*(folder / name for name in texts), folder / "suspects.jsonl", *scored]


def scored_files(sides: Iterable[str]) -> dict[str, str]:
    """For each side, the name of the file that holds its scored predictions.

    >>> scored_files(["tuned", "tuned, unconstrained", "tuned (unconstrained)"])["tuned (unconstrained)"]
    'scored-tuned-unconstrained-2.jsonl'
    """
    files: dict[str, str] = {}
    for side in sides:
        plain = re.sub(r"\W+", "-", side).strip("-")[:40]
        numbered = (
            f"scored-{plain}{end}.jsonl" for end in ("", *(f"-{number}" for number in range(2, len(files) + 3)))
        )
        files[side] = next(name for name in numbered if name not in files.values())
    return files


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
