"""Which process trains a run, how far it is and how it ended: state.json in the run folder.

The file is written when a training begins and ends, and every few seconds between. A process that is killed writes
nothing: whether one that was training still lives is asked of the system on the same machine, and told by the age of
the file's heartbeat on another.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Literal

import psutil

from ..errors import RunError
from ..runs import RunFolder, Sample, write_json
from .base import Ending

HEARTBEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 120.0
"""A process on another machine counts as dead when its heartbeat is older; shared folders show files late."""

_SAME_START_SECONDS = 2.0
"""Two processes of one number that started further apart are not the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What state.json holds; times are seconds since 1970."""

    status: Literal["running", "finished", "interrupted", "failed"]
    step: int
    """Optimiser steps done."""
    steps: int | None
    """Steps of the whole training; None before that is known."""
    first_step: int
    """Where this process began."""
    started: float
    """When the run was first trained."""
    begun: float
    """When this process began."""
    heartbeat: float
    step_at: float
    """When the last step was done."""
    pid: int
    process_started: float
    host: str
    reason: str = ""
    """Why a training failed."""

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of this process, scoring included; None before a step is done."""
        done = self.step - self.first_step
        return (self.step_at - self.begun) / done if done > 0 else None

    def is_alive(self, now: float) -> bool:
        """Whether the process that trains is there."""
        if self.status != "running":
            return False
        fresh = now - self.heartbeat < DEAD_AFTER_SECONDS
        if self.host != platform.node():
            return fresh
        try:
            process = psutil.Process(self.pid)
            there = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            # numbers are given again after a while; a clock that was set in between moves times of start
            return there and (fresh or abs(process.create_time() - self.process_started) < _SAME_START_SECONDS)
        except psutil.NoSuchProcess:
            return False


def read_state(run: RunFolder) -> RunState | None:
    """What state.json says; None where there is none, as in runs of older versions.

    Raises:
        RunError: the file is not what `Attendance` writes.
    """
    try:
        return RunState(**json.loads(run.state.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{run.state} cannot be read ({error}). Delete it: the next training writes it anew.") from None


def leads() -> bool:
    """Whether this process is the first, or the only one, of those that train a run together."""
    return os.environ.get("RANK", "0") == "0"  # as torchrun and Accelerate number them


def require_idle(run: RunFolder) -> None:
    """Raise RunError when another living process on this machine trains the run: two would spoil each other's files.

    Of processes on other machines the heartbeat alone tells, and it tells late that a machine is lost. Of several
    processes that train one run together, only the first asks.
    """
    if not leads():
        return
    state = read_state(run)
    here = state is not None and state.host == platform.node() and state.pid != os.getpid()
    if state is not None and here and state.is_alive(time.time()):
        raise RunError(
            f"{run.path} is being trained by process {state.pid}, which is at step {state.step}. Wait for its end or "
            f"stop it first; weitiao watch {run.path} shows it."
        )


class Attendance:
    """Keeps state.json while a run is trained; follows the training as `train` has its followers."""

    def __init__(self, run: RunFolder, *, say: Callable[[str], None]) -> None:
        """Raises RunError when another process trains the run; see `require_idle`."""
        require_idle(run)
        before, now = read_state(run), time.time()
        self._run, self._say, self._before = run, say, before
        self._state = RunState(
            status="running",
            step=0 if before is None else before.step,
            steps=None,
            first_step=0,
            started=now if before is None else before.started,
            begun=now,
            heartbeat=now,
            step_at=now,
            pid=os.getpid(),
            process_started=psutil.Process().create_time(),
            host=platform.node(),
        )
        self._lock, self._ended, self._silent = Lock(), Event(), False
        self._write(self._state)
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def begin(self, step: int, steps: int) -> None:
        """Training begins behind `step`."""
        now = time.time()
        self._state = replace(self._state, step=step, first_step=step, steps=steps, begun=now, step_at=now)
        self._write(self._state)

    def advance(self, step: int) -> None:
        """One step is done; the next heartbeat tells it."""
        self._state = replace(self._state, step=step, step_at=time.time())

    def record(self, line: Mapping[str, Any]) -> None:
        """A line was added to metrics.jsonl, where readers find it."""

    def show_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Dev rows were answered: samples.jsonl has them."""

    def drew(self, step: int, path: Path) -> None:
        """The curve was drawn anew."""

    def finish(self, ending: Ending, reason: str = "") -> None:
        """The training ended."""
        self._ended.set()
        self._thread.join()
        done = self._state.step > self._state.first_step
        if self._before is not None and self._before.status == ending == "finished" and not done:
            self._write(self._before)  # a finished run that was resumed stays as it was
            return
        self._write(replace(self._state, status=ending, reason=reason))

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self._write(self._state)

    def _write(self, state: RunState) -> None:
        if state is not self._before:
            state = replace(state, heartbeat=time.time())
        with self._lock:
            try:
                write_json(self._run.state, asdict(state))
            except RunError as error:
                if not self._silent:  # a full disk ends the training by itself, if it lasts
                    self._say(f"The run's state could not be told: {error}")
                self._silent = True
