"""Examples in front of a question: labelled rows as earlier turns, for models never tuned and for those that look up.

    system        what the row's own system message says, then what an answer looks like (where it is described)
    user          an example's question                      ┐ once for each example, the most telling one last
    assistant     its answer, in exactly the labelled form   ┘ never learnt
    user          the row's question, as it is

Where there is no system message, the description opens the first question: many chat formats know no system role.
A model without a chat template sees the turns as its renderer tells any conversation (template.py). `Record.text`
stays the row's own text, so that values are still copied from there and not out of an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..data.neighbours import NeighbourIndex, searched_text, texts_alike
from ..data.records import Record
from ..messages import Message
from ..tasks.asking import describe_answer, language_of
from ..tasks.base import Task
from ..tasks.choosing import can_be_shown
from .base import Renderer

_NAMED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotRows:
    """Rows with examples before their questions, and what could not be shown."""

    records: list[Record]
    """The rows in their order, ready to be asked or learnt from."""
    num_asked: int
    """How many examples each row was to have."""
    left_out: Mapping[str, int]
    """For each row whose examples did not all fit into the room, by its source, how many were left out."""
    fewer: tuple[str, ...]
    """Sources of rows for which too few examples were found."""
    alone: tuple[str, ...]
    """Sources of rows that are asked without examples: conversations of several turns, or with tools."""

    def notes(self) -> list[str]:
        """A sentence for each thing that not every row got, for the user; empty when every row got all."""
        said = []
        if self.left_out:
            count = sum(self.left_out.values())
            said.append(f"{count} examples left out of {len(self.left_out)} prompts they did not fit into: "
                        f"{_named(list(self.left_out))}")  # fmt: skip
        if self.fewer:
            said.append(f"{len(self.fewer)} rows with fewer than {self.num_asked} examples, for lack of rows to show: "
                        f"{_named(self.fewer)}")  # fmt: skip
        if self.alone:
            said.append(f"{len(self.alone)} rows asked without examples, being conversations of several turns or with "
                        f"tools: {_named(self.alone)}")  # fmt: skip
        return said


def ask(record: Record, task: Task, shots: Sequence[Record] = ()) -> tuple[Message, ...]:
    """What a model that was never tuned is asked: the form described, `shots` answered, then the row's question.

    Raises ValueError when there are shots but the row, or one of them, is no single question (`can_be_shown`), and
    FormError when the answer of a shot has not the task's form.
    """
    return with_shots(record, task, shots, describe=True).messages


def with_shots(record: Record, task: Task, shots: Sequence[Record], *, describe: bool) -> Record:
    """`record` with `shots` before its question and, if `describe`, with words for the form of the answer.

    Everything else of the record stays, its `text` among it. Raises as `ask` does.
    """
    strange = [row.source for row in (record, *shots) if shots and not can_be_shown(row)]
    if strange:
        raise ValueError(f"{strange[0]} has several turns or tools, so it cannot stand among examples.")
    system, own = (record.messages[:1], record.messages[1:]) if _has_system(record) else ((), record.messages)
    turns = [turn for shot in shots for turn in _turns(shot, task)] + list(own)
    told = describe_answer(task.form, language_of(record)) if describe else ""
    span = record.text_span
    if told and system:
        system = (replace(system[0], text=f"{system[0].text}\n\n{told}"),)
    elif told:
        turns[0] = replace(turns[0], text=f"{told}\n\n{turns[0].text}")
        if len(turns) == 1 and span is not None:
            moved = len(told) + 2
            span = (span[0] + moved, span[1] + moved)
    return replace(record, messages=(*system, *turns), text_span=span)


def _has_system(record: Record) -> bool:
    return record.messages[0].role == "system"


def _turns(shot: Record, task: Task) -> tuple[Message, Message]:
    answer = Message(role="assistant", text=task.write_target(shot), learn=False)
    return Message(role="user", text=shot.prompt), answer


# --- Many rows -------------------------------------------------------------------------------------------------------


def add_shots(
    records: Sequence[Record],
    tasks: Sequence[Task],
    chosen: Mapping[str, Sequence[Record]],
    k: int,
    *,
    renderer: Renderer,
    room: Mapping[str, int],
) -> ShotRows:
    """`records` with their form described and up to `k` of the examples `chosen` for their tasks.

    A row is never shown itself or a near repeat of it: the next of the chosen ones takes the place.

    Args:
        records: rows to ask.
        tasks: for each of them, its task.
        chosen: for each task by its name, examples as `choose_shots` gives them; a few more than `k`.
        k: how many each row is shown; 0 describes the form only.
        renderer: the model's chat format.
        room: for each task by its name, the most tokens of a prompt.
    """

    def find(_: int, record: Record, task: Task) -> list[Record]:
        text = searched_text(record)
        fresh = [shot for shot in chosen.get(task.name, ()) if not texts_alike(text, searched_text(shot))]
        return fresh[:k]

    return _add(records, tasks, k, find, renderer=renderer, room=room, describe=True)


def add_neighbours(
    records: Sequence[Record],
    tasks: Sequence[Task],
    index: NeighbourIndex,
    k: int,
    *,
    exclude_self: bool,
    renderer: Renderer,
    room: Mapping[str, int],
    describe: bool = False,
) -> ShotRows:
    """`records`, each with the `k` nearest rows of its task as examples, the nearest last.

    Args:
        records: rows to learn from or to ask.
        tasks: for each of them, its task.
        index: labelled rows, their task's name as their group.
        k: how many each row is shown.
        exclude_self: whether `records` are the index's own rows, in the index's order. Then a row's neighbours are
            neither itself nor near repeats of it: it would learn to copy its label instead of reading its text.
        renderer: the model's chat format.
        room: for each task by its name, the most tokens of a prompt.
        describe: whether the form of the answer is described too, for a model that was never tuned to it.
    """
    if exclude_self and len(records) != len(index):
        raise ValueError(f"exclude_self is for the index's own {len(index)} rows, but there are {len(records)}.")

    def find(place: int, record: Record, task: Task) -> list[Record]:
        near = index.nearest(
            searched_text(record),
            k + _SPARE,
            group=task.name,
            exclude=(place,) if exclude_self else (),
            exclude_alike=exclude_self,
        )
        shown = [neighbour.record for neighbour in near if can_be_shown(neighbour.record)]
        return shown[:k][::-1]

    return _add(records, tasks, k, find, renderer=renderer, room=room, describe=describe)


_SPARE = 4
"""Neighbours looked at beyond those wanted, because conversations among them cannot be shown."""


def _add(
    records: Sequence[Record],
    tasks: Sequence[Task],
    k: int,
    find: Callable[[int, Record, Task], list[Record]],
    *,
    renderer: Renderer,
    room: Mapping[str, int],
    describe: bool,
) -> ShotRows:
    asked: list[Record] = []
    left_out: dict[str, int] = {}
    fewer: list[str] = []
    alone: list[str] = []
    for place, (record, task) in enumerate(zip(records, tasks, strict=True)):
        shown: list[Record] = []
        if k and can_be_shown(record):
            shown = find(place, record, task)
            fewer += [record.source] if len(shown) < k else []
        elif k:
            alone.append(record.source)
        whole = with_shots(record, task, shown, describe=describe)
        kept = shown
        while kept and len(renderer.render_prompt(whole.messages, whole.tools)) > room[task.name]:
            kept = kept[1:]  # the last example tells most
            whole = with_shots(record, task, kept, describe=describe)
        if len(kept) < len(shown):
            left_out[record.source] = len(shown) - len(kept)
        asked.append(whole)
    return ShotRows(records=asked, num_asked=k, left_out=left_out, fewer=tuple(fewer), alone=tuple(alone))


def _named(sources: Sequence[str]) -> str:
    return ", ".join(sources[:_NAMED]) + (f" and {len(sources) - _NAMED} more" if len(sources) > _NAMED else "")
