"""What a check found out, ready to be shown: on a terminal, as JSON or as a page.

Holds figures, findings and a few rows to look at, personal data masked; how they are found is check.py's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..data.findings import Finding
from ..data.lengths import Lengths
from ..data.privacy import find_personal_data
from ..data.records import Record
from ..tasks.answers import TaskSummary
from .plan import Plan

Side = Literal["train", "dev"]

_MASK = "▮▮▮"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """One file and its rows."""

    path: str
    side: Side
    accepted: int
    rejected: int
    formats: Mapping[str, int]
    """Rows of each recognised format."""

    @property
    def rows(self) -> int:
        """All rows of the file."""
        return self.accepted + self.rejected

    @property
    def complaint(self) -> str:
        """What to say of a file with bad rows."""
        return f"{self.path}: {self.rejected} of {self.rows} rows cannot be used."


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthLimit:
    """How many rows are longer than a limit."""

    limit: int
    over: int
    own: bool
    """Whether it is the recipe's or the user's, not one of the usual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """A row to look at, personal data masked."""

    source: str
    task: str
    input: str
    answer: str


def excerpt(record: Record, task: str) -> Excerpt:
    """The row to look at, personal data masked."""
    turns = record.messages
    shown = turns[-1].text if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.text}" for turn in turns)
    answer = record.target if isinstance(record.target, str) else json.dumps(record.target, ensure_ascii=False)
    return Excerpt(source=record.source, task=task, input=masked(shown), answer=masked(answer))


def masked(text: str) -> str:
    """`text` with every piece of personal data in it replaced by ▮▮▮."""
    for piece in reversed(find_personal_data(text)):
        text = text[: piece.start] + _MASK + text[piece.end :]
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkup:
    """Everything a check found out."""

    name: str
    """What was checked: the recipe's path, or the data files."""
    files: tuple[FileCheck, ...]
    train: int
    dev: int
    tasks: tuple[TaskSummary, ...]
    findings: tuple[Finding, ...]
    lengths: tuple[Lengths, ...]
    limits: tuple[LengthLimit, ...]
    limits_unit: str
    personal_data: Mapping[str, int]
    samples: tuple[Excerpt, ...]
    excerpts: Mapping[str, Excerpt]
    """By row, for the first rows of each finding."""
    tokenizer: str
    """Where the tokenizer was found; empty when lengths are in characters only."""
    next_command: str
    plan: Plan | None = None
    """What training takes; None where no model was named, or its tokenizer is not on this machine."""

    @property
    def rows(self) -> int:
        """All rows of all files: those accepted and those rejected."""
        return self.accepted + self.rejected

    @property
    def accepted(self) -> int:
        """Rows that were read."""
        return sum(file.accepted for file in self.files)

    @property
    def rejected(self) -> int:
        """Rows that cannot be used."""
        return sum(file.rejected for file in self.files)

    @property
    def ok(self) -> bool:
        """Whether training would accept the data: no finding is an error."""
        return not self.of_grade("error")

    @property
    def format(self) -> str:
        """The one format of all rows, or ``mixed``; empty when no row was read."""
        names = {name for file in self.files for name in file.formats}
        return "mixed" if len(names) > 1 else next(iter(names), "")

    def of_grade(self, grade: str) -> tuple[Finding, ...]:
        """The findings of one grade."""
        return tuple(finding for finding in self.findings if finding.grade == grade)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "ok": self.ok,
            "rows": self.rows,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "train": self.train,
            "dev": self.dev,
            "format": self.format,
            "files": [
                {
                    "path": file.path,
                    "side": file.side,
                    "rows": file.rows,
                    "accepted": file.accepted,
                    "rejected": file.rejected,
                    "formats": dict(file.formats),
                }
                for file in self.files
            ],
            "tasks": [_task_json(summary) for summary in self.tasks],
            "findings": [finding.to_json() for finding in self.findings],
            "lengths": [lengths.to_json() for lengths in self.lengths],
            "limits": [{"limit": one.limit, "over": one.over, "unit": self.limits_unit} for one in self.limits],
            "personal_data": dict(self.personal_data),
            "tokenizer": self.tokenizer,
            "plan": self.plan.to_json() if self.plan else None,
            "next": self.next_command,
        }


def _task_json(summary: TaskSummary) -> dict[str, Any]:
    return {
        "name": summary.task.name,
        "shape": summary.task.form.shape,
        "rows": summary.train + summary.dev,
        "train": summary.train,
        "dev": summary.dev,
        "form": summary.task.form.describe(),
        "labelled_by": summary.labelled_by,
        "labels": [{"label": one.label, "train": one.train, "dev": one.dev} for one in summary.labels],
    }
