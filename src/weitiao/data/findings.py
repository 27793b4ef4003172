"""What the doctor finds: a `Finding` names the fault, its rows and its cure; an `Edit` is a cure a machine may apply.

Knows neither rows nor files; mend.py applies edits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Grade = Literal["error", "warning", "note"]
"""error: training refuses these rows. warning: training runs and will suffer. note: worth knowing."""

GRADES: tuple[Grade, ...] = ("error", "warning", "note")

_NUMBER_OF_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One change to one row that needs no judgement."""

    source: str
    """The row, such as ``train.jsonl:37``."""
    action: Literal["drop", "answer", "text"]
    """drop the row; set its whole answer to `new`; put `new` wherever its texts hold `old`."""
    why: str
    """The reason, for the list of what was done."""
    old: Any = None
    new: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One kind of fault and all the rows that have it."""

    code: str
    """A short name that never changes, such as ``near-repeat``."""
    grade: Grade
    title: str
    """The fault in a few words with its count: ``3 rows are given more than once``."""
    message: str
    """What it does to training, and the particulars."""
    sources: tuple[str, ...] = ()
    """The rows, in the order they were read."""
    details: tuple[str, ...] = ()
    """For each of `sources` what is wrong with that row; empty when the title says it all."""
    count: int = 0
    """How many rows, or how many things where `sources` is empty."""
    fix: str = ""
    """The edit or the command that mends it."""
    edits: tuple[Edit, ...] = ()
    """What ``--fix`` does about it; empty when it takes a person."""

    def __post_init__(self) -> None:
        assert not self.details or len(self.details) == len(self.sources), "a detail belongs to a row"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; edits only by their number."""
        return {
            "code": self.code,
            "grade": self.grade,
            "title": self.title,
            "message": self.message,
            "sources": list(self.sources),
            "details": list(self.details),
            "count": self.count,
            "fix": self.fix,
            "fixable": len(self.edits),
        }


def by_grade(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, errors first, then warnings, then notes; within a grade those with the most rows first."""
    return sorted(findings, key=lambda finding: (GRADES.index(finding.grade), -finding.count))


def count_of(number: int, thing: str, things: str | None = None) -> str:
    """``1 row``, ``3 rows``.

    >>> count_of(1, "row"), count_of(1200, "reply", "replies")
    ('1 row', '1,200 replies')
    """
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def first_few(sources: Iterable[str], limit: int = _NUMBER_OF_SHOWN) -> str:
    """The first places and how many more there are.

    >>> first_few(["a.jsonl:1", "a.jsonl:2", "a.jsonl:9"], limit=2)
    'a.jsonl:1, a.jsonl:2 and 1 more'
    """
    places = list(sources)
    more = len(places) - limit
    return ", ".join(places[:limit]) + (f" and {more:,} more" if more > 0 else "")
