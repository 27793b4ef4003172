"""The data of a recipe, read, split, understood and checked: what `check` shows and `train` starts from.

Brings rows, tasks and the recipe together; knows nothing of tokens or torch, so that it answers in a blink.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .data.checks import find_contradictions, find_leaks, find_repeats
from .data.mixture import Mixture, SourceRows, hold_out, read_mixture
from .data.options import ReadOptions
from .data.records import Record, digest_records
from .errors import DataError, Problem, RecipeError
from .recipe import Data, DeclaredTask, Recipe, Source
from .tasks.answers import find_misfit
from .tasks.base import Task, assign_task, infer_tasks
from .tasks.forms import AnswerForm, Field


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Rows with their tasks."""

    train: tuple[Record, ...]
    weights: tuple[float, ...]
    dev: tuple[Record, ...]
    tasks: tuple[Task, ...]
    train_tasks: tuple[Task, ...]
    """For each train row, its task."""
    dev_tasks: tuple[Task, ...]
    notes: tuple[str, ...]
    """What the user should know though nothing is wrong with it: repeats, rewritten answers, rare labels."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all rows, in order, train and dev apart."""
        return hashlib.sha256(f"{digest_records(self.train)}/{digest_records(self.dev)}".encode()).hexdigest()

    def count_rows(self) -> dict[str, tuple[int, int]]:
        """``{task: (train rows, dev rows)}``."""
        train = Counter(task.name for task in self.train_tasks)
        dev = Counter(task.name for task in self.dev_tasks)
        return {task.name: (train[task.name], dev[task.name]) for task in self.tasks}


def load_dataset(recipe: Recipe) -> Dataset:
    """The recipe's data, ready to train on.

    Raises:
        DataError: every row that cannot be used, every answer without its task's form, every contradiction and
            every dev row that is also trained on, all at once.
    """
    data = recipe.data
    mixture = read_mixture(
        [_source_rows(source, data) for source in data.train],
        [_source_rows(source, data) for source in data.dev],
        seed=recipe.train.seed,
    )
    return understand(mixture, recipe.tasks, held_out=0 if data.dev else data.held_out, seed=recipe.train.seed)


def _source_rows(source: Source, data: Data) -> SourceRows:
    return SourceRows(path=source.path, options=read_options(source, data), weight=source.weight, limit=source.limit)


def read_options(source: Source, data: Data) -> ReadOptions:
    """How the recipe says that the rows of one of its sources are to be read."""
    return ReadOptions(
        format=source.format,
        prompt=source.prompt,
        system=source.system,
        encoding=source.encoding,
        sheet=source.sheet,
        placeholders=data.placeholders,
    )


def understand(
    mixture: Mixture, declared: Sequence[DeclaredTask] = (), *, held_out: float = 0, seed: int = 0
) -> Dataset:
    """Find the tasks of the rows, set `held_out` of the train rows apart, and check every row.

    Raises DataError as `load_dataset`.
    """
    rows = [*mixture.train, *mixture.dev]
    tasks = merge_tasks(infer_tasks(rows), declared)
    problems: list[Problem] = []
    assigned: dict[int, Task] = {}
    rewritten: list[str] = []
    for record in rows:
        task = assign_task(record, tasks)
        if isinstance(task, Problem):
            problems.append(task)
            continue
        assigned[id(record)] = task
        written, misfit = find_misfit(record, task)
        if misfit is not None:
            problems.append(misfit)
        elif isinstance(record.target, str) and written != record.target:
            rewritten.append(record.source)
    for side in (mixture.train, mixture.dev):  # several replies to one input are right where they are free text
        problems += find_contradictions([r for r in side if id(r) in assigned and assigned[id(r)].kind != "text"])
    problems += find_leaks(mixture.train, mixture.dev)
    if problems:
        bad = len({problem.source for problem in problems})
        raise DataError(f"{bad} of {len(rows)} rows cannot be trained on as they are.", sorted(problems, key=_place))
    strata = [stratum(record, tasks) for record in mixture.train]
    apart = hold_out(mixture.train, strata, share=held_out, seed=seed)
    kept = [place for place in range(len(mixture.train)) if place not in apart]
    train = tuple(mixture.train[place] for place in kept)
    dev = (*mixture.dev, *(mixture.train[place] for place in sorted(apart)))
    return Dataset(
        train=train,
        weights=tuple(mixture.weights[place] for place in kept),
        dev=dev,
        tasks=tasks,
        train_tasks=tuple(assigned[id(record)] for record in train),
        dev_tasks=tuple(assigned[id(record)] for record in dev),
        notes=(*mixture.left_out, *_notes(train, dev, assigned, rewritten)),
    )


def stratum(record: Record, tasks: Sequence[Task]) -> str:
    """The kind of row that a split takes the same share of: its task, and its label where the labels are few."""
    task = assign_task(record, tasks)
    if isinstance(task, Problem):
        return ""
    labelled = bool(task.form.labels) and find_misfit(record, task)[1] is None
    return f"{task.name}\n{'|'.join(_labels(task, record))}" if labelled else task.name


def _place(problem: Problem) -> tuple[str, int]:
    path, _, line = problem.source.rpartition(":")
    number = line.removeprefix("row ").strip()
    return path, int(number) if number.isdigit() else 0


def _notes(
    train: Sequence[Record], dev: Sequence[Record], assigned: dict[int, Task], rewritten: Sequence[str]
) -> list[str]:
    notes = []
    for name, records in (("train", train), ("dev", dev)):
        repeats = find_repeats(records)
        if repeats:
            shown = "; ".join(f"{first} = {', '.join(others[:3])}" for first, others in repeats[:3])
            notes.append(f"{len(repeats)} {name} rows are given more than once: {shown}.")
    if rewritten:
        notes.append(
            f"{len(rewritten)} answers are spelled differently from the others of their task and will be trained in "
            f"the common spelling: {', '.join(rewritten[:5])}."
        )
    for task in {id(t): t for t in assigned.values()}.values():
        if task.form.labels:
            seen = Counter(label for r in train if assigned[id(r)] is task for label in _labels(task, r))
            unseen = [label for label in task.form.labels if not seen[label]]
            if unseen:
                notes.append(f"Labels of {task.name} that only dev rows have: {', '.join(unseen)}.")
    return notes


def _labels(task: Task, record: Record) -> list[str]:
    gold = task.gold(record)
    return gold if isinstance(gold, list) else [gold]


def merge_tasks(inferred: Sequence[Task], declared: Sequence[DeclaredTask]) -> tuple[Task, ...]:
    """The inferred tasks with those declared by hand in their place or added."""
    by_name = {task.name: task for task in inferred}
    for entry in declared:
        known = by_name.get(entry.name)
        by_name[entry.name] = Task(
            name=entry.name,
            form=_declared_form(entry, known.form if known is not None and known.form.shape == entry.shape else None),
            wordings=entry.wordings or (known.wordings if known is not None else ()),
        )
    return tuple(by_name.values())


def _declared_form(entry: DeclaredTask, known: AnswerForm | None) -> AnswerForm:
    """The form a user declared, resting on the inferred one for what was left out."""
    form = known or AnswerForm(shape=entry.shape)
    if entry.keys:
        fields = {field.key: field for field in form.fields}
        anything = "boolean|list|list of strings|null|number|object|string"
        form = replace(form, fields=tuple(fields.get(key, Field(key=key, kind=anything)) for key in entry.keys))
    if entry.labels:
        form = replace(form, labels=tuple(sorted(entry.labels)))
    if entry.fence is not None:
        fence = (f"```{entry.fence}\n", "\n```") if entry.fence else ("", "")
        form = replace(form, fence_open=fence[0], fence_close=fence[1])
    lacks_keys = entry.shape in ("object", "object list") and not form.fields
    if lacks_keys or (entry.shape in ("label", "label list") and not form.labels):
        missing = "keys" if lacks_keys else "labels"
        raise RecipeError(f"tasks: {entry.name} of shape {entry.shape!r} needs {missing}: list them in the recipe.")
    return form


def describe_wordings(task: Task, limit: int = 3) -> str:
    """A few of the questions by which the task is recognised, for people."""
    shown = [repr(words) for words in task.wordings[:limit]]
    more = len(task.wordings) - limit
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
