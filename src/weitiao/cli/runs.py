"""Verbs about run folders: runs, watch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from .base import app, err, out, reporting_errors

LOOK_AGAIN_SECONDS = 1.0
_WIDTH_OF_A_FILE = 200


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every loss.")] = False,
) -> None:
    """List the runs: how far each is, whether it runs, has finished or died, its best score and its loss."""
    from ..monitor.screen import runs_table
    from ..monitor.summary import find_runs

    with reporting_errors():
        found = find_runs(folder)
    if as_json:
        out.print(json.dumps([run.to_json() for run in found], ensure_ascii=False, indent=2))
        return
    if not found:
        err.print(f"There are no runs in {folder}.")
        return
    screen = _screen(None if out.is_terminal else _WIDTH_OF_A_FILE)
    screen.print(runs_table(found, width=screen.width))
    for run in found:
        if run.reason:
            out.print(f"{run.name}: {run.reason}")


def _screen(width: int | None = None) -> Console:
    """Where tables are cut at the edge, as `out` does not."""
    return Console(markup=False, emoji=False, highlight=False, width=width)


@app.command()
def watch(run: Annotated[Path, typer.Argument(help="A run, such as runs/rows: running or ended.")]) -> None:
    """Follow a training: progress, losses, dev scores, the last answers. Ends with the training, or with Ctrl-C.

    The training goes on whatever happens here. The exit code is 0 where the run has finished and 1 where it has not.
    """
    from ..errors import RunError
    from ..monitor.screen import watch_view
    from ..monitor.summary import summarise

    with reporting_errors():
        if not run.is_dir():
            raise RunError(f"There is no run folder {run}. Runs are made by: weitiao train RECIPE.yaml")
        shown = summarise(run)
        screen = _screen()
        try:
            with Live(console=screen, auto_refresh=False, vertical_overflow="crop") as live:
                while True:
                    live.update(watch_view(shown, width=screen.width), refresh=True)
                    if shown.status != "running":
                        break
                    time.sleep(LOOK_AGAIN_SECONDS)
                    shown = summarise(run)
        except KeyboardInterrupt:
            err.print("The training goes on.")
            return
        if not screen.is_terminal:  # there the display ends within its last line
            screen.print()
    if shown.status != "finished":
        raise typer.Exit(1)
