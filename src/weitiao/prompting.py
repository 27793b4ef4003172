"""A model that was never tuned, put to the task: its form described, a few labelled rows shown, the same engine.

    prompt_model(recipe, out="answers.jsonl", shots=4)           the recipe's dev rows, or a file of new ones
    shot_sides(answerer, dataset.train, dataset.train_tasks, …)  the columns "zero-shot", "4-shot" of an evaluation

Decoding, constraint and reading of the answers are those of a tuned model, so that the figures differ by the tuning and
by nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from .data.neighbours import NeighbourIndex
from .data.reading import describe_sources, read_like
from .data.records import Record, digest_records
from .dataset import Dataset, assign_tasks, load_dataset, read_options
from .decoding import answer_limit, sampling_of
from .errors import DataError
from .evaluate.predict import Answerer, OnReply, predict_rows
from .generate.chat import Reply
from .models.adapters import adapter_fingerprint
from .models.opening import OpenModel, open_model
from .recipe import Generate, Recipe
from .render.base import Renderer
from .render.shots import ShotRows, add_neighbours, add_shots
from .tasks.base import Task
from .tasks.choosing import choose_shots

_SPARE_SHOTS = 4
"""Examples chosen beyond those shown, for rows that are near repeats of one of them."""
_NEXT_TURN = "\n\nUser: "
"""What a model without a chat template writes behind its answer when it goes on with the conversation by itself."""

Counting = Callable[[str], AbstractContextManager[OnReply]]
"""Opens a progress bar of that name; what it yields is told of the replies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotSide:
    """What a model that was never tuned answered."""

    records: Sequence[Record]
    """The rows as they were asked, examples and description included."""
    tasks: Sequence[Task]
    """For each of them, its task."""
    lines: Sequence[Mapping[str, Any]]
    """For each of them what `predict_rows` wrote: the row, ``prediction``, ``answer``, ``valid``, …"""
    notes: Sequence[str]
    """What the user should know: examples that did not fit or were not there."""

    @property
    def num_valid(self) -> int:
        """How many answers have their task's form."""
        return sum(bool(line["valid"]) for line in self.lines)


def shot_sides(
    answerer: Answerer,
    train: Sequence[Record],
    train_tasks: Sequence[Task],
    rows: Sequence[Record],
    row_tasks: Sequence[Task],
    *,
    folder: Path,
    key: str,
    shots: Sequence[int] = (0, 4),
    nearest: bool = False,
    seed: int = 0,
    counting: Counting | None = None,
) -> dict[str, ShotSide]:
    """Ask `rows` once for each number in `shots`; the answers by the name of the side: ``zero-shot``, ``4-shot``.

    Args:
        answerer: the untuned model: of a tuned one, call this with its adapter disabled.
        train: the labelled rows that examples are taken from.
        train_tasks: for each of them, its task.
        rows: rows to ask, with or without labels.
        row_tasks: for each of them, its task.
        folder: gets ``predictions-zero-shot.jsonl`` and so on; a broken-off sitting goes on there.
        key: identifies the model and how it decodes; the rows as asked are added to it.
        shots: how many examples are shown; 0 describes the form only.
        nearest: show each row the examples nearest to it instead of the same ones to all; a side is then ``4-nearest``.
        seed: of the choice of examples.
        counting: opens a progress bar for each side.

    Raises:
        DataError: a row does not fit the model's positions even without examples.
    """
    if min(shots, default=0) < 0:
        raise ValueError(f"shots holds {min(shots)}; a number of examples is 0 or more.")
    examples = _find_examples(train, train_tasks, row_tasks, max(shots, default=0), nearest=nearest, seed=seed)
    sides: dict[str, ShotSide] = {}
    for k in dict.fromkeys(shots):
        name = "zero-shot" if k == 0 else f"{k}-nearest" if nearest else f"{k}-shot"
        asked = examples.add(rows, row_tasks, k, answerer)
        path = folder / f"predictions-{name}.jsonl"
        sides[name] = _answer(answerer, asked, row_tasks, path, name=name, key=key, counting=counting)
    return sides


def prompt_model(
    recipe: Recipe,
    *,
    out: str | Path,
    shots: int = 4,
    nearest: bool = False,
    rows: str | Path | None = None,
    console: Console | None = None,
) -> ShotSide:
    """Ask the recipe's model as it is, its adapter on where it names one, and write its answers to `out`.

    Args:
        recipe: names the model and the labelled rows, from which tasks, forms and examples are taken.
        out: a file of JSON lines, as `predict_file` writes it.
        shots: how many labelled rows are shown with each question.
        nearest: show those nearest to the question instead of the same ones with all.
        rows: a file of rows to answer, labelled or not, read as the recipe's are; by default its dev rows.
        console: where notes and progress are shown.

    Raises:
        DataError, ModelError, RecipeError: the rows cannot be used or there are none, or the model cannot be opened.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    dataset = load_dataset(recipe)
    records, tasks = (list(dataset.dev), list(dataset.dev_tasks)) if rows is None else _read(recipe, dataset, rows)
    if not records:
        what = "The recipe holds no dev rows apart" if rows is None else f"{rows} holds no rows"
        raise DataError(f"{what}, so there is nothing to ask. Name a file of rows.")
    model = recipe.model
    opened = open_model(model.path, adapter=model.adapter, dtype=model.dtype, quantize=model.quantize, must_speak=True)
    for note in opened.notes:
        console.print(f"note: {note}", soft_wrap=True)
    answerer = _answerer(recipe.generate, dataset, opened)
    examples = _find_examples(dataset.train, dataset.train_tasks, tasks, shots, nearest=nearest, seed=recipe.train.seed)
    asked = examples.add(records, tasks, shots, answerer)
    for note in asked.notes():
        console.print(f"note: {note}", soft_wrap=True)
    return _answer(answerer, asked, tasks, Path(out), name=f"{shots} shots", key=_key(recipe, opened))


def _key(recipe: Recipe, opened: OpenModel) -> str:
    """Identifies the model that answers: its weights, and what changes what they compute."""
    parts = [opened.fingerprint]
    if recipe.model.adapter is not None:
        parts.append(adapter_fingerprint(Path(recipe.model.adapter)))
    if recipe.model.quantize != "none":
        parts.append(recipe.model.quantize)
    return " ".join(parts)


def labelled_limits(
    records: Iterable[Record], tasks: Iterable[Task], renderer: Renderer, settings: Generate
) -> dict[str, int]:
    """For each task by its name, the most tokens of an answer: as the recipe says, or half more than the longest label.

    Args:
        records: labelled rows, those to be scored among them: a task may have no others.
        tasks: for each of them, its task.
        renderer: the model's chat format.
        settings: the recipe's part that may set the limit.
    """
    longest: dict[str, int] = {}
    written: dict[tuple[str, str], int] = {}  # labels are tokenised once for all the rows that have them
    for record, task in zip(records, tasks, strict=True):
        answer = task.write_target(record)
        if (task.name, answer) not in written:
            written[task.name, answer] = len(renderer.render_answer(answer))
        longest[task.name] = max(longest.get(task.name, 0), written[task.name, answer])
    return {name: answer_limit(settings, count) for name, count in longest.items()}


def prompt_room(answerer: Answerer) -> dict[str, int]:
    """For each task by its name, the most tokens of a prompt that leave the answer room in the model's positions."""
    positions = answerer.model.config.get_text_config().max_position_embeddings
    return {name: positions - limit for name, limit in answerer.answer_limits.items()}


def _answer(
    answerer: Answerer,
    asked: ShotRows,
    tasks: Sequence[Task],
    path: Path,
    *,
    name: str,
    key: str,
    counting: Counting | None = None,
) -> ShotSide:
    how = {name: value for name, value in _fields_of(answerer).items() if name not in ("model", "renderer")}
    whole = hashlib.sha256(f"{key} {digest_records(asked.records)} {how}".encode()).hexdigest()
    one_turn = answerer if answerer.renderer.template else _OneTurn(**_fields_of(answerer))
    with counting(name) if counting is not None else contextlib.nullcontext() as on_reply:
        lines = predict_rows(one_turn, asked.records, tasks, path, key=whole, on_reply=on_reply)
    return ShotSide(records=asked.records, tasks=tasks, lines=lines, notes=asked.notes())


class _OneTurn(Answerer):
    """Ends a reply where the model goes on to ask itself the next question, for models that know no end of a turn."""

    __slots__ = ()

    def answer(self, records: Sequence[Record], tasks: Sequence[Task]) -> Iterator[Reply]:
        """Yield the reply to each record as `Answerer` does, up to the next turn, which ends it like a stop token."""
        for reply in Answerer.answer(self, records, tasks):
            text, mark, _ = reply.text.partition(_NEXT_TURN)
            tokens = tuple(token for token in reply.tokens if token[1] <= len(text))
            yield replace(reply, text=text, finish="stop", tokens=tokens) if mark else reply


def _fields_of(answerer: Answerer) -> dict[str, Any]:
    return {field.name: getattr(answerer, field.name) for field in fields(answerer)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Examples:
    """Where examples come from: an index of all labelled rows, or a few of them chosen for each task."""

    index: NeighbourIndex | None
    chosen: Mapping[str, Sequence[Record]]

    def add(self, rows: Sequence[Record], tasks: Sequence[Task], k: int, answerer: Answerer) -> ShotRows:
        """`rows` with their form described and `k` examples each, as far as they fit."""
        room, renderer = prompt_room(answerer), answerer.renderer
        if self.index is None:
            return add_shots(rows, tasks, self.chosen, k, renderer=renderer, room=room)
        return add_neighbours(
            rows, tasks, self.index, k, exclude_self=False, renderer=renderer, room=room, describe=True
        )


def _find_examples(
    train: Sequence[Record],
    train_tasks: Sequence[Task],
    row_tasks: Sequence[Task],
    most: int,
    *,
    nearest: bool,
    seed: int,
) -> _Examples:
    """Examples for rows of these tasks, enough for `most` in each prompt."""
    if nearest and most:
        groups = [task.name for task in train_tasks]
        return _Examples(index=NeighbourIndex.build(train, groups=groups), chosen={})
    asked = {task.name: task for task in row_tasks} if most else {}
    chosen = {
        name: choose_shots(train, train_tasks, task, most + _SPARE_SHOTS, seed=seed) for name, task in asked.items()
    }
    return _Examples(index=None, chosen=chosen)


def _answerer(settings: Generate, dataset: Dataset, opened: OpenModel) -> Answerer:
    labelled, tasks = chain(dataset.train, dataset.dev), chain(dataset.train_tasks, dataset.dev_tasks)
    limits = labelled_limits(labelled, tasks, opened.renderer, settings)
    return Answerer(
        model=opened.model,
        renderer=opened.renderer,
        sampling=sampling_of(settings, limits),
        answer_limits=limits,
        batch_rows=settings.batch_rows,
        constrain=settings.constrain,
    )


def _read(recipe: Recipe, dataset: Dataset, rows: str | Path) -> tuple[list[Record], list[Task]]:
    """The rows of a file, read as the recipe's train rows are, and their tasks."""
    kept = describe_sources([(source.path, read_options(source, recipe.data)) for source in recipe.data.train])
    records = read_like(kept, rows, require_target=False)
    return records, assign_tasks(records, dataset.tasks)
