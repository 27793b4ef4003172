"""What is wrong with answers as answers of their task: form, spelling, copied values, labels that are out of balance.

`AnswerWatch` takes rows in one at a time, says which task each belongs to, and yields findings like the data's own
doctor (data/doctor.py). Knows records, tasks and forms; no files, no tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..data.findings import Edit, Finding, count_of
from ..data.records import Record
from ..data.texts import plain_text
from ..errors import FormError, Problem
from .base import Task, assign_task
from .copying import nearest_piece
from .forms import Answer, Field

Side = Literal["train", "dev"]

NEARLY_ALL = 0.9
"""Where so large a share of a key's values is copied from the text, the others are held to be slips."""
RARE = 5
"""A label with fewer train rows is hardly learnt."""
OUT_OF_BALANCE = 0.8
"""A label that so large a share of the rows has can be guessed without reading."""
_ENOUGH_TO_JUDGE = 50
"""Balance is judged from so many train rows on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelCount:
    """How many answers hold one label."""

    label: str
    train: int
    dev: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSummary:
    """A task as people look at it."""

    task: Task
    train: int
    dev: int
    labelled_by: str
    """What `labels` are: the key whose values they are, or empty for a task whose answers are labels."""
    labels: tuple[LabelCount, ...]
    """The most frequent first; empty for free text."""


def find_misfit(record: Record, task: Task) -> tuple[str, Problem | None]:
    """The answer as it will be learnt, or "" and the problem that it does not have the form of its task."""
    try:
        return task.write_target(record), None
    except FormError as error:
        return "", Problem(
            source=record.source,
            field="target",
            message=f"The answer does not have the form of the other {task.name} answers "
            f"({task.form.describe()[:120]}): {error}",
            fix="Mend the answer, or give the row another task in its task field.",
        )


class AnswerWatch:
    """Collects what is wrong with answers; `finish` returns the findings."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tuple(tasks)
        self._problems: dict[str, list[Problem]] = {"misfit": [], "unknown-task": []}
        self._respelled: list[Edit] = []
        self._copies: dict[str, list[str]] = {}
        self._copy_edits: list[Edit] = []
        self._rows: Counter[tuple[str, Side]] = Counter()
        self._labels: defaultdict[tuple[str, str], Counter[tuple[str, Side]]] = defaultdict(Counter)
        self._variants = {task.name: _variants(task.form.labels) for task in self._tasks}
        self._labelling = {task.name: _labelling_key(task) for task in self._tasks}
        self._with_variants: list[tuple[str, Answer, Answer, Task]] = []

    def add(self, record: Record, *, side: Side) -> Task | None:
        """Take in a row and return its task; None when the row belongs to none."""
        task = assign_task(record, self._tasks)
        if isinstance(task, Problem):
            self._problems["unknown-task"].append(task)
            return None
        written, problem = find_misfit(record, task)
        if problem is not None:
            self._problems["misfit"].append(problem)
            return task
        self._rows[task.name, side] += 1
        if isinstance(record.target, str) and written != record.target:
            self._respelled.append(
                Edit(source=record.source, action="answer", old=record.target, new=written, why="common spelling")
            )
        if task.form.shape == "text":
            return task
        answer = task.gold(record)
        self._count_labels(task, answer, side)
        self._check_copies(record, task, answer)
        if any(label in self._variants[task.name] for label in _labels_of(answer)):
            self._with_variants.append((record.source, record.target, answer, task))
        return task

    def finish(self) -> list[Finding]:
        """All findings about answers."""
        return [*self._errors(), *self._not_copied(), *self._label_variants(), *self._respellings(), *self._balance()]

    def summaries(self) -> tuple[TaskSummary, ...]:
        """The tasks with their rows and label counts, in the order of the tasks."""
        return tuple(
            TaskSummary(
                task=task,
                train=self._rows[task.name, "train"],
                dev=self._rows[task.name, "dev"],
                labelled_by=(key := self._labelling[task.name]) or "",
                labels=() if key is None else self._label_counts(task.name, key),
            )
            for task in self._tasks
        )

    # ---- collecting ----------------------------------------------------------------------------------------------

    def _count_labels(self, task: Task, answer: Answer, side: Side) -> None:
        if task.kind == "labels":
            self._labels[task.name, ""].update((label, side) for label in set(_labels_of(answer)))
            return
        for item in answer if isinstance(answer, list) else [answer]:
            for field in task.form.fields:
                if field.values:
                    self._labels[task.name, field.key].update((value, side) for value in _strings(item[field.key]))

    def _check_copies(self, record: Record, task: Task, answer: Answer) -> None:
        if task.kind != "extraction" or not record.text:
            return
        fields = [field for field in task.form.fields if _is_meant_copied(field)]
        details: list[str] = []
        certain: dict[str, str] = {}
        for item in answer if isinstance(answer, list) else [answer]:
            for field in fields:
                for value in _strings(item[field.key]):
                    if value in record.text or value == field.absent or not value:
                        continue
                    near = nearest_piece(value, record.text)
                    details.append(f"{field.key} {_quoted(value)}" + (f", near {_quoted(near.text)}" if near else ""))
                    if near is not None and near.certain:
                        certain[value] = near.text
        if details:
            self._copies[record.source] = list(dict.fromkeys(details))
        if certain:
            keys = {field.key for field in fields}
            mended = task.form.write(_replaced(answer, certain, keys))
            names = ", ".join(f"{_quoted(old)} → {_quoted(new)}" for old, new in certain.items())
            self._copy_edits.append(
                Edit(source=record.source, action="answer", old=record.target, new=mended, why=f"as in text: {names}")
            )

    # ---- findings ------------------------------------------------------------------------------------------------

    def _errors(self) -> Iterator[Finding]:
        titles = {
            "misfit": "whose answer does not have the form of the others",
            "unknown-task": "that belong to no known task",
        }
        for code, problems in self._problems.items():
            if problems:
                yield Finding(
                    code=code,
                    grade="error",
                    title=f"{count_of(len(problems), 'row')} {titles[code]}",
                    message="One form for all answers of a task is what lets a model learn it and a program read it.",
                    sources=tuple(problem.source for problem in problems),
                    details=tuple(problem.message for problem in problems),
                    count=len(problems),
                    fix=problems[0].fix,
                )

    def _not_copied(self) -> Iterator[Finding]:
        if self._copies:
            yield Finding(
                code="not-copied",
                grade="warning",
                title=f"{count_of(len(self._copies), 'answer')} with values that are not in the text",
                message="Nearly all other values of these keys are copied word for word; these teach inventing.",
                sources=tuple(self._copies),
                details=tuple("; ".join(details) for details in self._copies.values()),
                count=len(self._copies),
                fix="Write the values as the text does; --fix does where only one piece of the text can be meant.",
                edits=tuple(self._copy_edits),
            )

    def _label_variants(self) -> Iterator[Finding]:
        if not self._with_variants:
            return
        edits, details = [], []
        for source, target, answer, task in self._with_variants:
            counts: Counter[str] = Counter()
            for (label, _), number in self._labels[task.name, ""].items():
                counts[label] += number
            groups = self._variants[task.name]
            common = {
                label: max(groups[label], key=lambda one: (counts[one], one == one.strip(), one))
                for label in _labels_of(answer)
                if label in groups
            }
            changed = {label: new for label, new in common.items() if label != new}
            if changed:
                details.append(", ".join(f"{_quoted(old)} beside {_quoted(new)}" for old, new in changed.items()))
                new_answer = [common.get(one, one) for one in answer] if isinstance(answer, list) else common[answer]
                edits.append(
                    Edit(
                        source=source,
                        action="answer",
                        old=target,
                        new=task.form.write(new_answer),
                        why="the common spelling of the label",
                    )
                )
        if edits:
            yield Finding(
                code="label-variant",
                grade="warning",
                title=f"{count_of(len(edits), 'answer')} with another spelling of a label",
                message="Labels that differ in blanks, case or width alone are two to the model and to the score.",
                sources=tuple(edit.source for edit in edits),
                details=tuple(details),
                count=len(edits),
                fix="Write each label in one way; --fix takes the most frequent.",
                edits=tuple(edits),
            )

    def _respellings(self) -> Iterator[Finding]:
        if self._respelled:
            yield Finding(
                code="respelled",
                grade="note",
                title=f"{count_of(len(self._respelled), 'answer')} spelled differently from the others of the task",
                message="They are learnt in the common spelling: spaces and key order of JSON, blanks around labels.",
                sources=tuple(edit.source for edit in self._respelled),
                count=len(self._respelled),
                fix="Nothing; --fix writes them in the common spelling.",
                edits=tuple(self._respelled),
            )

    def _balance(self) -> Iterator[Finding]:
        for (task, key), _ in self._labels.items():
            counts = self._label_counts(task, key)
            what, things = (f"{key}", f"values of {key}") if key else ("label", "labels")
            unseen = [one for one in counts if not one.train]
            num_train = self._rows[task, "train"]
            if unseen and num_train:
                yield Finding(
                    code="dev-only-label",
                    grade="warning",
                    title=f"{count_of(len(unseen), what, things)} of the task {task} that only dev rows have: "
                    + ", ".join(one.label for one in unseen[:10]),
                    message="What no train row shows is not learnt; the dev rows count as any other in the score.",
                    count=len(unseen),
                    fix="Move some of these rows to the train file, or label more.",
                )
            rare = sorted((one for one in counts if 0 < one.train < RARE), key=lambda one: one.train)
            if key == self._labelling[task] and rare and num_train >= _ENOUGH_TO_JUDGE:
                names = ", ".join(f"{one.label} ({one.train})" for one in rare[:10])
                yield Finding(
                    code="rare-label",
                    grade="note",
                    title=f"{len(rare):,} of {len(counts):,} {things} of the task {task} are rarer than {RARE}",
                    message=f"Hardly learnt, and their scores are chance: {names}{' …' if len(rare) > 10 else ''}.",
                    count=len(rare),
                    fix="Label more rows with them, or join them with others.",
                )
            top = counts[0] if counts else None
            if not key and top and num_train >= _ENOUGH_TO_JUDGE and top.train >= OUT_OF_BALANCE * num_train:
                yield Finding(
                    code="unbalanced-labels",
                    grade="warning",
                    title=f"{top.train / num_train:.0%} of the train rows of {task} have the label {top.label}",
                    message="A model that always gives this label scores as much; read macro F1, not accuracy.",
                    count=top.train,
                    fix="Label more rows of the other labels, or give their file a weight in the recipe.",
                )

    def _label_counts(self, task: str, key: str) -> tuple[LabelCount, ...]:
        seen = self._labels[task, key] if (task, key) in self._labels else Counter[tuple[str, Side]]()
        labels = dict.fromkeys(label for label, _ in seen)
        counts = [LabelCount(label=label, train=seen[label, "train"], dev=seen[label, "dev"]) for label in labels]
        return tuple(sorted(counts, key=lambda one: (-one.train - one.dev, one.label)))


def _is_meant_copied(field: Field) -> bool:
    return NEARLY_ALL <= field.copied_share < 1


def _labelling_key(task: Task) -> str | None:
    """The key whose values sort the answers: "" when the answers are labels, None when there is no such key."""
    if task.kind == "labels":
        return ""
    closed = [field.key for field in task.form.fields if field.values]
    named = [key for key in closed if key in ("predicate", "relation", "type", "label")]
    return next(iter([*named, *closed]), None)


def _labels_of(answer: Answer) -> list[str]:
    if isinstance(answer, str):
        return [answer]
    return [item for item in answer if isinstance(item, str)] if isinstance(answer, list) else []


def _strings(value: Answer) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _variants(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each label that is spelled in several ways, all its spellings."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[plain_text(label)].append(label)
    return {label: tuple(group) for group in groups.values() if len(group) > 1 for label in group}


def _replaced(answer: Answer, pieces: Mapping[str, str], keys: set[str]) -> Answer:
    """`answer` with the values of `keys` replaced where `pieces` names them."""
    if isinstance(answer, list):
        return [_replaced(item, pieces, keys) for item in answer]
    return {key: _put(value, pieces) if key in keys else value for key, value in answer.items()}


def _put(value: Answer, pieces: Mapping[str, str]) -> Answer:
    if isinstance(value, list):
        return [_put(item, pieces) for item in value]
    return pieces.get(value, value) if isinstance(value, str) else value


def _quoted(text: str) -> str:
    return f'"{text if len(text) <= 40 else text[:39] + "…"}"'
