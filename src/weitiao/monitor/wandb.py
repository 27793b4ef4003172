"""Weights & Biases: online, or kept for a later `wandb sync`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb

from ..errors import RunError
from ..recipe.monitor import Wandb
from .base import Ending, Monitor, MonitoredRun, Started


class WandbMonitor(Monitor):
    """One run of Weights & Biases, the same one whenever the run goes on."""

    name = "wandb"

    def __init__(self, options: Wandb) -> None:
        self._options = options

    def start(self, run: MonitoredRun) -> Started:
        options = self._options
        if options.mode == "online" and not wandb.login(prompt=False):  # asking would wait all night
            raise RunError("nobody is logged in. Run wandb login, set WANDB_API_KEY, or write mode: offline.")
        reference = run.reference or secrets.token_hex(4)
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=run.name,
            id=reference,
            resume="allow",
            mode=options.mode,
            dir=options.folder,
            config=run.recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        shown = ""
        if options.mode == "online":
            shown = str(self._run.url)
        elif options.mode == "offline":
            shown = f"wandb sync {Path(self._run.dir).parent}"
        return Started(reference=reference, shown=shown)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: wandb.Image(str(path))}, step=step)

    def finish(self, ending: Ending) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)
