"""The length policy: what happens to an example that is longer than the limit. Nothing is ever cut in silence.

The answer, its end token, the question and the chat template are always whole. Only the input text may be
shortened, and only when the user chose so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..data.records import Record
from ..errors import DataError, Problem
from ..messages import Message
from ..tasks.base import Task
from .base import Example, Renderer, Turns

Overlong = Literal["error", "drop", "shorten_input"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRows:
    """Examples within the limit, and what was done to get there."""

    examples: tuple[Example, ...]
    rows: tuple[int, ...]
    """For each example, the place of its record in the input. Only a conversation can make several examples."""
    records: tuple[Record, ...]
    """The records that were kept, the text shortened where it had to be."""
    kept: tuple[int, ...]
    """For each of `records`, its place in the input."""
    dropped: tuple[str, ...]
    """Sources of rows left out because they are too long (policy `drop`)."""
    shortened: tuple[str, ...]
    """Sources of rows whose input text was shortened (policy `shorten_input`)."""


def fit_rows(
    records: Sequence[Record],
    tasks: Sequence[Task],
    renderer: Renderer,
    *,
    max_length: int,
    overlong: Overlong,
    turns: Turns = "flagged",
) -> FittedRows:
    """Training examples of `records`, none longer than `max_length` tokens.

    Args:
        records: rows with targets that fit their task's form.
        tasks: for each record, its task.
        renderer: the model's chat format.
        max_length: limit in tokens, prompt and answer together.
        overlong: what to do with a longer row.
        turns: which replies of a conversation are learnt.

    Raises:
        DataError: policy `error` and some rows are too long, or a row cannot be shortened; all of them are named.
    """
    examples: list[Example] = []
    rows, fitted, kept, dropped, shortened = [], [], [], [], []
    problems: list[Problem] = []
    for place, (record, task) in enumerate(zip(records, tasks, strict=True)):
        made = render_record(record, task, renderer, turns=turns)
        longest = max(made, key=len)
        if len(longest) > max_length:
            if overlong == "drop":
                dropped.append(record.source)
                continue
            shorter = None
            if overlong == "shorten_input":
                num_answer = longest.num_answer
                shorter = shorten_record(record, renderer, num_answer=num_answer, max_length=max_length)
            if shorter is None:
                problems.append(_too_long(record, longest, max_length, overlong))
                continue
            shortened.append(record.source)
            record = shorter
            made = render_record(record, task, renderer, turns=turns)
        examples += made
        rows += [place] * len(made)
        fitted.append(record)
        kept.append(place)
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} rows are longer than {max_length} tokens.", problems)
    return FittedRows(
        examples=tuple(examples),
        rows=tuple(rows),
        records=tuple(fitted),
        kept=tuple(kept),
        dropped=tuple(dropped),
        shortened=tuple(shortened),
    )


def render_record(record: Record, task: Task, renderer: Renderer, *, turns: Turns = "flagged") -> tuple[Example, ...]:
    """The training examples of one record, its answer written in the task's form; one example, as a rule."""
    reply = Message(
        role="assistant",
        text=record.says if record.calls else task.write_target(record),
        calls=record.calls,
    )
    return renderer.render_conversation(record.messages, reply, tools=record.tools, turns=turns)


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
