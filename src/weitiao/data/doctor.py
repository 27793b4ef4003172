"""The doctor of data: takes rows in one at a time and finds what would hurt training.

    doctor = Doctor()
    for record in records:
        doctor.add(record, side="train", task="topics", free=False)
    findings = doctor.finish()

It keeps hashes, lengths and places of rows, never rows, so a file of any size can be examined. It knows records only:
whether answers have their task's form is examined in tasks/answers.py, which yields findings of the same kind.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator

from ..errors import Problem
from .findings import Edit, Finding, by_grade, count_of
from .lengths import LengthCount, Lengths
from .placeholders import may_hold_placeholders
from .privacy import find_personal_data
from .record import Record
from .repeats import RepeatWatch, Side
from .texts import TextWatch, texts_of

_FAR_OUT = 20
"""A text counts as overlong from so many times the median length on …"""
_LONG_ENOUGH = 4000
"""… and so many characters."""
_MOSTLY = 0.9
"""Rows without text are conspicuous where so large a share of their task's rows has text."""


class Doctor:
    """Collects rows and bad rows; `finish` returns the findings, errors first."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._repeats = RepeatWatch()
        self._texts = TextWatch()
        self._rows = _RowWatch()

    def reject(self, problem: Problem) -> None:
        """Take in one problem of a row that cannot be read; a row may have several."""
        self._problems.append(problem)

    def add(self, record: Record, *, side: Side, task: str, free: bool) -> None:
        """Take in a row that was read.

        Args:
            record: the row.
            side: whether it is learnt from or scored on.
            task: name of its task; only rows of one task can be near-duplicates.
            free: its answer is free text, of which several may be right.
        """
        self._repeats.add(record, side=side, task=task, free=free)
        self._texts.add(record)
        self._rows.add(record, task=task)

    def finish(self) -> list[Finding]:
        """Everything found, errors first."""
        return by_grade(
            [*_bad_rows(self._problems), *self._repeats.finish(), *self._texts.finish(), *self._rows.finish()]
        )

    def lengths(self) -> tuple[Lengths, ...]:
        """Lengths in characters of inputs and answers; empty when no row was added."""
        described = (self._rows.inputs.describe(), self._rows.answers.describe())
        return tuple(lengths for lengths in described if lengths is not None)

    def personal_data(self) -> dict[str, int]:
        """How many pieces of personal data of each kind the rows hold."""
        return dict(self._rows.personal.most_common())


def _bad_rows(problems: list[Problem]) -> Iterator[Finding]:
    if problems:
        places = list(dict.fromkeys(problem.source for problem in problems))
        yield Finding(
            code="bad-row",
            grade="error",
            title=f"{count_of(len(places), 'row')} cannot be used",
            message="Every row must be read whole before training starts.",
            sources=tuple(problem.source for problem in problems),
            details=tuple(f"{problem.field}: {problem.message} Fix: {problem.fix}" for problem in problems),
            count=len(places),
            fix="Mend the rows as said for each of them; --fix writes a copy without them and lists them.",
            edits=tuple(Edit(source=place, action="drop", why="it cannot be used") for place in places),
        )


class _RowWatch:
    """What can be said of a row by itself: its lengths, personal data, parts that nothing uses."""

    def __init__(self) -> None:
        self.inputs, self.answers = LengthCount("characters", "input"), LengthCount("characters", "answer")
        self.personal: Counter[str] = Counter()
        self._sources: list[str] = []
        self._personal: dict[str, str] = {}
        self._left_out: dict[str, str] = {}
        self._unused: dict[str, list[str]] = {}
        self._task_rows: Counter[str] = Counter()
        self._without_text: defaultdict[str, list[str]] = defaultdict(list)
        self._not_nfc: dict[str, list[str]] = {}

    def add(self, record: Record, *, task: str) -> None:
        """Take in a row."""
        texts = texts_of(record)
        num_messages = len(record.messages)
        self._sources.append(record.source)
        self.inputs.add(sum(map(len, texts[:num_messages])))
        self.answers.add(sum(map(len, texts[num_messages:])))
        kinds = Counter(str(piece.kind) for text in dict.fromkeys(texts) for piece in find_personal_data(text))
        if kinds:
            self.personal += kinds
            self._personal[record.source] = ", ".join(f"{number} {_spelt(kind)}" for kind, number in kinds.items())
        if record.left_out:
            self._left_out[record.source] = record.left_out
        unused = unused_keys(record, texts)
        if unused:
            self._unused[record.source] = unused
        self._task_rows[task] += 1
        if record.text_span is not None and not record.text.strip():
            self._without_text[task].append(record.source)
        decomposed = [text for text in texts[num_messages:] if not unicodedata.is_normalized("NFC", text)]
        if decomposed:
            self._not_nfc[record.source] = decomposed

    def finish(self) -> Iterator[Finding]:
        """The findings of rows by themselves."""
        yield from self._overlong()
        yield from self._empty()
        if self._personal:
            kinds = ", ".join(f"{number:,} {_spelt(kind)}" for kind, number in self.personal.most_common())
            yield Finding(
                code="personal-data",
                grade="warning",
                title=f"{count_of(len(self._personal), 'row')} with personal data: {kinds}",
                message="A tuned model may repeat what it was trained on. What was found is not shown here.",
                sources=tuple(self._personal),
                details=tuple(self._personal.values()),
                count=len(self._personal),
                fix="Replace it by placeholders unless the people concerned agreed to its use.",
            )
        if self._left_out:
            phrases = ", ".join(f"{phrase} ({count:,})" for phrase, count in Counter(self._left_out.values()).items())
            yield Finding(
                code="left-out",
                grade="note",
                title=f"{count_of(len(self._left_out), 'row')} of which a part is not used: {phrases}",
                message="The rest of the row is learnt as usual.",
                sources=tuple(self._left_out),
                details=tuple(self._left_out.values()),
                count=len(self._left_out),
                fix="Complete the rows if that part matters.",
            )
        if self._not_nfc:
            yield Finding(
                code="not-nfc",
                grade="note",
                title=f"{count_of(len(self._not_nfc), 'answer')} not in Unicode's composed form (NFC)",
                message="Some tokenizers, Qwen's for one, compose characters as they read: such an answer can never be "
                "given exactly as it is labelled.",
                sources=tuple(self._not_nfc),
                count=len(self._not_nfc),
                fix="Write the answers in NFC; --fix does.",
                edits=tuple(
                    Edit(source=place, action="text", old=old, new=unicodedata.normalize("NFC", old), why="not-nfc")
                    for place, decomposed in self._not_nfc.items()
                    for old in decomposed
                ),
            )
        if self._unused:
            keys = Counter(key for found in self._unused.values() for key in found)
            told = ", ".join(f"{key} ({count:,})" for key, count in keys.most_common())
            yield Finding(
                code="unused-key",
                grade="note",
                title=f"{count_of(len(self._unused), 'row')} with keys that nothing uses: {told}",
                message="They are kept in the row and echoed in predictions, but the model never sees them.",
                sources=tuple(self._unused),
                details=tuple(", ".join(found) for found in self._unused.values()),
                count=len(self._unused),
                fix="Nothing, if that is meant; otherwise put their texts into the prompt.",
            )

    def _overlong(self) -> Iterator[Finding]:
        for counted, what in ((self.inputs, "input"), (self.answers, "answer")):
            lengths = counted.describe()
            limit = max(_LONG_ENOUGH, _FAR_OUT * lengths.median) if lengths else 0
            places = counted.over(limit) if lengths else []
            if lengths and places:
                yield Finding(
                    code=f"overlong-{what}",
                    grade="warning",
                    title=f"{count_of(len(places), what)} far longer than the others",
                    message=f"The median {what} has {lengths.median:,} characters, these more than {limit:,}: often "
                    "several rows run together, or a whole file pasted into one.",
                    sources=tuple(self._sources[place] for place in places),
                    details=tuple(f"{counted.value(place):,} characters" for place in places),
                    count=len(places),
                    fix="Split or shorten the rows.",
                )

    def _empty(self) -> Iterator[Finding]:
        places = [
            place
            for task, found in self._without_text.items()
            if len(found) <= (1 - _MOSTLY) * self._task_rows[task]
            for place in found
        ]
        if places:
            yield Finding(
                code="empty-text",
                grade="warning",
                title=f"{count_of(len(places), 'row')} with a question but no text to answer it from",
                message="The other rows of the task have one; without it the model learns to invent.",
                sources=tuple(places),
                count=len(places),
                fix="Add the text, or remove the row.",
            )


def unused_keys(record: Record, texts: list[str]) -> list[str]:
    """Keys of the row of whose values nothing is in the conversation, the answer, the tools or the task."""
    everything = "\n".join([*texts, repr(record.tools), record.task or ""])
    return [
        key
        for key, value in record.raw.items()
        if key != "task" and value not in (None, "", [], {}) and not _is_used(value, everything, record)
    ]


def _is_used(value: object, everything: str, record: Record) -> bool:
    if isinstance(value, str):
        filled = may_hold_placeholders(value)  # the conversation holds what the placeholders stand for
        return filled or value.strip() in everything or value in record.says
    if isinstance(value, dict):
        return not value or any(_is_used(inner, everything, record) for inner in (*value, *value.values()))
    if isinstance(value, list):
        return not value or any(_is_used(inner, everything, record) for inner in value)
    return value is record.target


def _spelt(kind: str) -> str:
    names = {"id_card": "identity card", "bank_card": "bank card", "email": "e-mail"}
    return names.get(kind, kind)
