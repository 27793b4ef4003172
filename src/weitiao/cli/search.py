"""Verbs that train one recipe many times: sweep, learning-curve."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import RecipeError
from ..stopping import Stopped, StopSignals
from .base import Overrides, RecipeArgument, app, err, out, reporting_errors

if TYPE_CHECKING:
    from ..search.sweep import Sweep


@contextmanager
def _stoppable(
    folder_ending: str, recipe: Path, overrides: list[str] | None, words: list[str]
) -> Iterator[StopSignals]:
    """Errors told, and after a signal the command that goes on: the same, with --resume once the folder has begun."""
    with reporting_errors(), StopSignals(partial(err.print, soft_wrap=True)) as stops:
        try:
            yield stops
        except Stopped as stopped:
            from ..recipe import load_recipe

            name = load_recipe(recipe, overrides or ()).name
            begun = (Path("runs") / f"{name}{folder_ending}" / "data.json").exists()
            again = shlex.join(["weitiao", *words, *(overrides or ()), *(["--resume"] if begun else [])])
            raise Stopped(stopped.signal_name, go_on=again) from None


Resume = Annotated[bool, typer.Option("--resume", help="Go on where it was broken off.")]


@app.command()
def sweep(
    recipe: RecipeArgument,
    space: Annotated[
        Path, typer.Argument(help="A YAML file of what to vary: parameters, search, trials, prune, seed.")
    ],
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train the recipe with other settings again and again, to find those that score best on the dev rows.

    Each trial is an ordinary run in runs/NAME-sweep. Poor ones are stopped early; diverged ones are results too.

    A space: {search: random, trials: 20, parameters: {train.learning_rate: {low: 1e-5, high: 1e-3, scale: log},
    method.rank: [8, 16, 32]}}
    """
    from ..recipe import load_recipe

    with _stoppable("-sweep", recipe, overrides, ["sweep", str(recipe), str(space)]) as stops:
        loaded = load_recipe(recipe, overrides or ())
        from ..dataset import load_dataset
        from ..search.space import load_space, make_search

        declared = load_space(space)
        make_search(loaded, declared)  # a wrong space shows before the rows are read
        dataset = load_dataset(loaded)
        from ..search.sweep import sweep_recipe

        found = sweep_recipe(loaded, declared, resume=resume, console=err, dataset=dataset, stops=stops)
    _print_trials(found)


def _print_trials(found: Sweep) -> None:
    """All trials, best first, and where to go from here."""
    from ..search.sweep_page import show_value

    keys = [parameter.key for parameter in found.search.parameters]
    short = [key.rpartition(".")[2] for key in keys]
    headings = [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]
    table = Table("trial", "dev score", "state", *headings, "steps", "minutes")
    for trial in found.ranked:
        score = f"{trial.best:.3f}" if trial.counts and trial.best is not None else "—"
        values = [show_value(trial.values[key]) for key in keys]
        steps = f"{max(trial.scores, default=0)}/{trial.steps}"
        table.add_row(trial.name, score, trial.state, *values, steps, f"{trial.seconds / 60:.1f}")
    out.print(table, soft_wrap=False)
    for file in found.files:
        out.print(str(file))
    if found.best is not None:
        out.print(f"The best trial is a run of its own: weitiao evaluate {found.folder / found.best.name}")


@app.command("learning-curve")
def learning_curve(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    shares: Annotated[str, typer.Option(help="Shares of the train rows in percent, rising.")] = "25,50,100",
    seeds: Annotated[int, typer.Option(min=1, max=20, help="How often each share is trained, with other seeds.")] = 1,
    resume: Resume = False,
) -> None:
    """Train on a quarter, a half and all of the rows: does labelling more pay?

    Shows each task's score by rows, and what as many rows again are foretold to bring. The runs are in runs/NAME-curve.
    """
    from ..recipe import load_recipe

    words = ["learning-curve", str(recipe), "--shares", shares, "--seeds", str(seeds)]
    with _stoppable("-curve", recipe, overrides, words) as stops:
        percents = _percents(shares)
        loaded = load_recipe(recipe, overrides or ())
        from ..dataset import load_dataset

        dataset = load_dataset(loaded)
        from ..search.curve_page import describe_forecast
        from ..search.learning_curve import learning_curve as measure

        found = measure(
            loaded,
            shares=[percent / 100 for percent in percents],
            num_seeds=seeds,
            resume=resume,
            console=err,
            dataset=dataset,
            stops=stops,
        )
    table = Table("task", "metric", *(f"{percent:g} %" for percent in percents))
    for curve in found.curves:
        cells = [f"{point.score:.3f} ({point.rows} rows)" for point in curve.points]
        table.add_row(curve.task, curve.metric, *cells)
    out.print(table, soft_wrap=False)
    for curve in found.curves:
        out.print(describe_forecast(curve))
    for file in found.files:
        out.print(str(file))


def _percents(text: str) -> list[float]:
    """The numbers in ``25,50,100``. Raises RecipeError."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--shares is {text!r}. Write percents with commas between them, such as 25,50,100."
        ) from None
