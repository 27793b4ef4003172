"""Scored predictions of one or several models on one data set, as JSON, Markdown and one self-contained HTML page.

Knows scores, tasks and pages; knows nothing of models or of how the predictions came about. The pages' texts and
layout stand in `report.md.jinja` and `report.html.jinja`; this module supplies the figures, the choice of the worst
rows and the differences between label and answer. Nothing in a report depends on the clock, the machine or the order
of a set: the same input gives the same bytes.

Input texts and answers are untrusted: the page escapes them, shows control characters as visible signs, and carries
a content security policy that runs no script but its own and fetches nothing.
"""

from __future__ import annotations

import base64
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from ..runs import write_bytes, writing
from ..tasks.base import RowScore, Task
from ..tasks.extraction import facts
from ..tasks.labels import INVALID
from ..visible import shorten, visible
from .score import Prediction, Side, TaskScore, overall, row_value

NUM_WORST_ROWS = 50
NUM_WORST_ROWS_MARKDOWN = 10
MAX_LABELS_IN_CONFUSION = 64
MAX_EXACT_DIFF_TOKENS = 800
"""Longer texts are compared with difflib's shortcut: without it a looping answer takes many seconds."""


class MetricText(NamedTuple):
    """What people read for a metric."""

    label: str
    meaning: str


METRICS: Mapping[str, MetricText] = {
    "f1": MetricText(
        "Strict F1",
        "a fact counts as found only when all its content fields equal the label (subject, predicate and object of a "
        "triple; key and value of an attribute); the balance of precision and recall over the facts of all rows.",
    ),
    "precision": MetricText("Precision", "of the facts that the answers give, the share that the labels hold."),
    "recall": MetricText("Recall", "of the facts that the labels hold, the share that the answers give."),
    "f1_typed": MetricText("F1 with types", "strict F1 where the types of subject and object must be equal too."),
    "accuracy": MetricText("Accuracy", "share of rows whose label, or whole set of labels, is right."),
    "macro_f1": MetricText(
        "Macro F1",
        "F1 of each label, averaged over the labels that occur: a rare label counts as much as a frequent one.",
    ),
    "rouge_l": MetricText(
        "ROUGE-L",
        "longest common run of words in order, gaps allowed (a Chinese character is a word), averaged over rows.",
    ),
    "chrf": MetricText("chrF", "shared character sequences of length 1 to 6, averaged over rows."),
    "valid": MetricText(
        "In the labelled form", "share of answers that have the form of the labels; the others earn nothing."
    ),
    "exact": MetricText("Exact", "share of answers equal to the label; only spacing and key order of JSON are free."),
}


class Span(NamedTuple):
    """A piece of a text and whether the other text lacks it."""

    text: str
    differs: bool


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
        return mark_differences(self.prediction.gold, self.prediction.answer, keep_space=self.task.kind == "text")

    @property
    def missing_and_invented(self) -> tuple[list[str], list[str]]:
        """For extraction: the facts only the label holds, and those only the answer holds."""
        if self.task.kind != "extraction" or not self.score.valid:
            return [], []
        form = self.task.form
        wanted = facts(form, form.parse(self.prediction.gold), typed=False)
        given = facts(form, form.parse(self.prediction.answer), typed=False)
        missing, invented = ([" · ".join(fact) for fact in sorted(only)] for only in (wanted - given, given - wanted))
        return missing, invented

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        missing, invented = self.missing_and_invented
        own = {"score": self.value, "refused": self.score.reason, "missing": missing, "invented": invented}
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
    """By name, such as ``base`` and ``tuned``; the first is compared against, the last is the one examined."""

    def __post_init__(self) -> None:
        assert self.sides, "a report shows at least one side"

    @property
    def examined(self) -> str:
        """Name of the last side, whose breakdown and worst rows are shown."""
        return list(self.sides)[-1]

    @property
    def baseline(self) -> str | None:
        """Name of the first side, None when it is the only one."""
        return next(iter(self.sides)) if len(self.sides) > 1 else None

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
        """The metrics worth showing for `task`: typed F1 only where there are types."""
        score = next((found for side in self.sides if (found := self.score(side, task))), None)
        typed = any(field.key.endswith("_type") for field in task.form.fields)
        return [name for name in (score.metrics if score else ()) if typed or name != "f1_typed"]

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

    def to_json(self) -> dict[str, Any]:
        """Everything but the predictions that are not among the worst; floats to six digits."""
        worst = [row.to_json() for row in self.worst_rows()]
        data = {
            "title": self.title,
            "created": self.created,
            "run": self.run,
            "models": dict(self.models),
            "data": {"file": self.data_file, "fingerprint": self.data_fingerprint},
            "facts": dict(self.facts),
            "tasks": [task.to_json() for task in self.tasks],
            "sides": {
                name: {"overall": overall(side.scores), "scores": [score.to_json() for score in side.scores]}
                for name, side in self.sides.items()
            },
            "worst": worst,
        }
        rounded: dict[str, Any] = _rounded(data)
        return rounded

    def to_markdown(self) -> str:
        """The tables and the ten worst rows."""
        return _render("report.md.jinja", self, self.worst_rows(NUM_WORST_ROWS_MARKDOWN))

    def to_html(self) -> str:
        """One page that opens offline: tables, bars, confusion, the fifty worst rows with their differences."""
        return _render("report.html.jinja", self, self.worst_rows())


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` into `folder`, each whole or not at all.

    Raises RunError when the folder or a file cannot be written.
    """
    texts = {
        "report.json": json.dumps(report.to_json(), ensure_ascii=False, indent=2) + "\n",
        "report.md": report.to_markdown(),
        "report.html": report.to_html(),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        # A lone surrogate cannot be UTF-8; as the escape \udXXX it is plain text, and in JSON it reads back equal.
        write_bytes(folder / name, text.encode("utf-8", "backslashreplace"))
    return [folder / name for name in texts]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


# ---- differences ----------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\A\s+|(?:[A-Za-z0-9_]+|\S)\s*")


def mark_differences(gold: str, answer: str, *, keep_space: bool = True) -> tuple[list[Span], list[Span]]:
    """Both texts in pieces, marked where the other lacks them: words of Latin letters, else single characters.

    Without `keep_space` spacing is no difference, as between two spellings of the same JSON.

    >>> mark_differences('["书籍"]', '[ "书店" ]', keep_space=False)[1]
    [Span(text='[ "书', differs=False), Span(text='店', differs=True), Span(text='" ]', differs=False)]
    """
    tokens = [_TOKEN.findall(shorten(text)) for text in (gold, answer)]
    keys = tokens if keep_space else [[token.strip() for token in side] for side in tokens]
    shortcut = max(map(len, tokens)) > MAX_EXACT_DIFF_TOKENS
    blocks = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=shortcut).get_matching_blocks()
    sides: list[list[Span]] = []
    for place, side in enumerate(tokens):
        spans, end = [], 0
        for block in blocks:
            start = block[place]
            spans += [Span("".join(side[end:start]), True), Span("".join(side[start : start + block.size]), False)]
            end = start + block.size
        sides.append([span for span in spans if span.text])
    return sides[0], sides[1]


# ---- templates ------------------------------------------------------------------------------------------------


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda value: f"{100 * value:.1f}",
        "signed": lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        "hash": lambda text: base64.b64encode(hashlib.sha256(str(text).encode("utf-8")).digest()).decode("ascii"),
        "visible": visible,
        "shorten": shorten,
        "cell": _markdown_text,
        "code": _markdown_code,
    }
    return environment.get_template(name)


def _render(template: str, report: Report, worst: Sequence[WorstRow]) -> str:
    names = dict.fromkeys(name for task in report.tasks for name in report.metric_names(task))
    return _template(template).render(
        report=report,
        worst=worst,
        metrics={name: METRICS.get(name, MetricText(name, "")) for name in names},
        overall=overall,
        figure=_figure,
        heat=_heat,
        f1_by_name=_f1_by_name,
        max_labels=MAX_LABELS_IN_CONFUSION,
    )


def _figure(score: TaskScore | None, name: str) -> str:
    """A metric in per cent with its interval, such as ``84.2 [79.0, 88.9]``."""
    if score is None:
        return "–"
    value = f"{100 * score.metrics[name]:.1f}"
    bounds = score.intervals.get(name)
    return value if bounds is None else f"{value} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def _markdown_text(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or a table would read as a mark."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(visible(text).split()))


def _markdown_code(text: str, limit: int = 300) -> str:
    """`text` as a code span on one line; line breaks are shown as ↵."""
    shown = visible(shorten(text, limit)).replace("\n", "↵").replace("\t", " ") or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{ticks} {shown} {ticks}"


def _f1_by_name(score: TaskScore | None) -> dict[str, float]:
    return {part.name: part.f1 for part in score.breakdown} if score else {}


class HeatRow(NamedTuple):
    """One label of the confusion table: how often it was given each answer, and that as a share of its rows."""

    gold: str
    cells: list[tuple[str, int, float]]


def _heat(confusion: Mapping[str, Mapping[str, int]]) -> list[HeatRow]:
    """The confusion table, the most frequent label first; answers that are no label stand last."""
    totals = {gold: sum(row.values()) for gold, row in confusion.items()}
    golds = sorted(confusion, key=lambda gold: (-totals[gold], gold))
    others = sorted({given for row in confusion.values() for given in row} - set(golds))
    order = [*golds, *(name for name in others if name != INVALID), *(name for name in others if name == INVALID)]
    return [
        HeatRow(gold, [(given, row.get(given, 0), row.get(given, 0) / totals[gold]) for given in order])
        for gold, row in ((gold, confusion[gold]) for gold in golds)
    ]
