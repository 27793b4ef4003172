"""What the verb train calls: one process, one of several, or those of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..launch import read_launch, require_alone
from ..stopping import StopSignals
from .base import err
from .spread import Spread
from .unattended import outliving_terminal

if TYPE_CHECKING:
    from ..train.ranks import Ranks


def own_console() -> Console:
    """Where this process tells of a training: nowhere when it is one of several and not the first."""
    launch = read_launch()
    return err if launch is None or launch.rank == 0 else Console(quiet=True)


def train_recipe(
    recipe: Path, overrides: list[str], resume: str | None, stops: StopSignals, spread: Spread | None
) -> None:
    """Train what the file `recipe` says: here, as one of several processes, or on a Ray cluster as `spread` says.

    Raises as `tune_model` and `train_on_ray`.
    """
    if spread is not None:
        require_alone("train --ray")
        return _train_here(recipe, overrides, resume, stops, spread=spread)
    if (launch := read_launch()) is not None:
        from ..train.ranks import joined  # first of all, so that what ends one process is told once and ends all

        with joined(launch) as ranks:
            return _train_here(recipe, overrides, resume, stops, ranks)
    return _train_here(recipe, overrides, resume, stops)


def _train_here(
    recipe: Path,
    overrides: list[str],
    resume: str | None,
    stops: StopSignals,
    ranks: Ranks | None = None,
    spread: Spread | None = None,
) -> None:
    from ..recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    with outliving_terminal(Path("runs") / loaded.name / "output.txt"):
        from ..dataset import load_dataset

        dataset = load_dataset(loaded)  # problems of the data show before torch takes its seconds to load
        from ..check.examine import check_recipe
        from ..check.terminal import print_briefly

        if ranks is None or ranks.is_first:
            print_briefly(check_recipe(loaded, str(recipe)), err)
        if spread is not None:
            from ..cluster.train import train_on_ray

            train_on_ray(
                loaded,
                resume=resume,
                workers=spread.workers,
                gpus_per_worker=spread.gpus_per_worker,
                address=spread.address,
                console=err,
                stops=stops,
            )
            return
        from ..tune import tune_model

        tune_model(
            loaded,
            resume=False if resume is None else resume,
            console=own_console(),
            dataset=dataset,
            stops=stops,
            ranks=ranks,
        )
