"""Recipe in, tuned model out: rows, model, training and contract brought together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from .contract import Contract
from .data.reading import describe_sources
from .dataset import Dataset, load_dataset, read_options
from .environment import environment
from .errors import DataError, RecipeError
from .evaluate.predict import Answerer, as_prediction, read_reply
from .evaluate.score import overall, score_predictions
from .generate.engine import Sampling, cache_bytes
from .models.adapters import base_model
from .models.families import OpenModel, open_model
from .recipe import Generate, Recipe, Train
from .render.base import Example
from .render.example_store import answers_of
from .render.fitting import FittedRows
from .runs import RunFolder, write_json, write_text, writing
from .tasks.base import Task
from .token_cache import Side, fit_side
from .train.checkpoint import require_same, rust_os_errors
from .train.loop import OnEval, Outcome, Scoring, train
from .train.model import require_compiler
from .train.packing import check_packing
from .tuning.methods import add_adapter

_VOLATILE = {
    "train": ("log_every", "keep_checkpoints", "save_every", "price_per_hour", "currency"),
    "generate": ("batch_rows",),
    "evaluate": ("base", "shots", "unconstrained", "resamples"),
}
"""Settings that may change between the sittings of one run, because the tuned weights do not depend on them."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Rows, model and fresh adapter, ready to be trained; nothing is written yet."""

    dataset: Dataset
    opened: OpenModel
    model: PeftModel
    train_rows: FittedRows
    dev_rows: FittedRows
    answer_limits: Mapping[str, int]
    """For each task, the most tokens of an answer."""

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


def prepare(recipe: Recipe, *, console: Console, dataset: Dataset | None = None) -> Prepared:
    """Everything that training starts from; `console` is told of the tasks and of rows dropped or shortened.

    `dataset` is the recipe's, where it was read already.

    Raises:
        DataError, ModelError, RecipeError, RunError: the recipe cannot be trained.
    """
    require_compiler(recipe.train)
    dataset = load_dataset(recipe) if dataset is None else dataset
    _require_tasks(recipe, dataset)
    for note in dataset.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for name, (num_train, num_dev) in dataset.count_rows().items():
        form = next(task.form for task in dataset.tasks if task.name == name)
        console.print(f"task {name}: {num_train} train, {num_dev} dev rows; {form.describe()}", soft_wrap=True)
    opened = open_model(recipe.model.path, dtype=recipe.model.dtype)
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
        model=add_adapter(_plain(opened.model), recipe.method, seed=recipe.train.seed),
        train_rows=train_rows,
        dev_rows=dev_rows,
        answer_limits=_answer_limits(recipe.generate, dataset, train_rows, dev_rows),
    )


def tune_model(
    recipe: Recipe,
    *,
    resume: bool = False,
    runs: str | Path = "runs",
    console: Console | None = None,
    dataset: Dataset | None = None,
) -> RunFolder:
    """Train as `recipe` says; the run folder ``runs/NAME`` then holds the adapter and its contract.

    `dataset` is what `load_dataset` made of the recipe, where that was read already.

    Raises:
        DataError, ModelError, RunError, ResumeError: before anything is written, or with what was written whole.
        KeyboardInterrupt: Ctrl-C; after the first one the step was finished and saved.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    prepared = prepare(recipe, console=console, dataset=dataset)
    dataset, opened, limits = prepared.dataset, prepared.opened, prepared.answer_limits
    reading = describe_sources([(source.path, read_options(source, recipe.data)) for source in recipe.data.train])
    run = RunFolder.create(Path(runs) / recipe.name, resume=resume)
    require_same(run, _depends_on(recipe, dataset, opened))
    if not run.recipe.exists():
        write_text(run.recipe, recipe.to_yaml())
    write_json(run.environment, environment().to_json())
    outcome = train(
        prepared.model,
        prepared.train_rows.examples,
        prepared.weights,
        prepared.dev_rows.examples,
        settings=recipe.train,
        run=run,
        tasks=prepared.train_tasks,
        dev_tasks=prepared.dev_tasks,
        on_eval=_make_on_eval(recipe, prepared),
        scoring_bytes=scoring_bytes(recipe, prepared),
        console=console,
    )
    if not outcome.finished:
        console.print(f"Saved at step {outcome.step} of {outcome.steps}. Continue with --resume.", soft_wrap=True)
        raise KeyboardInterrupt
    with writing(run.adapter), rust_os_errors():
        opened.tokenizer.save_pretrained(str(run.adapter))
    _contract(recipe, dataset, opened, run, limits, reading).write(run.contract)
    _say_done(console, run, outcome)
    return run


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


def _say_done(console: Console, run: RunFolder, outcome: Outcome) -> None:
    score = "" if outcome.best_score is None else f" (dev score {outcome.best_score:.3f})"
    console.print(
        f"Done in {outcome.seconds / 60:.1f} minutes of training. The adapter of step {outcome.best_step}{score} "
        f"is in {run.adapter}.\nNext: weitiao evaluate {run.path}",
        soft_wrap=True,
    )


def _depends_on(recipe: Recipe, dataset: Dataset, opened: OpenModel) -> dict[str, object]:
    """What must stay the same for a run to go on."""
    settings = recipe.model_dump(mode="json")
    for part, keys in _VOLATILE.items():
        for key in keys:
            del settings[part][key]
    del settings["data"], settings["model"]["path"]  # where rows and model lie may change, what they hold may not
    settings["data"] = {key: getattr(recipe.data, key) for key in ("max_length", "overlong", "turns", "retrieve")}
    rows = {name: {"train": train, "dev": dev} for name, (train, dev) in dataset.count_rows().items()}
    return {"data": dataset.fingerprint, "rows": rows, "base model": opened.fingerprint, "recipe": settings}


def _contract(
    recipe: Recipe,
    dataset: Dataset,
    opened: OpenModel,
    run: RunFolder,
    limits: Mapping[str, int],
    reading: Mapping[str, object],
) -> Contract:
    local = Path(recipe.model.path).expanduser()
    return Contract(
        base=str(local.resolve()) if local.is_dir() else recipe.model.path,
        base_fingerprint=opened.fingerprint,
        adapter_fingerprint=hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
        family=opened.family.name,
        template=opened.renderer.template,
        stop_ids=opened.renderer.stop_ids,
        tasks=tuple(task.to_json() for task in dataset.tasks),
        decoding=asdict(_sampling(recipe.generate, limits)),
        answer_limits=limits,
        batch_rows=recipe.generate.batch_rows,
        constrain=recipe.generate.constrain,
        max_length=recipe.data.max_length,
        shorten_input=recipe.data.overlong == "shorten_input",
        data_fingerprint=dataset.fingerprint,
        dtype=str(opened.model.dtype).removeprefix("torch."),
        reading=reading,
        versions=environment().versions,
    )


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
        auto = max(32, 3 * max(lengths, default=0) // 2)
        limits[task.name] = auto if settings.max_new_tokens == "auto" else settings.max_new_tokens
    return limits


def _sampling(settings: Generate, limits: Mapping[str, int]) -> Sampling:
    return Sampling(
        max_new_tokens=max(limits.values()),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
    )


def scoring_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """The memory that scoring while training adds: keys and values of the rows that are answered together."""
    examples = prepared.scored_examples(recipe.train)
    if not examples:
        return 0
    return cache_bytes(
        base_model(prepared.model),
        longest_prompt=max(len(example) - example.num_answer for example in examples),
        max_new_tokens=max(prepared.answer_limits.values()),
        num_rows=min(recipe.generate.batch_rows, len(examples)),
    )


def _make_on_eval(recipe: Recipe, prepared: Prepared) -> OnEval | None:
    """What the loop calls to score the dev rows: the same asking and scoring as `evaluate_run`."""
    places = prepared.scored(recipe.train)
    records = [prepared.dev_rows.records[place] for place in places]
    tasks = [prepared.dev_task(place) for place in places]
    if not records:
        return None

    def on_eval(model: PreTrainedModel) -> Scoring:
        answerer = Answerer(
            model=model,
            renderer=prepared.opened.renderer,
            sampling=_sampling(recipe.generate, prepared.answer_limits),
            answer_limits=prepared.answer_limits,
            batch_rows=recipe.generate.batch_rows,
            constrain=recipe.generate.constrain,
        )
        replies = {reply.index: reply for reply in answerer.answer(records, tasks)}
        predictions = [
            as_prediction(record, task, read_reply(record, task, replies[index]))
            for index, (record, task) in enumerate(zip(records, tasks, strict=True))
        ]
        scores = score_predictions(predictions, prepared.dataset.tasks, resamples=0)
        scored = [score for score in scores if score.rows]
        return Scoring(
            overall=overall(scored),
            tasks={score.task: {"primary": score.metrics[score.primary], **score.metrics} for score in scored},
        )

    return on_eval
