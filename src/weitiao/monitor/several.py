"""The monitors of one training, each in a thread of its own: training neither waits for one nor ends with one.

A tool may wait for a dead network for minutes, take Ctrl-C for itself, or raise whatever it likes. So it is only ever
called in its own thread, behind a queue. One that fails is said once and left out from there on; metrics.jsonl keeps
every figure whatever happens here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from ..errors import RunError
from ..recipe import Recipe
from ..recipe.monitor import AnyMonitor
from ..runs import RunFolder, Sample, write_json
from .base import Ending, Monitor, MonitoredRun, Started
from .choosing import make_monitor
from .figures import flat_figures

START_SECONDS = 120.0
"""After so long without an answer a tool counts as failed to start."""

FINISH_SECONDS = 60.0
"""How long the end of a training waits for a tool to send what is left."""

_MOST_WAITING = 1000
"""A tool behind which so many messages wait does not get through, and is left out."""

_COLUMNS = ("task", "source", "question", "gold", "answer")
_Job = Callable[[Monitor], None]


class Monitors:
    """All monitors of one training; follows it as `train` has its followers."""

    def __init__(self, watched: Sequence[_Watched]) -> None:
        self._watched = watched

    def begin(self, step: int, steps: int) -> None:
        """Training begins behind `step`."""
        self._each(lambda monitor: monitor.go_on(step))

    def advance(self, step: int) -> None:
        """One step is done: nothing that a monitor shows."""

    def record(self, line: Mapping[str, Any]) -> None:
        """A line was added to metrics.jsonl."""
        step, figures = int(line["step"]), flat_figures(line)
        self._each(lambda monitor: monitor.log(step, figures))

    def show_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Dev rows were answered."""
        rows = [[getattr(sample, column) for column in _COLUMNS] for sample in samples]
        for watched in self._watched:
            if watched.options.tables:
                watched.put(lambda monitor: monitor.table(step, "dev/samples", _COLUMNS, rows))

    def drew(self, step: int, path: Path) -> None:
        """The curve was drawn anew."""
        self._each(lambda monitor: monitor.image(step, "curve", path))

    def finish(self, ending: Ending) -> None:
        """The training ended; waits a little for what is still to be sent."""
        for watched in self._watched:
            watched.close(ending)
        for watched in self._watched:
            watched.wait()

    def _each(self, job: _Job) -> None:
        for watched in self._watched:
            watched.put(job)


def start_monitors(
    options: Sequence[AnyMonitor], run: RunFolder, recipe: Recipe, *, resume: bool, say: Callable[[str], None]
) -> Monitors:
    """The monitors that `options` describe, started; where each can be looked at goes to `say`.

    Raises:
        RunError: one cannot be started. A run that is resumed does without it instead, and says so: what restarts it
            at night may find the network gone.
    """
    references: dict[str, str] = json.loads(run.monitors.read_text(encoding="utf-8")) if run.monitors.exists() else {}
    watched: list[_Watched] = []
    for number, each in enumerate(options):
        same = [one.name for one in options[:number]].count(each.name)
        key = each.name if not same else f"{each.name}-{same + 1}"
        about = MonitoredRun(
            name=recipe.name, folder=run.path, recipe=recipe, reference=references.get(key, "") if resume else ""
        )
        one = _Watched(each, about, say)
        try:
            started = one.start()
        except RunError as error:
            if not resume:
                Monitors(watched).finish("failed")
                raise
            say(f"{error} The training goes on without it.")
            continue
        watched.append(one)
        references[key] = started.reference
        if started.shown:
            say(f"monitor {each.name}: {without_secrets(started.shown)}")
    if options:
        write_json(run.monitors, references)
    return Monitors(watched)


class _Watched:
    """One monitor and its thread."""

    def __init__(self, options: AnyMonitor, run: MonitoredRun, say: Callable[[str], None]) -> None:
        self.options = options
        self._run, self._say = run, say
        self._jobs: Queue[_Job | None] = Queue()
        self._ending: Ending = "failed"
        self._failed = False
        self._started: Future[Started] = Future()
        self._thread = Thread(target=self._work, name=f"monitor {options.name}", daemon=True)

    def start(self) -> Started:
        """Raises RunError when the tool cannot be started."""
        self._thread.start()
        try:
            return self._started.result(START_SECONDS)
        except TimeoutError:
            reason = f"it gave no answer in {START_SECONDS:.0f} seconds"
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a tool raises is told in one sentence
            reason = _told(error)
        raise RunError(
            f"The monitor {self.options.name} could not be started: {reason.rstrip('.')}. Mend that, change monitor in "
            f"the recipe, or leave it out with monitor=[]."
        )

    def put(self, job: _Job) -> None:
        if self._failed:
            return
        if self._jobs.qsize() >= _MOST_WAITING:
            self._fail(f"{_MOST_WAITING} messages wait for it")
            return
        self._jobs.put(job)

    def close(self, ending: Ending) -> None:
        self._ending = ending
        self._jobs.put(None)

    def wait(self) -> None:
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive() and not self._failed:
            self._fail(f"not everything was sent within {FINISH_SECONDS:.0f} seconds of the end")

    def _work(self) -> None:
        try:
            monitor = make_monitor(self.options)
            self._started.set_result(monitor.start(self._run))
        except (Exception, SystemExit) as error:  # noqa: BLE001  `start` tells it
            self._started.set_exception(error)
            return
        try:
            while (job := self._jobs.get()) is not None:
                job(monitor)
            monitor.finish(self._ending)
        except (Exception, SystemExit) as error:  # noqa: BLE001  training goes on whatever a tool raises
            self._fail(_told(error))

    def _fail(self, reason: str) -> None:
        self._failed = True
        self._say(
            f"The monitor {self.options.name} has failed ({reason.rstrip('.')}) and is left out from here on. The "
            f"training is not touched; metrics.jsonl has all figures."
        )


def _told(error: BaseException) -> str:
    """The first line of what `error` says, without any secret in it."""
    text = without_secrets(str(error)).strip().partition("\n")[0]
    return text if isinstance(error, RunError) else f"{type(error).__name__}: {text}"


def without_secrets(text: str) -> str:
    """`text` with ``***`` in place of keys that stand in the environment and of passwords in addresses."""
    for name, value in os.environ.items():
        if len(value) >= 6 and any(word in name.upper() for word in ("KEY", "TOKEN", "PASSWORD", "SECRET")):
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s]+@", "://***@", text)
