"""Which labelled rows to show a model as examples of a task: few, short, unlike each other, all labels among them.

Knows rows, tasks and their answers; how an example is shown is the renderer's business.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log1p

from ..data.neighbours import searched_text
from ..data.record import Record
from ..data.texts import plain_text
from .base import Task
from .forms import Answer, AnswerForm

MOST_CANDIDATES = 500
"""Of more rows than this, so many are looked at, chosen by the seed."""
LONGEST_SHARE = 0.75
"""The longest quarter of the rows are no examples: they would take the room of several."""

_NUM_GRAM = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    record: Record
    shows: frozenset[tuple[str, ...]]
    """What its answer is an example of: labels, values of closed sets, absence, how many items there are."""
    grams: frozenset[str]
    length: int


def can_be_shown(record: Record) -> bool:
    """Whether a row can be an example, and be asked behind examples: one question, no tools."""
    asked = [message for message in record.messages if message.role != "system"]
    return len(asked) == 1 and asked[0].role == "user" and not (record.tools or record.calls)


def choose_shots(
    records: Sequence[Record], tasks: Sequence[Task], task: Task, k: int, *, seed: int = 0
) -> list[Record]:
    """Up to `k` of the rows of `task`, as examples; the first n of them are what ``k=n`` gives.

    Taken one by one: the row that shows most of what is not shown yet, by how common it is among the rows; of equals
    the one least like those taken, then the one nearest the usual length. When all is shown it starts again.

    Args:
        records: labelled rows, whose targets fit their tasks.
        tasks: for each of them, its task.
        task: the task to show.
        k: how many; fewer come back where the task has fewer rows that can be shown.
        seed: of the choice among many rows and among equals.
    """
    places = [place for place, mine in enumerate(tasks) if mine.name == task.name]
    rng = random.Random(f"shots/{seed}/{task.name}")
    drawn = rng.sample(places, min(len(places), MOST_CANDIDATES))
    rows = [record for record in map(records.__getitem__, drawn) if record.target is not None and can_be_shown(record)]
    left = _shortest([_candidate(record, task) for record in rows], least=k)
    common = Counter(item for candidate in left for item in candidate.shows)
    usual = sorted(candidate.length for candidate in left)[len(left) // 2] if left else 0
    chosen: list[_Candidate] = []
    shown: set[tuple[str, ...]] = set()
    while left and len(chosen) < k:
        if not any(candidate.shows - shown for candidate in left):
            shown.clear()
        best = max(left, key=lambda candidate: _worth(candidate, shown, common, chosen, usual))
        chosen.append(best)
        left.remove(best)
        shown |= best.shows
    return [candidate.record for candidate in chosen]


def _worth(
    candidate: _Candidate,
    shown: set[tuple[str, ...]],
    common: Mapping[tuple[str, ...], int],
    chosen: Sequence[_Candidate],
    usual: int,
) -> tuple[float, float, int]:
    new = sum(log1p(common[item]) for item in sorted(candidate.shows - shown))
    alike = max((_likeness(candidate.grams, other.grams) for other in chosen), default=0.0)
    return new, -alike, -abs(candidate.length - usual)


def _candidate(record: Record, task: Task) -> _Candidate:
    plain = plain_text(searched_text(record))
    return _Candidate(
        record=record,
        shows=frozenset(_what_it_shows(task.gold(record), task.form)),
        grams=frozenset(plain[at : at + _NUM_GRAM] for at in range(len(plain) - _NUM_GRAM + 1)),
        length=len(record.prompt) + len(task.write_target(record)),
    )


def _shortest(candidates: Sequence[_Candidate], *, least: int) -> list[_Candidate]:
    """`candidates` in their order less the longest quarter, but no fewer than `least`."""
    kept = max(min(least, len(candidates)), round(LONGEST_SHARE * len(candidates)))
    longest = sorted(candidate.length for candidate in candidates)[kept - 1] if candidates else 0
    return [candidate for candidate in candidates if candidate.length <= longest]


def _what_it_shows(answer: Answer, form: AnswerForm) -> list[tuple[str, ...]]:
    if form.shape in ("text", "json", "pattern", "grammar"):
        return []
    if form.shape == "label":
        return [("label", answer)]
    if form.shape == "label list":
        return [("label", label) for label in answer] or [("items", "0")]
    if form.shape == "string list":
        return [("items", str(min(len(answer), 2)))]
    objects = [answer] if form.shape == "object" else answer
    shown: list[tuple[str, ...]] = [("items", str(min(len(objects), 2)))]
    for item in objects:
        for field in form.fields:
            values = item[field.key] if isinstance(item[field.key], list) else [item[field.key]]
            shown.append((field.key, "absent" if field.absent in values or not values else "there"))
            if field.values and not field.copied:
                shown += [(field.key, "value", str(value)) for value in values]
    return shown


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one or other else 0.0
