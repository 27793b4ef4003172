"""Everything that training starts from: rows fitted to the model's length, the model opened, an adapter to learn on it.

Nothing is written yet. Training goes on from here, and so does a forecast of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from .data.neighbours import NeighbourIndex
from .dataset import Dataset, load_dataset
from .decoding import answer_limit
from .errors import DataError, RecipeError
from .lookup import look_up
from .models.opening import OpenModel, open_model
from .recipe import Freeze, Full, Generate, Ia3, PromptTuning, PTuning, PTuningV1, Recipe, Train
from .recipe.methods import learning_rate_of
from .render.base import Example
from .render.example_store import answers_of
from .render.fitting import FittedRows
from .tasks.base import Task
from .token_cache import Side, fit_side
from .train.model import require_compiler
from .train.packing import check_packing
from .train.switches import require_switches
from .tuning.methods import add_adapter, resume_adapter

_SLOWEST_PREFIX = 2e-3
"""Eight rows on Gemma 3 270M, 16 tokens of prefix: 24 steps at 2e-2 take the loss from 4.0 to 0.05, at 2e-3 to 3.0."""

_FASTEST_WEIGHTS = 3e-4
"""The rate at which a note on a model's own weights is given: an order above what is usual for them."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows, model and the adapter to learn, ready to be trained; nothing is written yet."""

    dataset: Dataset
    opened: OpenModel
    model: PreTrainedModel | PeftModel
    train_rows: FittedRows
    dev_rows: FittedRows
    answer_limits: Mapping[str, int]
    """For each task, the most tokens of an answer."""
    rows_fingerprint: str
    """`Dataset.fingerprint` of the rows as they were read."""
    neighbours: NeighbourIndex | None = None
    """What the examples before each row were looked up in, where rows are shown any; `dataset` then holds these."""

    @property
    def weights(self) -> list[float]:
        """For each train example, how often it is seen per epoch."""
        return [self.dataset.weights[place] for place in self.train_rows.rows]

    @property
    def train_tasks(self) -> list[str]:
        """For each train example, the name of its task."""
        return [self.dataset.train_tasks[place].name for place in self.train_rows.rows]

    @property
    def dev_tasks(self) -> list[str]:
        """The same for the dev examples."""
        return [self.dataset.dev_tasks[place].name for place in self.dev_rows.rows]

    def train_source(self, place: int) -> str:
        """Where the train example at `place` came from, such as ``train.jsonl:37``."""
        return self.dataset.train[self.train_rows.rows[place]].source

    def scored(self, settings: Train) -> list[int]:
        """Places among the dev rows' records that are scored while training, evenly spread; none where none are."""
        count = len(self.dev_rows.records)
        if settings.evaluate_every == "never" or not count:
            return []
        return list(range(0, count, -(-count // (settings.evaluate_rows or count))))

    def scored_examples(self, settings: Train) -> list[Example]:
        """For each of the scored records its example; of a conversation in several examples, the last."""
        last = {row: number for number, row in enumerate(self.dev_rows.rows)}
        return [self.dev_rows.examples[last[self.dev_rows.kept[place]]] for place in self.scored(settings)]

    def dev_task(self, place: int) -> Task:
        """The task of the dev rows' record at `place`."""
        return self.dataset.dev_tasks[self.dev_rows.kept[place]]


def prepare(recipe: Recipe, *, console: Console, dataset: Dataset | None = None, device: str | None = None) -> Prepared:
    """Everything that training starts from; `console` is told of the tasks and of rows dropped or shortened.

    `dataset` is the recipe's, where it was read already; `device` is where the model is opened, by default the GPU.

    Raises:
        DataError, ModelError, RecipeError, RunError: the recipe cannot be trained.
    """
    require_compiler(recipe.train)
    require_switches(recipe.train)
    dataset = load_dataset(recipe) if dataset is None else dataset
    _require_tasks(recipe, dataset)
    for note in dataset.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for name, (num_train, num_dev) in dataset.count_rows().items():
        form = next(task.form for task in dataset.tasks if task.name == name)
        console.print(f"task {name}: {num_train} train, {num_dev} dev rows; {form.describe()}", soft_wrap=True)
    model = recipe.model
    opened = open_model(model.path, dtype=model.dtype, quantize=model.quantize, must_speak=True, device=device)
    for note in opened.notes:
        console.print(f"note: {note}", soft_wrap=True)
    rows_fingerprint, neighbours = dataset.fingerprint, None
    if recipe.data.retrieve:
        dataset, neighbours, notes = look_up(recipe, dataset, opened.renderer)
        for note in notes:
            console.print(f"note: {note}", soft_wrap=True)
    if (on_pace := _note_on_pace(recipe)) is not None:
        console.print(f"note: {on_pace}", soft_wrap=True)
    train_rows = _fit(recipe, dataset, "train", opened, console)
    if not train_rows.examples:
        raise DataError(
            f"All {len(dataset.train)} train rows are longer than {recipe.data.max_length} tokens, so there is nothing "
            f"to learn from. Raise data.max_length."
        )
    dev_rows = _fit(recipe, dataset, "dev", opened, console)
    if recipe.train.packing:
        check_packing(_plain(opened.model), train_rows.examples)
    return Prepared(
        dataset=dataset,
        opened=opened,
        model=_to_learn(_plain(opened.model), recipe),
        train_rows=train_rows,
        dev_rows=dev_rows,
        answer_limits=_answer_limits(recipe.generate, dataset, train_rows, dev_rows),
        rows_fingerprint=rows_fingerprint,
        neighbours=neighbours,
    )


def _note_on_pace(recipe: Recipe) -> str | None:
    """What to say of a learning rate that is usual for LoRA and leaves a prefix where it is, or ruins a model."""
    rate, method = recipe.train.learning_rate, recipe.method
    if isinstance(method, PTuning) and not method.projection and rate < _SLOWEST_PREFIX:
        return (
            f"train.learning_rate is {rate:g}: a P-Tuning prefix without projection hardly moves at that. ChatGLM-6B's "
            f"own trainer has 0.02."
        )
    usual = learning_rate_of(method)
    if isinstance(method, PromptTuning | PTuningV1 | Ia3) and usual is not None and rate < usual / 10:
        return f"train.learning_rate is {rate:g}: what {method.name} learns hardly moves at that. Usual is {usual:g}."
    if isinstance(method, Full | Freeze) and rate >= _FASTEST_WEIGHTS:
        return (
            f"train.learning_rate is {rate:g}: that is a rate for adapters, at which a model's own weights soon lose "
            f"what they hold. Usual is {usual:g}."
        )
    return None


def _to_learn(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
    """`model` with the adapter that learns: a fresh one, or the one that the recipe starts from."""
    if recipe.model.adapter is None:
        return add_adapter(model, recipe.method, seed=recipe.train.seed)
    return resume_adapter(model, recipe.method, Path(recipe.model.adapter))


def _fit(recipe: Recipe, dataset: Dataset, side: Side, opened: OpenModel, console: Console) -> FittedRows:
    """Examples within the length limit, from the cache where there are many; what was dropped or shortened is said."""
    rows, note = fit_side(recipe.data, dataset, side, opened.renderer, model=opened.folder)
    if note:
        console.print(note, soft_wrap=True)
    more = len(rows.examples) - len(rows.records)
    if more:
        console.print(
            f"note: {more} examples more than rows: this model's chat format writes earlier replies differently from "
            f"new ones, so such conversations are learnt in parts.",
            soft_wrap=True,
        )
    for what, sources in (("dropped", rows.dropped), ("shortened", rows.shortened)):
        if sources:
            console.print(
                f"note: {len(sources)} rows {what}, being longer than {recipe.data.max_length} tokens: "
                f"{', '.join(sources[:10])}",
                soft_wrap=True,
            )
    return rows


def _require_tasks(recipe: Recipe, dataset: Dataset) -> None:
    """Raise RecipeError when `train.task_weights` names a task that the rows do not have."""
    names = [task.name for task in dataset.tasks]
    strange = [name for name in recipe.train.task_weights if name not in names]
    if strange:
        raise RecipeError(
            f"train.task_weights names {', '.join(map(repr, strange))}, but the tasks are {', '.join(names)}."
        )


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        raise TypeError("open_model was asked for no adapter, so the model has none")
    return model


def _answer_limits(
    settings: Generate, dataset: Dataset, train_rows: FittedRows, dev_rows: FittedRows
) -> dict[str, int]:
    """For each task, the most tokens of an answer: what the recipe says, or half more than the longest label."""
    limits = {}
    for task in dataset.tasks:
        lengths = [
            int(num_answer)
            for rows, tasks in ((train_rows, dataset.train_tasks), (dev_rows, dataset.dev_tasks))
            for num_answer, place in zip(answers_of(rows.examples), rows.rows, strict=True)
            if tasks[place] is task
        ]
        limits[task.name] = answer_limit(settings, max(lengths, default=0))
    return limits
