"""Every row of a set seen once against the tasks: which is its own, whether its answer has the form, what repeats.

Keeps numbers and places, never rows, so that sets of any size can be reviewed. Knows records and tasks; no files, no
recipe, no tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..data.checks import SamePairs, SameRows, hash_input, hash_target, target_key
from ..data.record import Record
from ..data.record_store import is_on_disk, pack_parts
from ..data.records import digested_line
from ..data.workers import Workers
from ..errors import FormError, Problem
from .answers import find_misfit
from .base import Task, assign_task

_SHOWN = 40
_NO_TASK = 0xFFFF
_NO_KIND = 0xFFFFFFFF
_MOST_NAMED = 5
_MOST_SEEN = 10_000
"""Answers of labels that are remembered: there are few of them, and many rows have each."""


class Review:
    """What one pass over train and dev rows finds. Rows are counted through: train rows first, then dev rows."""

    def __init__(
        self, train: Sequence[Record], dev: Sequence[Record], tasks: Sequence[Task], *, workers: Workers | None = None
    ) -> None:
        """Look at every row; `workers` look at rows that lie on the disk, where there are any."""
        self._train, self._dev, self._tasks = train, dev, tuple(tasks)
        self._task_of = array("H")
        self._kind_of = array("I")
        self._kinds: dict[tuple[int, tuple[str, ...]], int] = {}
        self._same = SameRows()
        self.problems: list[Problem] = []
        """Of rows that belong to no task, or whose answer does not have its task's form."""
        self.misfits: list[int] = []
        """The places of these rows."""
        self.num_respelled = 0
        """Answers that are spelled otherwise than they will be learnt."""
        self.respelled: list[str] = []
        """The first of them."""
        self.as_written = bytearray()
        """For each row, whether its answer is text and learnt in these very words."""
        digests = (hashlib.sha256(), hashlib.sha256())
        for rows, in_dev in ((train, False), (dev, True)):
            look = partial(review_rows, self._tasks)
            on_disk = workers is not None and is_on_disk(rows)
            parts = pack_parts(rows)
            for found in workers.map(look, parts) if workers is not None and on_disk else map(look, parts):
                self._take_in(found, in_dev=in_dev)
                digests[in_dev].update(found.digested)
        self.digests = (digests[0].hexdigest(), digests[1].hexdigest())
        """What `digest_records` gives for the train and for the dev rows."""
        self.pairs: SamePairs = self._same.pairs()

    def _take_in(self, found: ReviewedRows, *, in_dev: bool) -> None:
        """Add what was found in the next rows."""
        self.misfits += [len(self) + place for place in found.misfits]
        self.problems += found.problems
        self.num_respelled += found.num_respelled
        self.respelled += found.respelled[: max(0, _MOST_NAMED - len(self.respelled))]
        self.as_written += found.as_written
        number_of = {own: self._kinds.setdefault(kind, len(self._kinds)) for kind, own in found.kinds.items()}
        number_of[_NO_KIND] = 0
        self._task_of.extend(found.task_of)
        self._kind_of.extend([number_of[own] for own in found.kind_of])
        self._same.extend(found.inputs, found.targets, dev=in_dev)

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

    def _is_free(self, place: int) -> bool:
        number = self._task_of[place]
        return number == _NO_TASK or self._tasks[number].kind == "text"


@dataclass(kw_only=True, slots=True)
class ReviewedRows:
    """What was found in some rows in a row; places are counted from the first of them."""

    task_of: array[int] = field(default_factory=lambda: array("H"))
    """For each row the number of its task."""
    kinds: dict[tuple[int, tuple[str, ...]], int] = field(default_factory=dict)
    """The numbers of the strata: of a task and the labels of a row."""
    kind_of: array[int] = field(default_factory=lambda: array("I"))
    """For each row the number of its stratum."""
    inputs: array[int] = field(default_factory=lambda: array("Q"))
    targets: array[int] = field(default_factory=lambda: array("Q"))
    """What `hash_input` and `hash_target` give for each row."""
    digested: bytes = b""
    """What the fingerprint is made of."""
    problems: list[Problem] = field(default_factory=list)
    misfits: list[int] = field(default_factory=list)
    num_respelled: int = 0
    respelled: list[str] = field(default_factory=list)
    as_written: bytearray = field(default_factory=bytearray)


def review_rows(tasks: Sequence[Task], records: Iterable[Record]) -> ReviewedRows:
    """What `Review` finds in some rows."""
    found = ReviewedRows()
    number_of = {id(task): number for number, task in enumerate(tasks)}
    seen: dict[tuple[int, str], tuple[tuple[str, ...], str]] = {}
    lines: list[bytes] = []
    for place, record in enumerate(records):
        found.inputs.append(hash_input(record))
        found.targets.append(hash_target(record))
        lines.append(digested_line(record))
        task = assign_task(record, tasks)
        if isinstance(task, Problem):
            found.problems.append(task)
            found.misfits.append(place)
            found.task_of.append(_NO_TASK)
            found.kind_of.append(_NO_KIND)
            found.as_written.append(False)
            continue
        number = number_of[id(task)]
        target = record.target if isinstance(record.target, str) else None
        known = seen.get((number, target)) if target is not None else None
        labels, written = known or _write_gold(record, task)
        if written is None:
            _, misfit = find_misfit(record, task)
            assert misfit is not None, "what cannot be written does not fit"
            found.problems.append(misfit)
            found.misfits.append(place)
        elif task.form.labels and target is not None and len(seen) < _MOST_SEEN:
            seen[number, target] = labels, written
        as_written = written is not None and written == target
        if written is not None and target is not None and not as_written:
            found.num_respelled += 1
            found.respelled += [record.source] if len(found.respelled) < _MOST_NAMED else []
        found.as_written.append(as_written)
        found.task_of.append(number)
        found.kind_of.append(found.kinds.setdefault((number, labels), len(found.kinds)))
    found.digested = b"".join(lines)
    return found


def _write_gold(record: Record, task: Task) -> tuple[tuple[str, ...], str | None]:
    """The labels of the record, and its answer as it will be learnt; None where it does not have the task's form."""
    try:
        gold = task.gold(record)
        written = task.form.write(gold)
    except FormError:
        return (), None
    if not task.form.labels:
        return (), written
    return tuple(gold) if isinstance(gold, list) else (gold,), written


def describe_stratum(task: Task, labels: Sequence[str]) -> str:
    """The name of a stratum: of a task, and of the labels of a row where the task's labels are few."""
    return f"{task.name}\n{'|'.join(labels)}" if task.form.labels else task.name


def _short(record: Record) -> str:
    return repr(target_key(record)[:_SHOWN])
