"""What every monitor can do, whichever tool stands behind it.

A monitor is used from one thread, its own, from `start` to `finish`. It may raise whatever its tool raises:
`several.py` decides what that means for the training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..recipe import Recipe

Ending = Literal["finished", "interrupted", "failed"]
"""How a training ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitoredRun:
    """The run that a monitor is to show."""

    name: str
    folder: Path
    recipe: Recipe
    reference: str = ""
    """What `start` returned when the run was last trained; empty for a new run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a monitor tells of itself once it runs."""

    reference: str = ""
    """By which the tool finds the same run again when training goes on; kept in the run folder, so no secret."""
    shown: str = ""
    """Where the run can be looked at: an address or a command; for the terminal only."""


class Monitor(ABC):
    """One tool that shows a run."""

    name: str
    """As the recipe calls it."""

    @abstractmethod
    def start(self, run: MonitoredRun) -> Started:
        """Begin to show `run`, or go on showing it."""

    def go_on(self, step: int) -> None:  # noqa: B027  most tools take figures again without being told
        """Training begins behind `step`: figures of later steps that were shown before will come again."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show figures by name, such as ``train/loss``; no name is the beginning of another one's path."""

    @abstractmethod
    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table of texts."""

    @abstractmethod
    def image(self, step: int, name: str, path: Path) -> None:
        """Show the PNG at `path` as it is now."""

    @abstractmethod
    def finish(self, ending: Ending) -> None:
        """The training ended: send what is left and let go of everything."""
