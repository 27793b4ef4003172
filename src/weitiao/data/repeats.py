"""Rows that say the same: repeats, contradictions and dev rows that are trained on, exactly or nearly.

A row leaves behind two 64-bit hashes, a signature (near.py) and the first characters of its answer, never itself, so
that a million rows fit into memory. Inputs are equal when all their messages are, surrounding blanks aside.
"""

from __future__ import annotations

import sys
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from .checks import SameRows, target_key
from .findings import Edit, Finding, count_of
from .near import NearIndex, Pair, group
from .record import Record

Side = Literal["train", "dev"]

_SHOWN_ANSWER = 40


class RepeatWatch:
    """Takes rows in with `add`; `finish` tells which say the same."""

    def __init__(self) -> None:
        self._same = SameRows()
        self._free = array("B")
        self._sources: list[str] = []
        self._answers: list[str] = []
        self._near = NearIndex()

    def add(self, record: Record, *, side: Side, task: str, free: bool) -> None:
        """Take in a row. Only rows of one `task` are compared for nearness; `free` answers may differ rightly."""
        answer = target_key(record)
        self._same.add(record, dev=side == "dev")
        self._free.append(free)
        self._sources.append(record.source)
        self._answers.append(sys.intern(answer[:_SHOWN_ANSWER]))
        self._near.add(_compared_text(record), task)

    def finish(self) -> list[Finding]:
        """Findings `contradiction`, `several-answers`, `repeat`, `leak`, `near-repeat` and `near-leak`, where any."""
        pairs = self._same.pairs()
        return [
            *self._contradictions(pairs.contradictions),
            *self._repeats(pairs.repeats),
            *self._leaks(pairs.leaks),
            *self._near_findings(),
        ]

    def _contradictions(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Finding]:
        closed, free = ([pair for pair in pairs if bool(self._free[pair[0]]) is kind] for kind in (False, True))
        if closed:
            yield Finding(
                code="contradiction",
                grade="error",
                title=f"{count_of(len(closed), 'row')} answered otherwise than another row with the same input",
                message="No model can learn two answers to one input, and one of them is wrong.",
                sources=self._places(closed),
                details=tuple(
                    f"{self._answers[row]!r} answers the input of {self._sources[first]}, "
                    f"which is answered {self._answers[first]!r} there."
                    for row, first in closed
                ),
                count=len(closed),
                fix="Keep the right one of the two rows.",
            )
        if free:
            yield Finding(
                code="several-answers",
                grade="note",
                title=f"{count_of(len(free), 'row')} with another reply to an input that an earlier row replies to",
                message="Free texts may differ: the model learns all of the replies and gives one of them.",
                sources=self._places(free),
                details=tuple(f"Same input as {self._sources[first]}." for _, first in free),
                count=len(free),
                fix="Keep one reply of each input where the replies should be one.",
            )

    def _repeats(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Finding]:
        if pairs:
            yield Finding(
                code="repeat",
                grade="warning",
                title=f"{count_of(len(pairs), 'row')} given before, with the same answer",
                message="A repeated row weighs more than the others, and is scored more than once among dev rows.",
                sources=self._places(pairs),
                details=tuple(f"The same as {self._sources[first]}." for _, first in pairs),
                count=len(pairs),
                fix="Remove the repeats; to weigh a file, give it a weight in the recipe.",
                edits=tuple(
                    Edit(source=self._sources[row], action="drop", why=f"the same row as {self._sources[first]}")
                    for row, first in pairs
                ),
            )

    def _leaks(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Finding]:
        if pairs:
            trained = {self._sources[train]: self._sources[dev] for dev, train in reversed(pairs)}
            yield Finding(
                code="leak",
                grade="error",
                title=f"{count_of(len(pairs), 'dev row')} with an input that is trained on",
                message="Their score would show memory, not skill.",
                sources=self._places(pairs),
                details=tuple(
                    f"This dev row has the same input as the train row {self._sources[train]}." for _, train in pairs
                ),
                count=len(pairs),
                fix="Remove it from one of the two files.",
                edits=tuple(
                    Edit(source=train, action="drop", why=f"its input is that of the dev row {dev}")
                    for train, dev in trained.items()
                ),
            )

    def _near_findings(self) -> Iterator[Finding]:
        pairs = [pair for pair in self._near.pairs() if not self._same.same_input(pair.first, pair.second)]
        is_dev = self._same.is_dev
        across = [pair for pair in pairs if is_dev(pair.first) != is_dev(pair.second)]
        best: dict[int, tuple[float, int]] = {}
        for pair in across:
            dev, train = (pair.second, pair.first) if is_dev(pair.second) else (pair.first, pair.second)
            best[dev] = max(best.get(dev, (0.0, train)), (pair.similarity, train))
        if best:
            rows = sorted(best)
            yield Finding(
                code="near-leak",
                grade="warning",
                title=f"{count_of(len(rows), 'dev row')} nearly the same as a train row",
                message="Their score shows memory as much as skill.",
                sources=tuple(self._sources[row] for row in rows),
                details=tuple(self._likeness(best[row][0], best[row][1], row) for row in rows),
                count=len(rows),
                fix="Look at the pairs; remove the train rows, or move the dev rows to the train file.",
            )
        within = [pair for pair in pairs if is_dev(pair.first) == is_dev(pair.second)]
        groups = group(within)
        if groups:
            nearest: defaultdict[int, list[Pair]] = defaultdict(list)
            for pair in within:
                nearest[pair.second].append(pair)
            chosen = {row: max(found, key=lambda pair: pair.similarity) for row, found in sorted(nearest.items())}
            num_rows = sum(map(len, groups))
            yield Finding(
                code="near-repeat",
                grade="warning",
                title=f"{num_rows:,} rows in {count_of(len(groups), 'group')} of nearly the same text",
                message=f"The largest group has {max(map(len, groups)):,} rows. Near-repeats weigh more than the other "
                "rows; those with different answers are often labelled wrongly.",
                sources=tuple(self._sources[row] for row in chosen),
                details=tuple(self._likeness(pair.similarity, pair.first, row) for row, pair in chosen.items()),
                count=len(chosen),
                fix="Look at the pairs, the differently answered ones first, and keep one of each where they repeat.",
            )

    def _likeness(self, similarity: float, other: int, row: int) -> str:
        differs = not self._same.same_answer(other, row) and not self._free[row]
        share = f"{similarity:.0%} like" if similarity < 0.995 else "Almost the same as"
        return f"{share} {self._sources[other]}{', but answered differently' if differs else ''}."

    def _places(self, pairs: Sequence[tuple[int, int]]) -> tuple[str, ...]:
        return tuple(self._sources[row] for row, _ in pairs)


def _compared_text(record: Record) -> str:
    """The input text proper, or everything that was said after the system message where there were several turns."""
    turns = [message.text for message in record.messages if message.role != "system"]
    return record.text if len(turns) == 1 and record.text else "\n".join(turns)
