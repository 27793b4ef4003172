"""What is wrong with a set of rows as data: contradictions, repeats, and scoring rows that were trained on.

Knows records only; whether answers have their task's form is checked where forms are known.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from ..errors import Problem
from .records import Record

InputKey = tuple[tuple[str, ...], ...]


def input_key(record: Record) -> InputKey:
    """What makes two rows the same question: every message, surrounding blanks aside, and the tools on offer."""
    turns = tuple(
        (message.role, message.text.strip(), *(_written([call.name, call.arguments]) for call in message.calls))
        for message in record.messages
    )
    return (*turns, ("tools", *map(_written, record.tools))) if record.tools else turns


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def target_key(record: Record) -> str:
    """What makes two answers the same, surrounding blanks aside."""
    return (
        json.dumps(record.target, ensure_ascii=False) if not isinstance(record.target, str) else record.target.strip()
    )


def find_contradictions(records: Sequence[Record]) -> list[Problem]:
    """Rows with one input and different answers: no model can learn both."""
    first: dict[InputKey, Record] = {}
    problems = []
    for record in records:
        known = first.setdefault(input_key(record), record)
        if known is not record and target_key(known) != target_key(record):
            problems.append(
                Problem(
                    source=record.source,
                    field="target",
                    message=f"{_short(record)} answers the input of {known.source}, "
                    f"which is answered {_short(known)} there.",
                    fix="Keep the right one of the two rows.",
                )
            )
    return problems


def find_repeats(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Rows given more than once with one answer: ``(first source, the other sources)``."""
    sources: defaultdict[tuple[object, str], list[str]] = defaultdict(list)
    for record in records:
        sources[input_key(record), target_key(record)].append(record.source)
    return [(found[0], found[1:]) for found in sources.values() if len(found) > 1]


def find_leaks(train: Sequence[Record], dev: Sequence[Record]) -> list[Problem]:
    """Scoring rows whose input is trained on: their score would show memory, not skill."""
    trained = {input_key(record): record.source for record in reversed(train)}
    return [
        Problem(
            source=record.source,
            field="row",
            message=f"This dev row has the same input as the train row {trained[input_key(record)]}.",
            fix="Remove it from one of the two files.",
        )
        for record in dev
        if input_key(record) in trained
    ]


def _short(record: Record) -> str:
    return repr(target_key(record)[:40])
