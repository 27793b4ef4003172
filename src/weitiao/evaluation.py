"""A finished run scored: the tuned model beside its base model, asked as it was trained, by prompt, and unconstrained.

`evaluate_run` asks every side the same rows, adds up what each answer is worth, calibrates how sure the tuned model is,
and writes the reports. Reads the run's contract and recipe.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .apply import RunInUse, calibrated, counting, open_run, read_calibration
from .data.reading import Said, read_like
from .data.records import Record, digest_records
from .dataset import Dataset, load_dataset
from .environment import environment
from .errors import DataError, FormError, Problem
from .evaluate.calibration import CALIBRATION_FILE, Calibration, RunCalibration, calibrate_fields, calibrate_side
from .evaluate.constrained import FREE
from .evaluate.forgetting import ProbeChange, compare_probe
from .evaluate.predict import as_prediction, predict_rows
from .evaluate.prediction import Prediction
from .evaluate.report import Report, write_report
from .evaluate.score import Side, TaskScore, score_side
from .evaluate.user_metrics import UserMetric, load_metrics, measure_rows
from .generate.likelihood import Continuation, log_likelihoods
from .prompting import shot_sides
from .recipe import Recipe, load_recipe
from .render.fitting import conversation_of
from .runs import write_json
from .tasks.base import Task

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one run on one set, and the files that hold them."""

    sides: Mapping[str, tuple[TaskScore, ...]]
    """By side: ``base``, ``zero-shot``, ``4-shot``, ``tuned``, ``tuned, unconstrained``, those that were asked."""
    files: tuple[Path, ...]
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    """For each task, how the tuned model's confidence and correctness go together."""
    probe: ProbeChange | None = None
    """What the model knows beside its tasks, before and after tuning, where a probe was given."""

    @property
    def base(self) -> tuple[TaskScore, ...]:
        """Empty when the base model was not scored."""
        return self.sides.get(BASE, ())

    @property
    def tuned(self) -> tuple[TaskScore, ...]:
        """The run's own scores."""
        return self.sides[TUNED]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """One side's rows as they were asked, and what came back."""

    records: Sequence[Record]
    lines: Sequence[Mapping[str, Any]]


def evaluate_run(
    path: str | Path,
    *,
    data: str | Path | None = None,
    base: bool | None = None,
    shots: Sequence[int] | None = None,
    unconstrained: bool | None = None,
    probe: str | Path | None = None,
    base_model: str | None = None,
    said: Said | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Score the run at `path` on its dev rows, or on the rows of the file `data`, and write the reports.

    Args:
        path: the run folder.
        data: another file of labelled rows.
        base: score the base model as well, asked as the tuned one; by default as the recipe says.
        shots: score the base model as it can be prompted, once for each number of examples; by default as the recipe.
        unconstrained: score the tuned model with nothing held to the form as well; by default as the recipe says.
        probe: a file of multiple-choice questions, asked before and after: what tuning made the model forget.
        base_model: where the base model lies now, if it was moved.
        said: how the rows of `data` are to be read and asked, where otherwise than those the run learnt from.
        console: where progress is shown.

    Raises:
        DataError, RunError, ContractError, ModelError, RecipeError: the run or the rows cannot be used, or a metric of
            the user's own failed.
    """
    if data is None and said not in (None, Said()):
        raise DataError(
            "--format, --prompt, --system, --encoding and --sheet say how the file of --data is read. Give one."
        )
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    run = RunInUse.of(open_run(path, base_model=base_model))
    recipe = load_recipe(run.folder.recipe)
    metrics = load_metrics(recipe.evaluate.metrics, run=run.folder.path)
    shots = recipe.evaluate.shots if shots is None else tuple(shots)
    dataset = load_run_rows(run, recipe) if data is None or shots else None
    if data is None and dataset is not None:
        records, name = list(dataset.dev), "dev"
    else:
        records, name = read_like(run.contract.reading, str(data), said=said), Path(str(data)).stem
    if not records:
        raise DataError(f"There are no dev rows to score: {run.folder.path} held none apart. Give some with --data.")
    tasks = run.assign(records)
    _require_gold(records, tasks)
    folder = run.folder.evaluations / name
    started = time.monotonic()
    asked = _ask_sides(
        run,
        records,
        tasks,
        folder,
        dataset=dataset,
        base=recipe.evaluate.base if base is None else base,
        shots=shots,
        unconstrained=recipe.evaluate.unconstrained if unconstrained is None else unconstrained,
        console=console,
    )
    seconds = time.monotonic() - started
    sides = {side: _score(run, recipe, one, tasks, metrics) for side, one in asked.items()}
    calibration = _calibrate(run, sides[TUNED], keep=data is None)
    told = replace(asked[TUNED], lines=[calibrated(line, calibration) for line in asked[TUNED].lines])
    losses = _gold_losses(run, told.records, tasks, console)
    predictions = (replace(one, loss=loss) for one, loss in zip(_predictions(told, tasks), losses, strict=True))
    sides[TUNED] = replace(sides[TUNED], predictions=tuple(predictions))
    report = Report(
        title=f"{recipe.name} on {name}",
        created=time.strftime("%Y-%m-%d %H:%M"),
        run=recipe.name,
        models={side: str(run.folder.adapter) if side.startswith(TUNED) else run.contract.base for side in sides},
        data_file=str(data or "the run's dev rows"),
        data_fingerprint=digest_records(records),
        facts=_facts(run, seconds),
        tasks=run.tasks,
        sides=sides,
        train_counts=_read_counts(run),
        calibration=calibration.answers,
    )
    files = write_report(report, folder)
    change = _probe(run, probe, folder, console) if probe is not None else None
    return Evaluation(
        sides={name: side.scores for name, side in sides.items()},
        files=(*files, *([folder / "forgetting.json"] if change is not None else [])),
        calibration=calibration.answers,
        probe=change,
    )


def load_run_rows(run: RunInUse, recipe: Recipe) -> Dataset:
    """The rows the run learnt from and those held apart. Raises DataError when they have changed since."""
    dataset = load_dataset(recipe)
    if dataset.fingerprint != run.contract.data_fingerprint:
        raise DataError(
            f"The rows of {run.folder.path} have changed since it was trained, so its dev rows may have been trained "
            f"on. Restore them, or score another file with --data FILE."
        )
    return dataset


def _ask_sides(
    run: RunInUse,
    records: Sequence[Record],
    tasks: Sequence[Task],
    folder: Path,
    *,
    dataset: Dataset | None,
    base: bool,
    shots: Sequence[int],
    unconstrained: bool,
    console: Console,
) -> dict[str, _Asked]:
    """Every side's answers, in the order in which a report shows them."""
    own = run.prepare(records, tasks, console)
    asked: dict[str, _Asked] = {}

    def ask(side: str, *, constrain: bool | None = None) -> None:
        answerer = run.answerer(constrain=constrain)
        with counting(console, side) as on_reply:
            file = folder / f"predictions-{side.replace(', ', '-')}.jsonl"
            lines = predict_rows(answerer, own, tasks, file, key=run.key(own, side), on_reply=on_reply)
        asked[side] = _Asked(records=own, lines=lines)

    if base:
        with run.untuned():
            ask(BASE)
    if shots:
        assert dataset is not None, "shots are taken from the train rows"
        with run.untuned():
            prompted = shot_sides(
                run.answerer(),
                dataset.train,
                dataset.train_tasks,
                records,
                tasks,
                folder=folder,
                key=run.key(records, "prompted"),
                shots=shots,
                counting=lambda side: counting(console, side),
            )
        for side, one in prompted.items():
            for note in one.notes:
                console.print(f"note: {side}: {note}", soft_wrap=True)
            asked[side] = _Asked(records=one.records, lines=one.lines)
    ask(TUNED)
    if unconstrained and run.contract.constrain:
        ask(TUNED + FREE, constrain=False)
    return asked


def _score(run: RunInUse, recipe: Recipe, asked: _Asked, tasks: Sequence[Task], metrics: Sequence[UserMetric]) -> Side:
    predictions = _predictions(asked, tasks)
    rows = [record.raw for record in asked.records]
    extra = measure_rows(metrics, predictions, run.tasks, rows) if metrics else ()
    return score_side(predictions, run.tasks, resamples=recipe.evaluate.resamples, extra=extra)


def _predictions(asked: _Asked, tasks: Sequence[Task]) -> tuple[Prediction, ...]:
    return tuple(as_prediction(*row) for row in zip(asked.records, tasks, asked.lines, strict=True))


def _gold_losses(
    run: RunInUse, records: Sequence[Record], tasks: Sequence[Task], console: Console
) -> list[float | None]:
    """For each row what its label costs the tuned model: mean negative log-likelihood per token, end token included.

    None for a row whose prompt and label do not fit the model's positions together.
    """
    renderer = run.opened.renderer
    most = run.opened.model.config.get_text_config().max_position_embeddings
    pairs: dict[int, Continuation] = {}
    for place, (record, task) in enumerate(zip(records, tasks, strict=True)):
        prompt = renderer.render_prompt(record.messages, record.tools)
        label = renderer.render_reply(record.messages, conversation_of(record, task).reply, record.tools)
        if len(prompt) + len(label) <= most:
            pairs[place] = (prompt, label)
    with counting(console, "loss of labels") as on_sequences:
        values = log_likelihoods(run.opened.model, list(pairs.values()), on_sequences=on_sequences)
    losses: list[float | None] = [None] * len(records)
    for (place, (_, follows)), value in zip(pairs.items(), values, strict=True):
        losses[place] = -value / len(follows)
    return losses


def _calibrate(run: RunInUse, side: Side, *, keep: bool) -> RunCalibration:
    """How often answers and values of a confidence are right, task by task.

    What the run's own dev rows say is kept with the run, for predictions to be told by, and tried on other rows.
    """
    known = None if keep else read_calibration(run.folder)
    if known is not None:
        return RunCalibration(
            answers=calibrate_side(side.predictions, side.rows, run.tasks, known=known.answers), fields=known.fields
        )
    found = RunCalibration(
        answers=calibrate_side(side.predictions, side.rows, run.tasks),
        fields=calibrate_fields(side.predictions, side.rows, run.tasks),
    )
    if keep:
        found.write(run.folder.path / CALIBRATION_FILE)
    return found


def _require_gold(records: Sequence[Record], tasks: Sequence[Task]) -> None:
    """Raise DataError naming every record whose labelled answer does not have its task's form."""
    problems = []
    for record, task in zip(records, tasks, strict=True):
        try:
            task.gold(record)
        except FormError as error:
            message = f"The labelled answer does not have the form the run was trained on ({task.name}): {error}"
            fix = "Mend the label, or leave the row out."
            problems.append(Problem(source=record.source, field="target", message=message, fix=fix))
    if problems:
        raise DataError(f"{len(problems)} of {len(records)} rows cannot be scored.", problems)


def _read_counts(run: RunInUse) -> dict[str, dict[str, int]]:
    """How often labels, predicates and keys stand in the rows the run learnt from; empty for runs of before."""
    with contextlib.suppress(FileNotFoundError):
        counts: dict[str, dict[str, int]] = json.loads(run.folder.label_counts.read_text("utf-8"))
        return counts
    return {}


def _probe(run: RunInUse, probe: str | Path, folder: Path, console: Console) -> ProbeChange:
    with counting(console, "probe") as on_questions:
        change = compare_probe(run.opened.model, run.opened.renderer, probe, on_questions=on_questions)
    write_json(folder / "forgetting.json", change.to_json())
    return change


def _facts(run: RunInUse, seconds: float) -> dict[str, str]:
    here = environment()
    return {
        "machine": f"{here.processor}, {here.cores} cores, {here.gpu}",
        "time": f"{seconds:.0f} s for all answers",
        "dtype": run.contract.dtype,
        "answers": "held to the labelled form" if run.contract.constrain else "written freely",
        **here.versions,
    }
