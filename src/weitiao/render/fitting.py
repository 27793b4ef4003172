"""The length policy: what happens to an example that is longer than the limit. Nothing is ever cut in silence.

The answer, its end token, the question and the chat template are always whole. Only the input text may be
shortened, and only when the user chose so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..data.records import Record
from ..errors import DataError, Problem
from ..messages import Message
from ..tasks.base import Task
from .base import Conversation, Example, Masks, Renderer, Turns

Overlong = Literal["error", "drop", "shorten_input"]


CHUNK_ROWS = 256
"""Rows rendered together: their texts are tokenised in one call. More would only crowd the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRows:
    """Examples within the limit, and what was done to get there."""

    examples: Sequence[Example]
    rows: Sequence[int]
    """For each example, the place of its record in the input. Only a conversation can make several examples."""
    records: Sequence[Record]
    """The records that were kept, the text shortened where it had to be."""
    kept: Sequence[int]
    """For each of `records`, its place in the input."""
    dropped: tuple[str, ...]
    """Sources of rows left out because they are too long (policy `drop`)."""
    shortened: tuple[str, ...]
    """Sources of rows whose input text was shortened (policy `shorten_input`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """How rows become examples."""

    renderer: Renderer
    """The model's chat format."""
    max_length: int
    """Limit in tokens, prompt and answer together."""
    overlong: Overlong
    """What to do with a longer row."""
    turns: Turns = "flagged"
    """Which replies of a conversation are learnt."""
    masks: Masks = "family"
    """Which of a learnt reply's tokens are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedChunk:
    """What became of some rows in a row; places are those in the whole input."""

    examples: list[Example] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """For each example, the place of its record."""
    dropped: dict[int, str] = field(default_factory=dict)
    """The places of rows left out, and where they come from."""
    shortened: dict[int, Record] = field(default_factory=dict)
    """The places of shortened rows, and what is left of them."""
    problems: list[Problem] = field(default_factory=list)


def fit_rows(
    records: Sequence[Record],
    tasks: Sequence[Task],
    renderer: Renderer,
    *,
    max_length: int,
    overlong: Overlong,
    turns: Turns = "flagged",
    masks: Masks = "family",
) -> FittedRows:
    """Training examples of `records`, none longer than `max_length` tokens; all in memory.

    Args:
        records: rows with targets that fit their task's form.
        tasks: for each record, its task.
        renderer: the model's chat format.
        max_length: limit in tokens, prompt and answer together.
        overlong: what to do with a longer row.
        turns: which replies of a conversation are learnt.
        masks: which of a learnt reply's tokens are.

    Raises:
        DataError: policy `error` and some rows are too long, or a row cannot be shortened; all of them are named.
    """
    how = Fitting(renderer=renderer, max_length=max_length, overlong=overlong, turns=turns, masks=masks)
    chunks = [
        fit_chunk(start, records[start : start + CHUNK_ROWS], tasks[start : start + CHUNK_ROWS], how)
        for start in range(0, len(records), CHUNK_ROWS)
    ]
    refuse_problems([problem for chunk in chunks for problem in chunk.problems], len(records), max_length)
    dropped = {place: source for chunk in chunks for place, source in chunk.dropped.items()}
    shortened = {place: record for chunk in chunks for place, record in chunk.shortened.items()}
    kept = tuple(place for place in range(len(records)) if place not in dropped)
    return FittedRows(
        examples=tuple(example for chunk in chunks for example in chunk.examples),
        rows=tuple(row for chunk in chunks for row in chunk.rows),
        records=tuple(shortened.get(place, records[place]) for place in kept),
        kept=kept,
        dropped=tuple(dropped.values()),
        shortened=tuple(record.source for record in shortened.values()),
    )


def fit_chunk(
    start: int, records: Iterable[Record], tasks: Sequence[Task], how: Fitting, *, as_written: Sequence[int] = ()
) -> FittedChunk:
    """The examples of `records`, of which the first stands at place `start` of the input; tokenised together.

    `as_written` says of each whether its target is known to be the text that its task makes of it; empty: of none.
    """
    rows = list(records)
    written: dict[tuple[int, str], str] = {}  # labels are written once for all the rows that have them
    talks = []
    for record, task, is_written in zip(rows, tasks, as_written or [False] * len(tasks), strict=True):
        answer = None
        if isinstance(record.target, str):
            answer = record.target if is_written else written.get((id(task), record.target))
        talk = conversation_of(record, task, answer)
        if isinstance(record.target, str) and not record.calls and task.form.labels:
            written[id(task), record.target] = talk.reply.text
        talks.append(talk)
    rendered = how.renderer.render_conversations(talks, turns=how.turns, masks=how.masks)
    chunk = FittedChunk()
    for place, (record, task, made) in enumerate(zip(rows, tasks, rendered, strict=True), start=start):
        examples = made
        longest = max(made, key=len)
        if len(longest) > how.max_length:
            if how.overlong == "drop":
                chunk.dropped[place] = record.source
                continue
            shorter = None
            if how.overlong == "shorten_input":
                num_answer = longest.num_answer
                shorter = shorten_record(record, how.renderer, num_answer=num_answer, max_length=how.max_length)
            if shorter is None:
                chunk.problems.append(_too_long(record, longest, how.max_length, how.overlong))
                continue
            chunk.shortened[place] = shorter
            examples = render_record(shorter, task, how.renderer, turns=how.turns, masks=how.masks)
        chunk.examples.extend(examples)
        chunk.rows.extend([place] * len(examples))
    return chunk


def refuse_problems(problems: Sequence[Problem], num_rows: int, max_length: int) -> None:
    """Return when no row is too long. Raises DataError that names those that are."""
    if problems:
        raise DataError(f"{len(problems)} of {num_rows} rows are longer than {max_length} tokens.", problems)


def render_record(
    record: Record, task: Task, renderer: Renderer, *, turns: Turns = "flagged", masks: Masks = "family"
) -> tuple[Example, ...]:
    """The training examples of one record, its answer written in the task's form; one example, as a rule."""
    return renderer.render_conversations([conversation_of(record, task)], turns=turns, masks=masks)[0]


def conversation_of(record: Record, task: Task, answer: str | None = None) -> Conversation:
    """The whole conversation of a record, its answer written in the task's form; `answer`, where that is known."""
    text = record.says if record.calls else answer if answer is not None else task.write_target(record)
    reply = Message(role="assistant", text=text, calls=record.calls)
    return Conversation(messages=record.messages, reply=reply, tools=record.tools)


def shorten_record(record: Record, renderer: Renderer, *, num_answer: int, max_length: int) -> Record | None:
    """`record` with as much of its input text, from the start, as leaves room for `num_answer` tokens.

    None when the text cannot be told apart from the rest, or when even one character of it is too much.
    """
    if record.text_span is None:
        return None

    def fits(length: int) -> bool:
        prompt = renderer.render_prompt(record.with_text(record.text[:length]).messages, record.tools)
        return len(prompt) + num_answer <= max_length

    low, high = 0, len(record.text)  # fits(low) is sought true, fits(high) is known false
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return record.with_text(record.text[:low]) if low > 0 and fits(low) else None


def _too_long(record: Record, example: Example, max_length: int, overlong: Overlong) -> Problem:
    num_prompt = len(example) - example.num_answer
    sizes = f"{len(example)} tokens: {num_prompt} of prompt, {example.num_answer} of answer; limit {max_length}."
    if overlong == "error":
        fix = (
            f"Set data.max_length={len(example)} or more, shorten the row, or choose data.overlong=drop "
            f"or data.overlong=shorten_input."
        )
    else:
        fix = f"Its text cannot be shortened enough: set data.max_length={len(example)} or more, or shorten the row."
    return Problem(
        source=record.source, field="target" if num_prompt < max_length / 2 else "text", message=sizes, fix=fix
    )
