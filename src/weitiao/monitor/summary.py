"""What a run folder tells of its run, whether it trains, has ended or was killed; reads files only, loads no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import RunError
from ..runs import RunFolder, Sample
from .state import RunState, read_state

Status = Literal["running", "finished", "interrupted", "died", "stopped", "unreadable"]
"""`died`: the process was killed, or ended with an error. `stopped`: unfinished, and of a version that did not tell."""

_STATUS_WITH_STEP = ("interrupted", "died", "stopped")
_DEEPEST = 3
"""Runs are looked for so many folders deep: a search keeps its trials in folders of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """One run as it stands now."""

    name: str
    """Its folder, as seen from the folder of runs."""
    path: Path
    status: Status
    step: int = 0
    steps: int | None = None
    reason: str = ""
    """Why it died or cannot be read, where that is known."""
    model: str = ""
    method: str = ""
    best_score: float | None = None
    """The figure that chooses the adapter, of the best scoring; None where no rows were scored."""
    best_step: int | None = None
    started: float | None = None
    """Seconds since 1970; None when unknown."""
    seconds: float | None = None
    """Time spent training, all sittings together; None when unknown."""
    seconds_left: float | None = None
    """Of a running training; None before its speed is known."""
    lines: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """The lines of metrics.jsonl."""
    samples: tuple[tuple[int, tuple[Sample, ...]], ...] = field(default=(), repr=False)

    @property
    def train_lines(self) -> list[dict[str, Any]]:
        """The lines written every `log_every` steps."""
        return [line for line in self.lines if line["kind"] == "train"]

    @property
    def dev_lines(self) -> list[dict[str, Any]]:
        """The lines written at every scoring."""
        return [line for line in self.lines if line["kind"] == "dev"]

    @property
    def losses(self) -> list[float]:
        """The loss of every log line."""
        return [line["loss"] for line in self.train_lines]

    def told_status(self) -> str:
        """``running``, ``finished``, ``died at step 12`` …"""
        return f"{self.status} at step {self.step}" if self.status in _STATUS_WITH_STEP else self.status

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy, for `weitiao runs --json`."""
        values = {key: value for key, value in asdict(self).items() if key not in ("lines", "samples")}
        last = self.dev_lines[-1] if self.dev_lines else {}
        return {
            **values,
            "path": str(self.path),
            "last_loss": self.losses[-1] if self.losses else None,
            "losses": self.losses,
            "scores": last.get("scores", {}),
        }


def find_runs(folder: str | Path) -> list[RunSummary]:
    """The runs in `folder`, oldest first; `folder` may also be one run.

    Raises:
        RunError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}. Runs are made by: weitiao train RECIPE.yaml")
    found = [summarise(path, name=str(path.relative_to(folder))) for path in _run_folders(folder, _DEEPEST)]
    return sorted(found, key=lambda run: (run.started or math.inf, run.name))


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "recipe.yaml").is_file() or (folder / "state.json").is_file():
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _run_folders(path, depth - 1)


def summarise(path: str | Path, *, name: str = "") -> RunSummary:
    """The run in the folder `path` as it stands now; one that cannot be read says why."""
    run = RunFolder(path)
    name = run.path.name if name in ("", ".") else name
    try:
        state, recipe, lines = read_state(run), _read_recipe(run), tuple(run.read_metrics())
        samples = tuple(run.read_samples())
    except (RunError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        return RunSummary(name=name, path=run.path, status="unreadable", reason=str(error).partition("\n")[0])
    now = time.time()
    last = [line for line in lines if line["kind"] == "train"][-1:]
    step = max([line["step"] for line in lines] + ([state.step] if state is not None else []), default=0)
    status, reason = _status(run, state, now)
    scored = [line for line in lines if line["kind"] == "dev" and line["scores"] and "overall" in line]
    best = max(scored, key=lambda line: line["overall"], default=None)
    return RunSummary(
        name=name,
        path=run.path,
        status=status,
        step=step,
        steps=None if state is None else state.steps,
        reason=reason,
        model=_part(recipe, "model", "path"),
        method=_part(recipe, "method", "name"),
        best_score=None if best is None else best["overall"],
        best_step=None if best is None else best["step"],
        started=_started(run, state),
        seconds=last[0].get("seconds") if last else None,
        seconds_left=_seconds_left(state) if status == "running" else None,
        lines=lines,
        samples=samples,
    )


def _status(run: RunFolder, state: RunState | None, now: float) -> tuple[Status, str]:
    if state is None:
        return ("finished" if run.contract.is_file() else "stopped"), ""
    if state.status == "running":
        return ("running", "") if state.is_alive(now) else ("died", "the process was killed")
    return ("died" if state.status == "failed" else state.status), state.reason


def _seconds_left(state: RunState | None) -> float | None:
    if state is None or state.steps is None or state.seconds_per_step is None:
        return None
    return state.seconds_per_step * (state.steps - state.step)


def _started(run: RunFolder, state: RunState | None) -> float | None:
    if state is not None:
        return state.started
    return run.recipe.stat().st_mtime if run.recipe.is_file() else None


def _read_recipe(run: RunFolder) -> Mapping[str, Any]:
    """The run's recipe as it stands there: one of an older version need not be valid today."""
    if not run.recipe.is_file():  # a training that has only begun
        return {}
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    if not isinstance(recipe, Mapping):
        raise ValueError(f"{run.recipe} holds no recipe.")
    return recipe


def _part(recipe: Mapping[str, Any], part: str, key: str) -> str:
    values = recipe.get(part)
    return str(values.get(key, "")) if isinstance(values, Mapping) else str(values or "")
