"""A recipe trained again and again with other settings, to find those that score best on the dev rows.

Every trial is an ordinary run in the folder of the search. What was tried and found stands in a journal, so that a
search which was broken off goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ..dataset import Dataset
from ..errors import DivergedError, RecipeError, RunError, WeitiaoError
from ..recipe import Recipe
from ..runs import RunFolder, write_json, write_text
from ..stopping import StopSignals
from ..train.checkpoint import list_checkpoints, read_progress, require_same
from ..tune import tune_model
from .choosing import choose_values, require_optuna
from .pruning import judge
from .several import TrialRows, free_memory, logging, open_folder
from .space import Search, Space, apply_values, make_search
from .sweep_page import draw_parameters, show_values
from .trials import Journal, Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What a search found."""

    folder: Path
    search: Search
    trials: Sequence[Trial]
    """In the order in which they were begun."""
    best_recipe: Path | None
    """The recipe of the best trial, under a name of its own; None where no trial has a score."""
    files: tuple[Path, ...]
    """What was written about all trials together."""

    @property
    def ranked(self) -> list[Trial]:
        """Trials with a score, best first, then the others."""
        return rank(self.trials)

    @property
    def best(self) -> Trial | None:
        """The best trial; None where none has a score."""
        first = next(iter(self.ranked), None)
        return first if first is not None and first.counts else None


def rank(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with a score, best first, then the others; of equal ones the earlier first."""
    return sorted(trials, key=lambda trial: (not trial.counts, -(trial.best or 0.0), trial.number))


def sweep_recipe(
    recipe: Recipe,
    space: Space,
    *,
    resume: bool = False,
    runs: str | Path = "runs",
    console: Console | None = None,
    dataset: Dataset | None = None,
    stops: StopSignals | None = None,
) -> Sweep:
    """Search `space` around `recipe`; the folder ``runs/NAME-sweep`` then holds a run for every trial and the results.

    Trials that diverge or fail are results too. A broken-off search goes on with `resume`: finished trials are not
    repeated, one that was under way goes on from its last checkpoint, one that failed is tried once more.

    Args:
        recipe: what all trials have in common.
        space: what varies, and how it is chosen.
        resume: go on with the search that the folder holds.
        runs: where the folder is made.
        console: where progress is shown; each trial's own goes to ``training.log`` in its folder.
        dataset: what `load_dataset` made of the recipe, where that was read already.
        stops: the signals that ask for the end, where the caller catches them already.

    Raises:
        RecipeError, DataError: before anything is written.
        RunError: the folder holds a search already, or none to resume, or cannot be written; the first trials
            all failed alike.
        ResumeError: recipe, space or rows are others than when the search began.
        Stopped: a signal asked for the end, such as Ctrl-C; the trial under way finished its step and was saved.
    """
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    require_optuna(space)
    search = make_search(recipe, space)
    rows = TrialRows(recipe, dataset)
    dataset = rows.of(recipe)
    if recipe.train.evaluate_every == "never" or not dataset.dev:
        raise RecipeError(
            "A search needs dev rows that are scored while training: give data.dev or data.held_out, and "
            "train.evaluate_every."
        )
    folder = open_folder(Path(runs) / f"{recipe.name}-sweep", "search", sign="sweep.json", resume=resume)
    depends_on = {"recipe": recipe.model_dump(mode="json"), "space": search.to_json(), "data": dataset.fingerprint}
    require_same(RunFolder(folder), depends_on)
    journal = Journal(folder / "trials.jsonl")
    write_json(folder / "sweep.json", _results(recipe, search, journal.trials))
    with stops or StopSignals(partial(console.print, soft_wrap=True)) as catching:
        run = partial(_run_trial, recipe, search, journal, folder=folder, rows=rows, console=console, stops=catching)
        for trial in journal.trials:
            if trial.state in ("running", "failed"):
                journal.again(trial)
                run(trial)
        while len(journal.trials) < search.num_trials:
            values = choose_values(search, journal.trials)
            if values is None:
                console.print(f"All {len(journal.trials)} combinations were tried.", soft_wrap=True)
                break
            run(journal.begin(values))
    return _finish(recipe, search, journal.trials, folder)


def _run_trial(
    recipe: Recipe,
    search: Search,
    journal: Journal,
    trial: Trial,
    *,
    folder: Path,
    rows: TrialRows,
    console: Console,
    stops: StopSignals,
) -> None:
    """Train `trial`, which is under way in the journal, and write down how it ended."""
    run = RunFolder(folder / trial.name)
    reached = [read_progress(checkpoint).step for checkpoint in list_checkpoints(run)]
    trial.scores = {step: score for step, score in trial.scores.items() if step <= max(reached, default=0)}
    others = [other for other in journal.trials if other is not trial]
    console.print(f"{trial.name} of {search.num_trials}: {show_values(trial.values)}", soft_wrap=True)

    def on_score(step: int, steps: int, score: float) -> str:
        journal.score(trial, step=step, steps=steps, score=score)
        why = judge(search.space, trial, others) if step < steps else ""
        console.print(f"  step {step} of {steps}: dev score {score:.3f}", soft_wrap=True)
        return f"Stopped at step {step} of {steps}: {why}." if why else ""

    started = time.monotonic()

    def seconds() -> float:
        return time.monotonic() - started

    try:
        own = apply_values(recipe, trial.values, name=trial.name)
        with logging(run) as log:
            dataset = rows.of(own)
            tune_model(own, resume="auto", runs=folder, console=log, dataset=dataset, on_score=on_score, stops=stops)
        ended = read_progress(list_checkpoints(run)[-1]).ended
        journal.end(trial, "stopped" if ended else "finished", reason=ended, seconds=seconds())
    except DivergedError as error:
        journal.end(trial, "diverged", reason=str(error), seconds=seconds())
    except RunError:
        raise  # the disk is full, or the folder was meddled with: the next trial would fare no better
    except (WeitiaoError, torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).strip() or type(error).__name__
        journal.end(trial, "failed", reason=reason, seconds=seconds())
    free_memory()
    console.print(f"  {_outcome(trial, others)}", soft_wrap=True)
    write_json(folder / "sweep.json", _results(recipe, search, journal.trials))
    _require_hope(journal.trials)


def _outcome(trial: Trial, others: Sequence[Trial]) -> str:
    if not trial.counts or trial.best is None:
        return f"{trial.state}: {next(iter(trial.reason.splitlines()), 'no dev row could be scored')}"
    best = max((other.best for other in others if other.counts and other.best is not None), default=None)
    place = "the best so far" if best is None or trial.best > best else f"the best has {best:.3f}"
    return f"{trial.reason or 'Finished.'} Dev score {trial.best:.3f}, {place}."


def _require_hope(trials: Sequence[Trial]) -> None:
    """Raise RunError when the first trials all failed for one reason, which then is none of the values tried."""
    if len(trials) == 2 and all(trial.state == "failed" for trial in trials) and len({t.reason for t in trials}) == 1:
        raise RunError(f"The first two trials failed alike. Mend this, then go on with --resume:\n{trials[0].reason}")


def _results(recipe: Recipe, search: Search, trials: Sequence[Trial]) -> Mapping[str, object]:
    return {
        "recipe": recipe.name,
        "best_by": recipe.evaluate.best_by,
        "space": search.space.model_dump(mode="json"),
        "trials": [trial.to_json() for trial in rank(trials)],
    }


def _finish(recipe: Recipe, search: Search, trials: Sequence[Trial], folder: Path) -> Sweep:
    """Write what is to be said of all trials."""
    table, picture, best_recipe = folder / "sweep.json", folder / "parameters.png", folder / "best.yaml"
    write_json(table, _results(recipe, search, trials))
    draw_parameters(picture, search, trials)
    best = next((trial for trial in rank(trials) if trial.counts), None)
    if best is not None:
        write_text(best_recipe, apply_values(recipe, best.values, name=f"{recipe.name}-best").to_yaml())
    return Sweep(
        folder=folder,
        search=search,
        trials=tuple(trials),
        best_recipe=best_recipe if best is not None else None,
        files=(table, picture, *([best_recipe] if best is not None else [])),
    )
