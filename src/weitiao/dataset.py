"""The data of a recipe, read, split, understood and checked: what `check` shows and `train` starts from.

Brings rows, tasks and the recipe together; knows nothing of tokens or torch, so that it answers in a blink.
"""

from __future__ import annotations

import gc
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .cache import cache_folder
from .data.mixture import Mixture, SourceRows, choose_share, hold_out, read_mixture
from .data.options import ReadOptions
from .data.record_store import select_rows
from .data.records import Record, digest_records
from .data.workers import Workers
from .errors import DataError, Problem
from .recipe import Data, DeclaredTask, Recipe, Source
from .tasks.answers import find_misfit
from .tasks.base import Task, assign_task, infer_tasks
from .tasks.declared import declared_form
from .tasks.forms import AnswerForm
from .tasks.review import Review, describe_stratum

SAMPLED_ROWS = 20_000
"""Of more rows than this, the tasks are inferred from so many, and from those that do not fit what was inferred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Rows with their tasks."""

    train: Sequence[Record]
    """A tuple of few rows; many are read from the disk, one whenever it is asked for. `dev` too."""
    weights: tuple[float, ...]
    dev: Sequence[Record]
    tasks: tuple[Task, ...]
    train_tasks: tuple[Task, ...]
    """For each train row, its task."""
    dev_tasks: tuple[Task, ...]
    notes: tuple[str, ...]
    """What the user should know though nothing is wrong with it: repeats, rewritten answers, rare labels."""

    fingerprint: str
    """SHA-256 over all rows, in order, train and dev apart."""

    train_as_written: Sequence[int] = ()
    """For each train row 1 where its answer is text and learnt in these very words, else 0; empty: not known."""
    dev_as_written: Sequence[int] = ()

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
    with _without_collecting(), Workers() as workers:
        mixture = read_mixture(
            [_source_rows(source, data) for source in data.train],
            [_source_rows(source, data) for source in data.dev],
            seed=recipe.rows_seed,
            folder=cache_folder() / "rows",
            workers=workers,
        )
        held_out = 0 if data.dev else data.held_out
        return understand(
            mixture,
            recipe.tasks,
            held_out=held_out,
            seed=recipe.rows_seed,
            share=data.share,
            share_seed=recipe.train.seed,
            workers=workers,
        )


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Rows refer to nothing that refers to them; looking for such circles among many took a seventh of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


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
    mixture: Mixture,
    declared: Sequence[DeclaredTask] = (),
    *,
    held_out: float = 0,
    seed: int = 0,
    share: float = 1.0,
    share_seed: int = 0,
    workers: Workers | None = None,
) -> Dataset:
    """Find the tasks of the rows, set `held_out` of the train rows apart, and check every row; many rows in `workers`.

    Of the train rows that are left only `share` are learnt, chosen by `share_seed`.

    Raises DataError as `load_dataset`.
    """
    num_rows, num_train = len(mixture.train) + len(mixture.dev), len(mixture.train)
    tasks = merge_tasks(infer_tasks(_sample(mixture, seed)), declared)
    review = Review(mixture.train, mixture.dev, tasks, workers=workers)
    if review.misfits and num_rows > SAMPLED_ROWS:  # what the sample did not show may be common enough to be a form
        odd = [review.row(place) for place in review.misfits[:SAMPLED_ROWS]]
        tasks = merge_tasks(infer_tasks([*_sample(mixture, seed), *odd]), declared)
        review = Review(mixture.train, mixture.dev, tasks, workers=workers)
    problems = [*review.problems, *review.contradictions(), *review.leaks()]
    if problems:
        bad = len({problem.source for problem in problems})
        raise DataError(f"{bad} of {num_rows} rows cannot be trained on as they are.", sorted(problems, key=_place))
    apart = hold_out(mixture.train, review.strata(num_train), share=held_out, seed=seed)
    kept = [place for place in range(num_train) if place not in apart] if apart else range(num_train)
    share_notes = []
    if share < 1:
        strata = review.strata(num_train)
        learnable = list(kept)
        chosen = choose_share([strata[place] for place in learnable], share=share, seed=share_seed)
        kept = [learnable[place] for place in chosen]
        share_notes = [f"{len(kept):,} of {len(learnable):,} train rows are learnt (data.share: {share:g})."]
    train = select_rows(mixture.train, kept)
    held = select_rows(mixture.train, sorted(apart)) if apart else ()
    dev = (*mixture.dev, *held) if mixture.dev and held else mixture.dev or held
    in_dev = (*range(num_train, num_rows), *sorted(apart))
    digests = (digest_records(train), digest_records(dev)) if apart or share < 1 else review.digests
    return Dataset(
        train=train,
        weights=tuple(mixture.weights[place] for place in kept),
        dev=dev,
        tasks=tasks,
        train_tasks=tuple(map(review.task, kept)),
        dev_tasks=tuple(map(review.task, in_dev)),
        notes=(*mixture.left_out, *share_notes, *review.notes(frozenset(in_dev))),
        fingerprint=hashlib.sha256("/".join(digests).encode()).hexdigest(),
        train_as_written=bytes(map(review.as_written.__getitem__, kept)),
        dev_as_written=bytes(map(review.as_written.__getitem__, in_dev)),
    )


def _sample(mixture: Mixture, seed: int) -> list[Record]:
    """The rows that the tasks are inferred from: all, or `SAMPLED_ROWS` of many, in order, chosen by the seed."""
    num_train, num_rows = len(mixture.train), len(mixture.train) + len(mixture.dev)
    chosen = sorted(random.Random(f"sample/{seed}").sample(range(num_rows), min(SAMPLED_ROWS, num_rows)))
    return [mixture.train[place] if place < num_train else mixture.dev[place - num_train] for place in chosen]


def stratum(record: Record, tasks: Sequence[Task]) -> str:
    """The kind of row that a split takes the same share of: its task, and its label where the labels are few."""
    task = assign_task(record, tasks)
    if isinstance(task, Problem):
        return ""
    if not task.form.labels or find_misfit(record, task)[1] is not None:
        return task.name
    gold = task.gold(record)
    return describe_stratum(task, gold if isinstance(gold, list) else [gold])


def assign_tasks(records: Sequence[Record], tasks: Sequence[Task]) -> list[Task]:
    """The task of every record among `tasks`. Raises DataError naming every record that fits none."""
    found = [assign_task(record, tasks) for record in records]
    problems = [task for task in found if isinstance(task, Problem)]
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} rows fit none of the tasks.", problems)
    return [task for task in found if isinstance(task, Task)]


def _place(problem: Problem) -> tuple[str, int]:
    path, _, line = problem.source.rpartition(":")
    number = line.removeprefix("row ").strip()
    return path, int(number) if number.isdigit() else 0


def merge_tasks(inferred: Sequence[Task], declared: Sequence[DeclaredTask]) -> tuple[Task, ...]:
    """The inferred tasks with those declared by hand in their place or added."""
    by_name = {task.name: task for task in inferred}
    for entry in declared:
        known = by_name.get(entry.name)
        by_name[entry.name] = Task(
            name=entry.name,
            form=_declared_form(entry, None if known is None else known.form),
            wordings=entry.wordings or (known.wordings if known is not None else ()),
            phrasings=known.phrasings if known is not None else (),
        )
    return tuple(by_name.values())


def _declared_form(entry: DeclaredTask, known: AnswerForm | None) -> AnswerForm:
    """The form a user declared, resting on the inferred one for what was left out."""
    return declared_form(
        entry.name,
        known,
        shape=entry.shape,
        keys=entry.keys,
        labels=entry.labels,
        json_schema=entry.json_schema,
        regex=entry.regex,
        lark=entry.lark,
        fence=entry.fence,
        min_items=entry.min_items,
        max_items=entry.max_items,
        ground=entry.ground,
    )


def describe_wordings(task: Task, limit: int = 3) -> str:
    """A few of the questions by which the task is recognised, for people."""
    shown = [repr(words) for words in task.wordings[:limit]]
    more = len(task.wordings) - limit
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
