"""SwanLab: online, shown on this machine by `swanlab watch`, or kept for a later `swanlab sync`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import swanlab

from ..recipe.monitor import SwanLab
from .base import Ending, Monitor, MonitoredRun, Started

_ENDINGS = {"finished": "success", "interrupted": "aborted", "failed": "crashed"}


class SwanLabMonitor(Monitor):
    """One SwanLab run. Online it is the same one whenever the run goes on; files on disk begin a new one each time."""

    name = "swanlab"

    def __init__(self, options: SwanLab) -> None:
        self._options = options

    def start(self, run: MonitoredRun) -> Started:
        options = self._options
        settings = swanlab.Settings(
            interactive=False,  # a prompt would wait all night; `swanlab login` was done before, or is named
            terminal={"proxy_type": "none"},
            probe={"git": False},  # a remote's address may hold a token
        )
        online = options.mode == "cloud"
        self._run = swanlab.init(
            mode="online" if online else options.mode,
            project=options.project,
            workspace=options.workspace,
            name=run.name,
            id=run.reference if online and run.reference else None,
            resume="allow" if online else None,
            log_dir=options.folder,
            config=run.recipe.model_dump(mode="json"),
            settings=settings,
        )
        if online:
            return Started(reference=self._run.id, shown=str(self._run.url))
        shown = {
            "local": f"swanlab watch {options.folder}",
            "offline": f"swanlab sync {self._run.dir}" if options.mode == "offline" else "",
        }
        return Started(shown=shown.get(options.mode, ""))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = swanlab.echarts.Table().add(list(columns), [list(row) for row in rows])
        self._run.log({name: table}, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: swanlab.Image(str(path))}, step=step)

    def finish(self, ending: Ending) -> None:
        error = "see the terminal of the training" if ending == "failed" else None
        self._run.finish(state=_ENDINGS[ending], error=error)
