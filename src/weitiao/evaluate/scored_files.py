"""Finding the scored answers of an evaluation: in a run folder, in an evaluation's folder, or in the file itself.

Knows the files that `report.write_report` leaves; knows nothing of what is done with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..tasks.base import Task
from .prediction import Prediction, read_predictions


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One side of an evaluation: what was answered, and the tasks it is scored by."""

    run: str
    """Name of the run, or of the folder where there is none."""
    side: str
    path: Path
    tasks: tuple[Task, ...]
    predictions: tuple[Prediction, ...]


def find_evaluations(paths: tuple[Path, Path], *, data: str | None = None) -> tuple[Path, Path]:
    """For each path, the folder or file of its evaluation; of two runs, one that both were evaluated on.

    Args:
        paths: run folders, folders of an evaluation, or files of scored answers.
        data: name of the set, where runs were evaluated on several.

    Raises:
        RunError: nothing of the kind is there, or several sets are and none is called dev.
    """
    sets = [_sets(path) for path in paths]
    chosen = data
    if data is None and all(sets):
        both = sorted(set(sets[0]) & set(sets[1]))
        if not both:
            lists = " and ".join(f"{path} on {', '.join(names)}" for path, names in zip(paths, sets, strict=True))
            raise RunError(f"The two runs were not evaluated on one set: {lists}. Evaluate both on the same --data.")
        chosen = "dev" if "dev" in both else both[0]
        if chosen != "dev" and len(both) > 1:
            raise RunError(f"Both runs were evaluated on {', '.join(both)}. Say which with --data NAME.")
    found = [_evaluation(path, names, chosen) for path, names in zip(paths, sets, strict=True)]
    return found[0], found[1]


def _sets(path: Path) -> list[str]:
    """The names of the sets a run folder was evaluated on; empty for what is no run folder."""
    if not path.exists():
        raise RunError(f"There is nothing at {path}. Give a run folder, a folder of an evaluation or a scored file.")
    return sorted(found.parent.name for found in path.glob("evaluations/*/report.json")) if path.is_dir() else []


def _evaluation(path: Path, names: list[str], chosen: str | None) -> Path:
    if not path.is_dir() or (path / "report.json").exists():
        return path
    if not names:
        raise RunError(f"{path} holds no evaluation. Make one with: weitiao evaluate RUN")
    if chosen is None:
        chosen = "dev" if "dev" in names or len(names) > 1 else names[0]
    if chosen not in names:
        raise RunError(f"{path} was not evaluated on {chosen}, only on {', '.join(names)}.")
    return path / "evaluations" / chosen


def read_scored(path: Path, *, side: str | None = None) -> Scored:
    """The answers of one side: the one that the report examined, unless `side` names another.

    Args:
        path: the folder of an evaluation, or a file of scored answers that lies beside its report.
        side: name of the side, such as ``base``.

    Raises:
        RunError: there is no report, it has no such side, or it was written before labels were kept with answers.
        DataError: a line of the file is no prediction.
    """
    folder = path if path.is_dir() else path.parent
    report = _report(folder)
    files = {name: str(one.get("file", "")) for name, one in report["sides"].items()}
    if not path.is_dir():
        side = next((name for name, file in files.items() if file == path.name), None)
        if side is None:
            known = ", ".join(file for file in files.values() if file) or "none"
            raise RunError(f"{path.name} is no file of scored answers of the report beside it; those are {known}.")
    side = side or str(report.get("examined") or list(files)[-1])
    if side not in files:
        raise RunError(f"{folder} has no side {side!r}; its sides are {', '.join(files)}.")
    if not files[side] or not (folder / files[side]).exists():
        raise RunError(
            f"{folder} keeps no labels with the answers of {side}: it was made by an earlier version, or its files "
            f"were removed. Evaluate again with: weitiao evaluate RUN"
        )
    file = folder / files[side]
    tasks = tuple(Task.from_json(task) for task in report["tasks"])
    return Scored(run=str(report["run"]), side=side, path=file, tasks=tasks, predictions=read_predictions(file))


def _report(folder: Path) -> Any:
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(report["sides"], dict) and report["sides"] and isinstance(report["tasks"], list)):
            raise ValueError
    except FileNotFoundError:
        raise RunError(f"There is no report.json in {folder}. Make one with: weitiao evaluate RUN") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is not a report of this program. Evaluate again with: weitiao evaluate RUN") from None
    return report
