"""Verbs that train one recipe many times: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .base import Overrides, RecipeArgument, app, err, out, reporting_errors

if TYPE_CHECKING:
    from ..search.sweep import Sweep

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

    with reporting_errors():
        loaded = load_recipe(recipe, overrides or ())
        from ..dataset import load_dataset
        from ..search.space import load_space, make_search

        declared = load_space(space)
        make_search(loaded, declared)  # a wrong space shows before the rows are read
        dataset = load_dataset(loaded)
        from ..search.sweep import sweep_recipe

        found = sweep_recipe(loaded, declared, resume=resume, console=err, dataset=dataset)
    _print_trials(found)


def _print_trials(found: Sweep) -> None:
    """All trials, best first, and where to go from here."""
    from ..search.sweep_page import show_value

    keys = [parameter.key for parameter in found.search.parameters]
    table = Table("trial", "dev score", "state", *keys, "steps", "minutes")
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
