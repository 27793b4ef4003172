"""What a kind of record means: which rows belong together, the form of their answers, and how one answer scores.

Knows records and forms; knows nothing of tokens, models or training.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..data.records import Record
from ..errors import FormError, Problem
from . import extraction, fact_errors, labels, text
from .forms import Answer, AnswerForm, Shape, is_closed_set, shape_of, split_fence
from .phrasing import Phrasing, phrasings_of
from .strict_json import loads

Kind = Literal["extraction", "labels", "text"]

Counts = Mapping[str, float]
"""Additive figures of one or many rows: the counts of a set are the sums of its rows' counts."""

MAX_WORDINGS = 200
"""A task remembers at most this many question wordings; beyond that questions are content, not a signal."""

SMALL_GROUP_SHARE = 0.05
"""Rows of an odd shape are held to be mistakes in another task's rows when they are fewer than this share of it."""

_KIND_OF_SHAPE: Mapping[Shape, Kind] = {
    "object list": "extraction",
    "object": "extraction",
    "label list": "labels",
    "string list": "extraction",
    "label": "labels",
    "text": "text",
    "json": "extraction",
    "pattern": "text",
    "grammar": "text",
}

LOWER_IS_BETTER = frozenset({"repetition", "looping"})
"""Metrics that a good model has little of."""

_SCORERS = {"extraction": extraction, "labels": labels, "text": text}


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScore:
    """One answer against its gold answer."""

    valid: bool
    """Whether the answer has the task's form."""
    reason: str
    """Why the form refused it, empty when valid."""
    exact: bool
    """Whether it equals the gold answer."""
    counts: Counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named kind of record: its question wordings, the form of its answers, its scores."""

    name: str
    form: AnswerForm
    wordings: tuple[str, ...] = ()
    """Question (or instruction) wordings seen with this task, most frequent first."""
    phrasings: tuple[Phrasing, ...] = ()
    """How whole rows of this task are asked, most frequent first."""

    @property
    def kind(self) -> Kind:
        """`extraction`, `labels` or `text`, as the form's shape says."""
        return _KIND_OF_SHAPE[self.form.shape]

    @property
    def primary_metric(self) -> str:
        """The figure that stands for the task where one number is needed: `f1`, `accuracy` or `rouge_l`."""
        return str(_SCORERS[self.kind].PRIMARY_METRIC)

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """The metrics that a reader is shown first, the primary one leading; the others of `metric_names` are further.

        One that a set of rows cannot have, such as accuracy on absent fields where none is absent, is in no summary.
        """
        return (*_SCORERS[self.kind].main_metrics(self.form), "valid", "exact")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric that `summarise` may give, in its order."""
        return tuple(self.summarise({"rows": 1.0, "valid": 0.0, "exact": 0.0, **dict.fromkeys(self._optional, 0.0)}))

    @property
    def _optional(self) -> tuple[str, ...]:
        return ("absent",) if self.form.shape == "object" else ()

    def gold(self, record: Record) -> Answer:
        """The parsed gold answer of `record`. Raises FormError when it does not fit the form."""
        return self.form.read_target(record.target)

    def write_target(self, record: Record) -> str:
        """The text a model is trained to answer `record` with. Raises FormError when the target does not fit."""
        return self.form.write(self.gold(record))

    def score(self, gold: Answer, answer: str) -> RowScore:
        """Compare the text `answer` with the parsed `gold`; an answer the form refuses earns nothing."""
        try:
            parsed, reason = self.form.parse(answer), ""
        except FormError as error:
            parsed, reason = None, str(error)
        valid = not reason
        exact = valid and parsed == gold
        counts: dict[str, float] = {"rows": 1, "valid": float(valid), "exact": float(exact)}
        counts |= _SCORERS[self.kind].count(self.form, gold, parsed)
        return RowScore(valid=valid, reason=reason, exact=exact, counts=counts)

    def summarise(self, counts: Counts) -> dict[str, float]:
        """Metrics (0–1) of summed counts, the primary metric first; empty when there are no rows."""
        if not counts.get("rows"):
            return {}
        figures = _SCORERS[self.kind].summarise(self.form, counts)
        return {**figures, "valid": counts["valid"] / counts["rows"], "exact": counts["exact"] / counts["rows"]}

    def breakdown(self, counts: Counts) -> list[dict[str, Any]]:
        """Rows of the per-predicate, per-key or per-label table: name, support, precision, recall, f1."""
        return [
            {"name": name, "support": int(tp + fn), **dict(zip(("precision", "recall", "f1"), prf(tp, fp, fn)))}
            for name, (tp, fp, fn) in sorted(
                _by_name(counts).items(), key=lambda row: (-(row[1][0] + row[1][2]), row[0])
            )
        ]

    def relaxed_breakdown(self, counts: Counts) -> list[dict[str, Any]]:
        """The rows of `breakdown` for extraction, scored with credit for what nearly agrees; else none."""
        if self.kind != "extraction":
            return []
        rows = []
        for name, (tp, fp, fn) in sorted(_by_name(counts).items(), key=lambda row: (-(row[1][0] + row[1][2]), row[0])):
            credit = counts.get(f"credit:{name}", 0.0)
            figures = prf(credit, tp + fp - credit, tp + fn - credit)
            rows.append({"name": name, "support": int(tp + fn), **dict(zip(("precision", "recall", "f1"), figures))})
        return rows

    def errors(self, counts: Counts) -> dict[fact_errors.ErrorKind, int]:
        """For extraction, how many errors of each kind there are (`fact_errors.error_kinds` names them); else none."""
        return fact_errors.errors_of(counts) if self.kind == "extraction" else {}

    def absence(self, counts: Counts) -> list[dict[str, Any]]:
        """For attributes, each key that labels leave empty: name, how often (`support`), and so answered (`right`)."""
        names = [key.removeprefix("absent:") for key in counts if key.startswith("absent:")]
        rows = [
            {
                "name": name,
                "support": int(counts[f"absent:{name}"]),
                "right": int(counts.get(f"absent_right:{name}", 0.0)),
            }
            for name in names
        ]
        return sorted(rows, key=lambda row: (-row["support"], row["name"]))

    def set_figures(self, answers: Sequence[str]) -> dict[str, float]:
        """Figures (0–1) of a whole set of answers that are no sums over rows: variety, for free text; else none."""
        return text.set_figures(answers) if self.kind == "text" else {}

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal."""
        return {
            "name": self.name,
            "kind": self.kind,
            "form": self.form.to_json(),
            "wordings": list(self.wordings),
            "phrasings": [phrasing.to_json() for phrasing in self.phrasings],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """The task that `to_json` wrote."""
        return cls(
            name=data["name"],
            form=AnswerForm.from_json(data["form"]),
            wordings=tuple(data.get("wordings", ())),
            phrasings=tuple(Phrasing.from_json(phrasing) for phrasing in data.get("phrasings", ())),
        )


def prf(tp: float, fp: float, fn: float) -> tuple[float, float, float]:
    """Precision, recall and F1 of counts; 0 where undefined."""
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def add_counts(rows: Sequence[Counts]) -> dict[str, float]:
    """The sum of `rows`, key by key."""
    total: defaultdict[str, float] = defaultdict(float)
    for counts in rows:
        for key, value in counts.items():
            total[key] += value
    return dict(total)


def _by_name(counts: Counts) -> dict[str, tuple[float, float, float]]:
    names = {key.split(":", 1)[1] for key in counts if key.startswith(("tp:", "fp:", "fn:"))}
    return {name: tuple(counts.get(f"{part}:{name}", 0.0) for part in ("tp", "fp", "fn")) for name in names}  # type: ignore[misc]


# ---- which task does a record belong to -----------------------------------------------------------------------


def wording(record: Record) -> str:
    """What in the record says which task it is: its question, or its instruction where there is none."""
    return record.question or record.instruction


def infer_tasks(records: Sequence[Record]) -> tuple[Task, ...]:
    """The tasks that `records` are made of, largest first, from their labels and question wordings alone.

    Rows with a `task` field are grouped by it; the others by the shape of their answer, and label rows further by
    which questions share labels. A few odd rows under another task's question are held to be mistakes in that
    task (the checks name them) rather than a task of their own.
    """
    groups: defaultdict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[_group_key(record)].append(record)
    kept = _without_mistakes(groups)
    tasks: list[Task] = []
    for key, members in sorted(kept.items(), key=lambda group: -len(group[1])):
        parts = [members] if key[0] == "declared" else _split_by_wording(key, members)
        for part in parts:
            name = key[1] if key[0] == "declared" else _free_name(_plain_name(key, part), tasks)
            tasks.append(_task(name, part))
    return tuple(tasks)


def assign_task(record: Record, tasks: Sequence[Task]) -> Task | Problem:
    """The task of `record` among `tasks`, or the problem that it cannot be told.

    In this order: the row's own `task` field, a question wording seen before, the only task whose form the target
    fits, the only task there is, the nearest known wording.
    """
    if record.task is not None:
        return _declared_task(record, tasks)
    known = [task for task in tasks if wording(record) in task.wordings]
    if len(known) == 1:
        return known[0]
    candidates = known or list(tasks)
    fitting = [task for task in candidates if record.target is not None and _fits(task, record)]
    structured = [task for task in fitting if task.kind != "text"]
    for choice in (structured, fitting, candidates):
        if len(choice) == 1:
            return choice[0]
    nearest = nearest_wording(record, candidates)
    if nearest is not None:
        return nearest
    return Problem(
        source=record.source,
        field="task",
        message=f"The question {wording(record)[:40]!r} fits none of the tasks {', '.join(t.name for t in tasks)}.",
        fix='Add a "task" field with one of these names to the row.',
    )


def nearest_wording(record: Record, tasks: Sequence[Task], *, least: float = 0.6) -> Task | None:
    """The task with the most similar question wording, None when none is at least `least` alike (0–1)."""
    scored = [
        (difflib.SequenceMatcher(None, wording(record), known).ratio(), task)
        for task in tasks
        for known in task.wordings
    ]
    best = max(scored, key=lambda pair: pair[0], default=None)
    return best[1] if best is not None and best[0] >= least else None


def _declared_task(record: Record, tasks: Sequence[Task]) -> Task | Problem:
    for task in tasks:
        if task.name == record.task:
            return task
    names = [task.name for task in tasks]
    near = difflib.get_close_matches(record.task or "", names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Use one of: {', '.join(names)}."
    return Problem(source=record.source, field="task", message=f"There is no task {record.task!r}.", fix=hint)


def _fits(task: Task, record: Record) -> bool:
    try:
        task.gold(record)
    except FormError:
        return False
    return True


def _value(record: Record) -> Answer:
    """The target as a value: parsed where it is a string of JSON."""
    if not isinstance(record.target, str):
        return record.target
    _, body, _ = split_fence(record.target)
    return record.target if body is None else loads(body)


_EMPTY = ("empty list",)
"""Key of rows answered by an empty list, which has no shape of its own until its question tells."""


def _group_key(record: Record) -> tuple[str, ...]:
    if record.task is not None:
        return ("declared", record.task)
    value = _value(record)
    if value == []:
        return _EMPTY
    shape, keys = shape_of(value)
    return (shape, *keys)


def _without_mistakes(groups: Mapping[tuple[str, ...], list[Record]]) -> dict[tuple[str, ...], list[Record]]:
    """`groups` less the small ones whose every question is asked, far more often, in one larger group.

    Empty lists join the lists that are asked with the same question, or else the largest group of lists.
    """
    owners: defaultdict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for key, members in groups.items():
        for record in members:
            if key != _EMPTY:
                owners[wording(record)][key] += 1
    kept: dict[tuple[str, ...], list[Record]] = {}
    for key, members in groups.items():
        homes = {owners[wording(record)].most_common(1)[0][0] for record in members if owners[wording(record)]}
        home = homes.pop() if len(homes) == 1 else key
        odd = home != key and len(members) <= max(1, SMALL_GROUP_SHARE * len(groups[home]))
        if key != _EMPTY and (key[0] == "declared" or not odd):
            kept[key] = list(members)
    lists = sorted((key for key in kept if key[0] in ("object list", "label list")), key=lambda key: -len(kept[key]))
    for record in groups.get(_EMPTY, ()):
        asked = [key for key in lists if key in owners[wording(record)]]
        home = next(iter([*asked, *lists]), ("label list",))
        kept.setdefault(home, []).append(record)
    return kept


def _split_by_wording(key: tuple[str, ...], members: list[Record]) -> list[list[Record]]:
    """Label rows asked with questions that share no label are different tasks; text rows may hide label tasks."""
    by_wording: defaultdict[str, list[Record]] = defaultdict(list)
    for record in members:
        by_wording[wording(record)].append(record)
    if key[0] not in ("label list", "text") or len(by_wording) * 3 > len(members):
        return [members]
    sets = {words: {label for record in rows for label in _labels(record)} for words, rows in by_wording.items()}
    if key[0] == "text":
        closed = {w for w, rows in by_wording.items() if is_closed_set([str(r.target) for r in rows])}
        free = [record for words, rows in by_wording.items() if words not in closed for record in rows]
        sets = {words: sets[words] for words in closed}
    else:
        free = []
    parts: list[tuple[set[str], list[Record]]] = []
    for words, label_set in sets.items():
        joined = [part for part in parts if part[0] & label_set]
        merged = (label_set.union(*(p[0] for p in joined)), [r for p in joined for r in p[1]] + by_wording[words])
        parts = [part for part in parts if not part[0] & label_set] + [merged]
    split = [rows for _, rows in parts] + ([free] if free else [])
    whole = all(is_closed_set([label for record in rows for label in _labels(record)]) for _, rows in parts)
    return sorted(split, key=len, reverse=True) if whole else [members]


def _labels(record: Record) -> list[str]:
    value = _value(record)
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _task(name: str, members: Sequence[Record]) -> Task:
    form = AnswerForm.infer([record.target for record in members], texts=[record.text for record in members])
    counted = Counter(wording(record) for record in members)
    repeated = [words for words, count in counted.most_common() if words and (count > 1 or len(counted) <= 20)]
    return Task(name=name, form=form, wordings=tuple(repeated[:MAX_WORDINGS]), phrasings=phrasings_of(members))


def _plain_name(key: tuple[str, ...], members: Sequence[Record]) -> str:
    if key[0] == "object list":
        return "triples" if {"subject", "object"} <= set(key[1:]) else "objects"
    if key[0] == "object":
        return "attributes"
    if key[0] == "label list":
        return "labels" if is_closed_set([label for record in members for label in _labels(record)]) else "strings"
    if is_closed_set([str(record.target) for record in members]):
        return "labels"
    return "text"


def _free_name(name: str, tasks: Sequence[Task]) -> str:
    taken = {task.name for task in tasks}
    numbered = (f"{name}-{number}" for number in range(2, len(tasks) + 3))
    return name if name not in taken else next(other for other in numbered if other not in taken)
