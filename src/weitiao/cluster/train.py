"""A run trained by the workers of a Ray cluster; the result is that of one process.

Ray Train starts the workers, gives each its GPU, and starts all anew when one dies; they then go on from the newest
checkpoint.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import RunError
from ..recipe import Recipe
from ..runs import RunFolder, writing
from ..stopping import StopSignals
from .session import joined_cluster, machines_of, share_machines
from .train_worker import Exchange, Order, raise_end

MAX_FAILURES = 3
"""So often workers are started anew before the training is given up."""

_LOOK_SECONDS = 0.3
_PATIENCE_SECONDS = 120.0
"""So long without a worker until that is told."""


def train_on_ray(
    recipe: Recipe,
    *,
    resume: str | None = None,
    runs: str | Path = "runs",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    max_failures: int = MAX_FAILURES,
    console: Console | None = None,
    stops: StopSignals | None = None,
) -> RunFolder:
    """Train as `recipe` says by workers on a Ray cluster; ``runs/NAME`` then holds what `tune_model` leaves there.

    Args:
        recipe: what to train; the paths in it are relative to the working directory, which all machines see.
        resume: as for `tune_model`; workers that were started anew go on by themselves.
        runs: the folder of run folders, on storage that all machines see.
        workers: how many; None: one for each GPU, or for each machine without any.
        gpus_per_worker: 1 where there are GPUs, or 0.
        address: of the cluster; None: see `joined_cluster`.
        max_failures: how often the workers are started anew at most.
        console: where progress is shown.
        stops: the signals that ask for the end, where the caller catches them already.

    Raises:
        RunError: there is no cluster, no room in it, no common storage; a worker's error; workers die too often.
        Stopped: a signal asked for the end, and the run was saved.
    """
    if gpus_per_worker not in (None, 0, 1):
        raise RunError(f"--gpus-per-worker is {gpus_per_worker:g}; a worker that trains has one GPU (1) or none (0).")
    console = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    key = uuid.uuid4().hex
    exchange = Exchange(folder=Path(runs).resolve() / f".ray-{recipe.name}-{key[:8]}", key=key)
    order = Order(
        recipe=recipe,
        resume=resume,
        runs=Path(runs).resolve(),
        folder=Path.cwd(),
        exchange=exchange,
        width=console.width,
    )
    with writing(exchange.folder):
        exchange.make()
    with (
        stops or StopSignals(partial(console.print, soft_wrap=True)) as catching,
        joined_cluster(address, workers=workers, said=exchange.ray) as ray,
    ):
        share = share_machines(machines_of(ray), workers=workers, gpus_per_worker=gpus_per_worker)
        from .trainer import make_trainer, require_seen_everywhere  # only now: it loads ray

        require_seen_everywhere(ray, order)
        gpus = f" and {share.gpus:g} GPU" if share.gpus else ""
        console.print(f"Training by {share.workers} workers with {share.cpus} cores{gpus} each.")
        failure = _train(make_trainer(order, share, max_failures=max_failures), exchange, catching, console)
    ended = exchange.ended()
    if ended is None:
        raise RunError(
            f"The workers were started {_count_starts(exchange)} times and ended each time: {failure.rstrip('.')}. "
            f"What Ray says of it is in {exchange.ray}. What was saved stands whole; go on with --resume."
        )
    shutil.rmtree(exchange.folder)
    raise_end(ended)
    return RunFolder.open(Path(runs) / recipe.name)


def _train(trainer: Any, exchange: Exchange, stops: StopSignals, console: Console) -> str:
    """Let `trainer` train, show what the first worker says, and tell it of signals.

    Returns what Ray says of the end in a line, "" where nothing went wrong.
    """
    failures: list[str] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  # whatever ended it is told where the thread is waited for
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            failures.append(lines[-1] if lines else type(error).__name__)

    thread = threading.Thread(target=fit, name="weitiao-ray-train", daemon=True)
    told, waiting = False, time.monotonic() + _PATIENCE_SECONDS
    shown = 0
    with stops.deferring():
        thread.start()
        while True:
            running = thread.is_alive()
            shown = _show(exchange.said, shown, console)
            if not running:
                return failures[0] if failures else ""
            if time.monotonic() > waiting and not exchange.starts.exists():
                waiting = math.inf
                note = "note: still waiting for the workers to start; ray status shows who has the cluster."
                console.print(note, soft_wrap=True)
            if stops.asked and not told:
                told = True
                exchange.ask_to_stop(stops.asked)
            time.sleep(_LOOK_SECONDS)


def _show(said: Path, shown: int, console: Console) -> int:
    """Print the whole lines of `said` behind byte `shown`; returns behind which byte is to be gone on."""
    if not said.exists():
        return shown
    with said.open("rb") as stream:
        stream.seek(shown)
        text, end, _ = stream.read().rpartition(b"\n")
    if not end:
        return shown
    console.print(text.decode("utf-8", "replace"), soft_wrap=True)
    return shown + len(text) + 1


def _count_starts(exchange: Exchange) -> int:
    return len(exchange.starts.read_text(encoding="utf-8").splitlines()) if exchange.starts.exists() else 0
