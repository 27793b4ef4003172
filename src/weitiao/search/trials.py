"""The trials of a search and their journal: one line for whatever happens, so that a broken-off search can go on.

Knows values, scores and lines of JSON; knows nothing of recipes or training.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import RunError
from ..runs import write_text, writing

State = Literal["running", "finished", "stopped", "diverged", "failed"]
"""stopped: for being worse than others. diverged: its loss was no number any more. failed: by any other error."""


@dataclass(kw_only=True, slots=True)
class Trial:
    """One training of the search."""

    number: int
    values: Mapping[str, Any]
    state: State = "running"
    reason: str = ""
    """Why it was stopped or failed."""
    seconds: float = 0.0
    scores: dict[int, float] = field(default_factory=dict)
    """For each step at which the dev rows were scored, the figure; higher is better."""
    steps: int = 0
    """Optimiser steps of the whole training."""

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"trial-{self.number:03}"

    @property
    def best(self) -> float | None:
        """The best figure so far; None before the first scoring."""
        return max(self.scores.values(), default=None)

    @property
    def counts(self) -> bool:
        """Whether its best figure may be compared with others'."""
        return self.state in ("finished", "stopped") and bool(self.scores)

    def best_at(self, scoring: int) -> float | None:
        """The best figure of its first `scoring` scorings; None where it had fewer."""
        figures = [self.scores[step] for step in sorted(self.scores)][:scoring]
        return max(figures) if len(figures) == scoring else None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy, with the best score."""
        return {
            "trial": self.name,
            "state": self.state,
            "score": self.best,
            "values": dict(self.values),
            "scores": [{"step": step, "score": self.scores[step]} for step in sorted(self.scores)],
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "reason": self.reason,
        }


class Journal:
    """The trials of one search, in a file of JSON lines that is only ever added to."""

    def __init__(self, path: Path) -> None:
        """The journal at `path`, with the trials written there. Raises RunError where it is damaged."""
        self._path = path
        self.trials: list[Trial] = []
        if path.exists():
            self._read()

    def begin(self, values: Mapping[str, Any]) -> Trial:
        """A new trial, written down before it starts."""
        trial = Trial(number=len(self.trials), values=values)
        self._write({"trial": trial.number, "values": dict(values)})
        self.trials.append(trial)
        return trial

    def again(self, trial: Trial) -> None:
        """A trial that was broken off or failed starts anew from its last checkpoint."""
        trial.state, trial.reason = "running", ""
        self._write({"trial": trial.number, "state": "running", "reason": "", "seconds": trial.seconds})

    def score(self, trial: Trial, *, step: int, steps: int, score: float) -> None:
        """The dev rows of `trial` were scored; a step scored again replaces what was found before."""
        trial.scores[step], trial.steps = score, steps
        self._write({"trial": trial.number, "step": step, "steps": steps, "score": score})

    def end(self, trial: Trial, state: State, *, reason: str = "", seconds: float) -> None:
        """`trial` is over."""
        trial.state, trial.reason = state, reason
        trial.seconds += seconds
        self._write({"trial": trial.number, "state": state, "reason": reason, "seconds": trial.seconds})

    def _write(self, line: Mapping[str, Any]) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> None:
        whole, _, cut = self._path.read_bytes().rpartition(b"\n")
        if cut:  # a crash came in the middle of the last line
            with contextlib.suppress(UnicodeDecodeError):
                write_text(self._path, whole.decode("utf-8") + "\n" if whole else "")
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                self._take_in(json.loads(text))
            except (ValueError, KeyError, IndexError, TypeError):
                raise RunError(
                    f"{self._path}, line {number}, is none of this program's. Delete the folder to begin anew."
                ) from None

    def _take_in(self, line: Mapping[str, Any]) -> None:
        if "values" in line:
            assert line["trial"] == len(self.trials), "trials are written down in order"
            self.trials.append(Trial(number=line["trial"], values=line["values"]))
            return
        trial = self.trials[line["trial"]]
        if "step" in line:
            trial.scores[line["step"]], trial.steps = line["score"], line["steps"]
        else:
            trial.state, trial.reason, trial.seconds = line["state"], line["reason"], line["seconds"]
