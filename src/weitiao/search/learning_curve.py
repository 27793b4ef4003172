"""One recipe trained on a quarter, a half and all of its rows: how the score grows, and what more rows would bring.

Every training is an ordinary run, evaluated on the same dev rows. The uncertainty comes from drawing dev rows, and
seeds where there are several, again: the same draw for all trainings, each draw with a power law of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..dataset import Dataset
from ..errors import RecipeError
from ..evaluate.score import draws, resampled_counts, row_scores
from ..evaluate.scored_files import read_scored
from ..evaluation import TUNED, evaluate_run
from ..recipe import Recipe, make_recipe
from ..runs import RunFolder, write_json, write_text
from ..stopping import StopSignals
from ..tasks.base import Task, add_counts
from ..train.checkpoint import require_same
from ..tune import tune_model
from .curve_page import draw_curves, write_page
from .power_law import Floats, PowerLaw, fit_power_law
from .several import TrialRows, free_memory, logging, open_folder

SHARES = (0.25, 0.5, 1.0)
RESAMPLES = 1000
MATTERS = 0.01
"""A gain below this is called little."""
FEWEST_DEV_ROWS = 20
"""With fewer of them nothing is foretold: too little is known about any score."""
ALL_TASKS = "all tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The scores at one number of rows."""

    share: float
    rows: int
    """Rows learnt from."""
    score: float
    """The mean over the seeds."""
    interval: tuple[float, float]
    """95 %, of drawing dev rows and seeds again."""
    by_seed: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What as many rows again would bring."""

    rows: int
    score: float
    gain: float
    """From the power law's own figure at all rows."""
    gain_interval: tuple[float, float]
    verdict: str
    """What follows, in a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskCurve:
    """How one task's score, or the mean of all, grows with the rows."""

    task: str
    metric: str
    dev_rows: int
    points: tuple[Point, ...]
    law: tuple[float, float, float]
    """a, b and c of score = a - b · rows^(-c)."""
    band: tuple[tuple[int, float, float], ...]
    """For some numbers of rows, the 95 % interval of the law."""
    forecast: Forecast

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        data = asdict(self)
        data["law"] = dict(zip("abc", self.law, strict=True))
        del data["band"]
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningCurve:
    """The curves of all tasks and of their mean, and the files that show them."""

    folder: Path
    curves: tuple[TaskCurve, ...]
    files: tuple[Path, ...]


def learning_curve(
    recipe: Recipe,
    *,
    shares: Sequence[float] = SHARES,
    num_seeds: int = 1,
    resume: bool = False,
    runs: str | Path = "runs",
    console: Console | None = None,
    dataset: Dataset | None = None,
    stops: StopSignals | None = None,
) -> LearningCurve:
    """Train `recipe` on shares of its rows; the folder ``runs/NAME-curve`` then holds the runs and what they show.

    A smaller share lies within a larger one, every task and label is in it alike, and the dev rows are the same.

    Args:
        recipe: what is trained.
        shares: of the train rows, rising, three or more, the last 1.
        num_seeds: how often each share is trained, with ``train.seed`` and the seeds after it; another seed chooses
            other rows too.
        resume: go on with the curve that the folder holds; runs that were evaluated are not repeated.
        runs: where the folder is made.
        console: where progress is shown; each training's own goes to ``training.log`` in its folder.
        dataset: what `load_dataset` made of the recipe, where that was read already.
        stops: the signals that ask for the end, where the caller catches them already.

    Raises:
        RecipeError, DataError: before anything is written.
        RunError, ResumeError: the folder holds a curve already, or none to resume, or one of other rows or settings.
        Stopped: a signal asked for the end, such as Ctrl-C; the training under way finished its step and was saved.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    shares = tuple(shares)
    _require_shares(shares, recipe)
    rows = TrialRows(recipe, dataset)
    whole = rows.of(recipe)
    if not whole.dev:
        raise RecipeError("A learning curve needs dev rows to score on: give data.dev or data.held_out.")
    seeds = [recipe.train.seed + number for number in range(num_seeds)]
    recipes = {(share, seed): _recipe_of(recipe, share, seed) for share in shares for seed in seeds}
    counts = {place: rows.of(own).count_rows() for place, own in recipes.items()}
    _require_growth(shares, [len(rows.of(recipes[share, seeds[0]]).train) for share in shares])
    folder = Path(runs) / f"{recipe.name}-curve"
    open_folder(folder, "curve", sign="data.json", resume=resume)
    require_same(RunFolder(folder), {"recipe": recipe.model_dump(mode="json"), "data": whole.fingerprint})
    with stops or StopSignals(partial(console.print, soft_wrap=True)) as catching:
        for (share, seed), own in recipes.items():
            console.print(f"{share * 100:g} % of the rows, seed {seed}: {len(rows.of(own).train)} rows", soft_wrap=True)
            _train_and_score(own, RunFolder(folder / own.name), rows.of(own), catching)
            free_memory()
    answers = {place: _Answers(folder / own.name) for place, own in recipes.items()}
    curves = _curves(whole.tasks, shares, seeds, counts, answers)
    shown = {curve.task for curve in curves}
    for task in whole.tasks:
        if task.name not in shown:
            console.print(f"note: {task.name} has too few train or dev rows for a curve of its own.", soft_wrap=True)
    return LearningCurve(folder=folder, curves=curves, files=_write(recipe, curves, folder, num_seeds))


def _require_shares(shares: Sequence[float], recipe: Recipe) -> None:
    told = ", ".join(f"{share * 100:g} %" for share in shares)
    if len(shares) < 3 or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
        raise RecipeError(f"The shares are {told}. Give three or more, rising, the last 100, such as 25,50,100.")
    if recipe.data.share != 1:
        raise RecipeError(f"data.share is {recipe.data.share:g}, but the curve sets it. Leave it out.")


def rises(rows: Sequence[int]) -> bool:
    """Whether there are more rows each time, and some at first: what a curve needs."""
    return rows[0] > 0 and all(fewer < more for fewer, more in itertools.pairwise(rows))


def _require_growth(shares: Sequence[float], rows: Sequence[int]) -> None:
    if not rises(rows):
        told = ", ".join(f"{share * 100:g} %: {count}" for share, count in zip(shares, rows, strict=True))
        raise RecipeError(f"The shares hold these numbers of rows: {told}. Give shares further apart, or more rows.")


def _recipe_of(recipe: Recipe, share: float, seed: int) -> Recipe:
    """The recipe of one training: complete, so that its run can be used as any other."""
    plain = recipe.model_dump(mode="json")
    plain["name"] = f"share-{share * 100:g}-seed-{seed}"
    plain["data"] |= {"share": share, "seed": recipe.rows_seed}
    plain["train"] |= {"seed": seed}
    return make_recipe(plain)


def _train_and_score(recipe: Recipe, run: RunFolder, dataset: Dataset, stops: StopSignals) -> None:
    """Leave a finished and evaluated run, going on from what is there."""
    with logging(run) as log:
        if not run.contract.exists():
            tune_model(recipe, resume="auto", runs=run.path.parent, console=log, dataset=dataset, stops=stops)
        if not (run.evaluations / "dev" / "report.json").exists():
            evaluate_run(run.path, base=False, shots=(), unconstrained=False, console=log)


class _Answers:
    """What a run answered to the dev rows, scored, and scored again for rows drawn anew."""

    def __init__(self, run: Path) -> None:
        scored = read_scored(run / "evaluations" / "dev", side=TUNED)
        rows = row_scores(scored.predictions, scored.tasks)
        self._tasks = scored.tasks
        self._rows = {
            task.name: [row for row, one in zip(rows, scored.predictions, strict=True) if one.task == task.name]
            for task in scored.tasks
        }

    def count(self, task: str) -> int:
        """The dev rows of the task."""
        return len(self._rows.get(task, ()))

    def score(self, task: Task) -> float:
        """The task's primary metric."""
        return task.summarise(add_counts([row.counts for row in self._rows[task.name]]))[task.primary_metric]

    def resampled(self, task: Task, seed: int) -> Floats:
        """The primary metric of `RESAMPLES` draws of the task's rows: the same draws for every run."""
        rows = self._rows[task.name]
        drawn = draws(len(rows), seed=seed, resamples=RESAMPLES)
        return np.array([task.summarise(counts)[task.primary_metric] for counts in resampled_counts(task, rows, drawn)])


def _curves(
    tasks: Sequence[Task],
    shares: Sequence[float],
    seeds: Sequence[int],
    counts: Mapping[tuple[float, int], Mapping[str, tuple[int, int]]],
    answers: Mapping[tuple[float, int], _Answers],
) -> tuple[TaskCurve, ...]:
    """One curve for each task that is scored and, where there are several, one for the mean."""
    any_run = answers[shares[0], seeds[0]]
    scored = [task for task in tasks if any_run.count(task.name)]
    figures: dict[str, Floats] = {}  # (shares, seeds)
    drawn: dict[str, Floats] = {}  # (shares, seeds, resamples)
    rows = {task.name: [counts[share, seeds[0]][task.name][0] for share in shares] for task in scored}
    for number, task in enumerate(scored):
        figures[task.name] = np.array([[answers[share, seed].score(task) for seed in seeds] for share in shares])
        drawn[task.name] = np.array(
            [[answers[share, seed].resampled(task, number) for seed in seeds] for share in shares]
        )
    names = [(task.name, task.primary_metric) for task in scored]
    if len(scored) > 1 and ALL_TASKS not in figures:
        names.append((ALL_TASKS, "mean"))
        rows[ALL_TASKS] = [sum(rows[task.name][place] for task in scored) for place in range(len(shares))]
        figures[ALL_TASKS] = np.mean([figures[task.name] for task in scored], axis=0)
        drawn[ALL_TASKS] = np.mean([drawn[task.name] for task in scored], axis=0)
    dev_rows = {task.name: any_run.count(task.name) for task in scored}
    dev_rows.setdefault(ALL_TASKS, min(dev_rows.values()))
    return tuple(
        make_curve(name, metric, shares, rows[name], figures[name], drawn[name], dev_rows=dev_rows[name])
        for name, metric in names
        if rises(rows[name])
    )


def make_curve(
    task: str,
    metric: str,
    shares: Sequence[float],
    rows: Sequence[int],
    figures: Floats,
    drawn: Floats,
    *,
    dev_rows: int,
) -> TaskCurve:
    """The curve through the mean figures of the seeds.

    Args:
        task: its name.
        metric: what the figures are.
        shares: of the rows, rising.
        rows: for each share, how many.
        figures: (shares, seeds).
        drawn: (shares, seeds, resamples), the figures of dev rows drawn again.
        dev_rows: how many dev rows the figures rest on.
    """
    num_seeds = figures.shape[1]
    chance = np.random.default_rng(0)
    chosen = chance.integers(num_seeds, size=(RESAMPLES, num_seeds))
    means = np.stack([one[chosen, np.arange(RESAMPLES)[:, None]].mean(axis=1) for one in drawn], axis=1)
    numbers = np.array(rows, dtype=float)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    points = tuple(
        Point(
            share=share,
            rows=count,
            score=float(figures[place].mean()),
            interval=(float(low[place]), float(high[place])),
            by_seed=tuple(figures[place].tolist()),
        )
        for place, (share, count) in enumerate(zip(shares, rows, strict=True))
    )
    law, laws = fit_power_law(numbers, figures.mean(axis=1)[None]), fit_power_law(numbers, means)
    return TaskCurve(
        task=task,
        metric=metric,
        dev_rows=dev_rows,
        points=points,
        law=(float(law.a[0]), float(law.b[0]), float(law.c[0])),
        band=_band(laws, rows),
        forecast=_forecast(law, laws, rows[-1], dev_rows=dev_rows, num_points=len(rows), num_seeds=num_seeds),
    )


def _band(laws: PowerLaw, rows: Sequence[int]) -> tuple[tuple[int, float, float], ...]:
    places = np.unique(np.geomspace(rows[0], 2 * rows[-1], 30).round().astype(int))
    bounds = [np.percentile(laws.at(float(place)), [2.5, 97.5]) for place in places]
    return tuple((int(place), float(low), float(high)) for place, (low, high) in zip(places, bounds, strict=True))


def _forecast(law: PowerLaw, laws: PowerLaw, rows: int, *, dev_rows: int, num_points: int, num_seeds: int) -> Forecast:
    """What twice as many rows would bring; the verdict says whether the points can tell."""
    gains = laws.at(2 * rows) - laws.at(rows)
    low, high = (float(bound) for bound in np.percentile(gains, [2.5, 97.5]))
    gain = float((law.at(2 * rows) - law.at(rows))[0])
    if dev_rows < FEWEST_DEV_ROWS:
        verdict = f"Cannot be told: {dev_rows} dev rows are too few to see a difference. Label more dev rows first."
    elif low >= MATTERS:
        verdict = "More rows pay."
    elif high < MATTERS:
        verdict = "More rows like these would bring little."
    else:
        seeds = "" if num_seeds > 1 else " or train several seeds (--seeds 3)"
        verdict = f"Cannot be told from {num_points} points: label more dev rows{seeds} to narrow the interval."
    return Forecast(
        rows=2 * rows, score=float(law.at(2 * rows)[0]), gain=gain, gain_interval=(low, high), verdict=verdict
    )


def _write(recipe: Recipe, curves: Sequence[TaskCurve], folder: Path, num_seeds: int) -> tuple[Path, ...]:
    data, page, picture = folder / "curve.json", folder / "curve.md", folder / "curve.png"
    write_json(data, {"recipe": recipe.name, "seeds": num_seeds, "tasks": [curve.to_json() for curve in curves]})
    write_text(page, write_page(recipe.name, curves, num_seeds=num_seeds))
    draw_curves(picture, curves)
    return data, page, picture
