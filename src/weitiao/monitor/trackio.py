"""Trackio: a database on this machine, or a Space on Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import trackio

from ..recipe.monitor import Trackio
from .base import Ending, Monitor, MonitoredRun, Started


class TrackioMonitor(Monitor):
    """One run of Trackio, found again by its name whenever the run goes on."""

    name = "trackio"

    def __init__(self, options: Trackio) -> None:
        self._options = options

    def start(self, run: MonitoredRun) -> Started:
        self._run = trackio.init(
            project=self._options.project,
            name=run.name,
            space_id=self._options.space,
            config=run.recipe.model_dump(mode="json"),
            resume="allow" if run.reference else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        shown = self._options.space or f"trackio show --project {self._options.project}"
        return Started(reference=run.name, shown=shown)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._run.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: trackio.Image(str(path))}, step=step)

    def finish(self, ending: Ending) -> None:
        self._run.finish()
