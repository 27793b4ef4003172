"""Every row of a set seen once against the tasks: which is its own, whether its answer has the form, what repeats.

Keeps numbers and places, never rows, so that sets of any size can be reviewed. Knows records and tasks; no files, no
recipe, no tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from ..data.checks import SamePairs, SameRows, target_key
from ..data.record import Record
from ..data.records import digested_line
from ..errors import FormError, Problem
from .answers import find_misfit
from .base import Task, assign_task

_SHOWN = 40
_NO_TASK = 0xFFFF
_MOST_SEEN = 10_000
"""Answers of labels that are remembered: there are few of them, and many rows have each."""


class Review:
    """What one pass over train and dev rows finds. Rows are counted through: train rows first, then dev rows."""

    def __init__(self, train: Sequence[Record], dev: Sequence[Record], tasks: Sequence[Task]) -> None:
        self._train, self._dev, self._tasks = train, dev, tuple(tasks)
        self._task_of = array("H")
        self._kind_of = array("I")
        self._kinds: dict[tuple[int, tuple[str, ...]], int] = {}
        self._seen: dict[tuple[int, str | None], tuple[tuple[str, ...], str | None]] = {}
        self._number = {id(task): number for number, task in enumerate(self._tasks)}
        self._same = SameRows()
        self.problems: list[Problem] = []
        """Of rows that belong to no task, or whose answer does not have its task's form."""
        self.misfits: list[int] = []
        """The places of these rows."""
        self.num_respelled = 0
        """Answers that are spelled otherwise than they will be learnt."""
        self.respelled: list[str] = []
        """The first of them."""
        digests = (hashlib.sha256(), hashlib.sha256())
        for place, record in enumerate(chain(train, dev)):
            in_dev = place >= len(train)
            self._same.add(record, dev=in_dev)
            digests[in_dev].update(digested_line(record))
            self._look_at(place, record)
        self.digests = (digests[0].hexdigest(), digests[1].hexdigest())
        """What `digest_records` gives for the train and for the dev rows."""
        self.pairs: SamePairs = self._same.pairs()

    def __len__(self) -> int:
        return len(self._task_of)

    def row(self, place: int) -> Record:
        """The row at `place`."""
        num_train = len(self._train)
        return self._train[place] if place < num_train else self._dev[place - num_train]

    def task(self, place: int) -> Task:
        """The task of the row at `place`, which must have one."""
        return self._tasks[self._task_of[place]]

    def strata(self, count: int) -> list[str]:
        """The strata of the first `count` rows."""
        names = [describe_stratum(self._tasks[number], labels) for number, labels in self._kinds]
        return [names[kind] for kind in self._kind_of[:count]]

    def contradictions(self) -> Iterator[Problem]:
        """Rows with one input and different answers, free texts aside: no model can learn both."""
        for place, before in self.pairs.contradictions:
            if any(self._is_free(each) for each in (place, before)):
                continue
            record, known = self.row(place), self.row(before)
            yield Problem(
                source=record.source,
                field="target",
                message=f"{_short(record)} answers the input of {known.source}, "
                f"which is answered {_short(known)} there.",
                fix="Keep the right one of the two rows.",
            )

    def leaks(self) -> Iterator[Problem]:
        """Dev rows whose input is trained on: their score would show memory, not skill."""
        for place, trained in self.pairs.leaks:
            yield Problem(
                source=self.row(place).source,
                field="row",
                message=f"This dev row has the same input as the train row {self.row(trained).source}.",
                fix="Remove it from one of the two files.",
            )

    def notes(self, in_dev: Collection[int]) -> list[str]:
        """What the user should know though nothing is wrong with it; the rows at `in_dev` are scored on."""
        notes = []
        repeats: defaultdict[int, list[int]] = defaultdict(list)
        for place, before in self.pairs.repeats:
            repeats[before].append(place)
        for name, side in (("train", False), ("dev", True)):
            groups = [(first, repeats[first]) for first in sorted(repeats) if (first in in_dev) is side]
            if groups:
                shown = "; ".join(
                    f"{self.row(first).source} = {', '.join(self.row(place).source for place in others[:3])}"
                    for first, others in groups[:3]
                )
                notes.append(f"{len(groups)} {name} rows are given more than once: {shown}.")
        if self.num_respelled:
            notes.append(
                f"{self.num_respelled} answers are spelled differently from the others of their task and will be "
                f"trained in the common spelling: {', '.join(self.respelled)}."
            )
        trained: defaultdict[int, set[str]] = defaultdict(set)
        kinds = list(self._kinds)
        for kind in Counter(self._kind_of[place] for place in range(len(self)) if place not in in_dev):
            number, labels = kinds[kind]
            trained[number].update(labels)
        for number in dict.fromkeys(self._task_of):
            task = self._tasks[number]
            unseen = [label for label in task.form.labels if label not in trained[number]]
            if unseen:
                notes.append(f"Labels of {task.name} that only dev rows have: {', '.join(unseen)}.")
        return notes

    # ---- one row -------------------------------------------------------------------------------------------------

    def _look_at(self, place: int, record: Record) -> None:
        task = assign_task(record, self._tasks)
        if isinstance(task, Problem):
            self._refuse(place, task)
            self._task_of.append(_NO_TASK)
            self._kind_of.append(0)
            return
        number = self._number[id(task)]
        target = record.target if isinstance(record.target, str) else None
        labels, written = self._seen.get((number, target), ((), None))
        if written is None:
            try:
                gold = task.gold(record)
                written = task.form.write(gold)
            except FormError:
                _, misfit = find_misfit(record, task)
                assert misfit is not None, "what cannot be written does not fit"
                self._refuse(place, misfit)
            else:
                if task.form.labels:
                    labels = tuple(gold) if isinstance(gold, list) else (gold,)
                    if target is not None and len(self._seen) < _MOST_SEEN:
                        self._seen[number, target] = labels, written
        if written is not None and target is not None and written != target:
            self.num_respelled += 1
            self.respelled += [record.source] if len(self.respelled) < 5 else []
        self._task_of.append(number)
        self._kind_of.append(self._kinds.setdefault((number, labels), len(self._kinds)))

    def _refuse(self, place: int, problem: Problem) -> None:
        self.problems.append(problem)
        self.misfits.append(place)

    def _is_free(self, place: int) -> bool:
        number = self._task_of[place]
        return number == _NO_TASK or self._tasks[number].kind == "text"


def describe_stratum(task: Task, labels: Sequence[str]) -> str:
    """The name of a stratum: of a task, and of the labels of a row where the task's labels are few."""
    return f"{task.name}\n{'|'.join(labels)}" if task.form.labels else task.name


def _short(record: Record) -> str:
    return repr(target_key(record)[:_SHOWN])
