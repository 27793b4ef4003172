"""A row as a file gives it, and how many of them there were: what every kind of file is read into.

Knows no kind of file and no format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weitiao.data.json_values import find_odd_values, printable
from weitiao.data.placeholders import may_hold_placeholders
from weitiao.errors import Problem


@dataclass(kw_only=True, slots=True)  # not frozen: a million of them are made, and a frozen one takes thrice as long
class RawRow:
    """One row of a file: its value, or why there is none."""

    source: str
    """Where it stands, such as ``rows.jsonl:37``."""
    value: Any = None
    problems: tuple[Problem, ...] = ()
    """What is wrong with it before anyone asks for its format."""
    readable: bool = True
    """False where there is no value, only problems."""
    marked: bool = False
    """Whether one of its texts may hold a placeholder."""
    text: str | None = None
    """The JSON that the value was read from, where it was read from JSON."""


@dataclass(kw_only=True, slots=True)
class RowCount:
    """How many rows there were and what became of them."""

    read: int = 0
    """Counted where the bytes are cut into rows."""
    accepted: int = 0
    """Counted where records are handed out."""
    rejected: int = 0
    """Counted where problems are handed out: rows, not problems."""

    def add(self, other: RowCount) -> None:
        """Count the rows of another part of the same source as well."""
        self.read += other.read
        self.accepted += other.accepted
        self.rejected += other.rejected

    def check(self) -> None:
        """Assert that no row was lost on the way: this is a promise to the user, and a bug of ours if broken."""
        assert self.read == self.accepted + self.rejected, (
            f"of {self.read} rows read, {self.accepted} were accepted and {self.rejected} reported"
        )


def unreadable(problem: Problem) -> RawRow:
    return RawRow(source=problem.source, problems=(problem,), readable=False)


def row_of_values(value: dict[str, Any], source: str, problems: tuple[Problem, ...] = ()) -> RawRow:
    """The row of a table, whose values came by another way than JSON text and so are all looked at."""
    problems += tuple(find_odd_values(value, source))
    return RawRow(source=source, value=value, problems=problems, marked=any(map(may_hold_placeholders, _texts(value))))


def repeated_keys(keys: list[str], source: str) -> tuple[Problem, ...]:
    return tuple(
        Problem(source=source, field=printable(key), message="stands twice in one object.", fix="Keep one.")
        for key in dict.fromkeys(keys)
    )


def _texts(value: object) -> Iterator[str]:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
