"""Metrics of the user's own: plain Python functions, named in the recipe and asked about every row.

A recipe says ``evaluate.metrics: ["my_metrics.py:crude_length"]``, and beside it lies my_metrics.py::

    def crude_length(gold, answer, row):
        return float(answer is not None and len(answer) <= len(gold))

`gold` and `answer` are parsed answers of the task (a list of dicts, a list of labels, a text); `answer` is None when
the model's reply was refused or did not have the labelled form. `row` holds the row as it came, with ``source``,
``task`` and ``prediction`` (the reply's text). The function gives one number, or several by name; the mean over the
rows of a task is a metric of that task. Its name is the function's, ``crude_length``, or ``crude_length.NAME``.

What runs is the file that the recipe names, never the copy that a run folder keeps: a run folder may come from a
stranger, and opening one must not run its code.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import FormError, RecipeError
from ..runs import write_bytes, writing
from ..tasks.base import Task
from ..tasks.forms import Answer
from .prediction import Prediction

FOLDER = "metric_files"
"""Where a run folder keeps copies of the files."""

NUM_SHOWN = 3
"""So many failures of a function are told; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserMetric:
    """A function of the user's."""

    name: str
    path: Path
    function: Callable[[Answer, Answer | None, dict[str, Any]], object]


def load_metrics(specs: Sequence[str], *, run: Path | None = None) -> tuple[UserMetric, ...]:
    """The functions that `specs` name, each ``FILE.py:FUNCTION``; this runs the files.

    Args:
        specs: as in the recipe; a relative file is seen from the folder weitiao is started in (`load_recipe` has made
            those of a recipe absolute).
        run: the run folder whose recipe names them, where that is where they come from. A file inside it is refused.

    Raises:
        RecipeError: a spec is not of that form, names a file inside `run`, a file that is not there or fails, or a
            function that is not there or has the name of another.
    """
    metrics: list[UserMetric] = []
    modules: dict[Path, ModuleType] = {}
    for spec in specs:
        file, colon, name = spec.rpartition(":")
        if not colon or not file.endswith(".py") or not name.isidentifier():
            raise RecipeError(f"evaluate.metrics holds {spec!r}. Write FILE.py:FUNCTION, such as my_metrics.py:polite.")
        path = Path(file).resolve()
        if run is not None and path.is_relative_to(run.resolve()):
            raise RecipeError(
                f"evaluate.metrics names {path}, a file inside the run folder {run}. Code that comes with a run is not "
                f"run: read it, and copy it to where your recipe is."
            )
        if path not in modules:
            modules[path] = _import(path, spec, run)
        function = vars(modules[path]).get(name)
        if not callable(function):
            functions = [key for key, value in vars(modules[path]).items() if callable(value) and key[0] != "_"]
            there = f"Its functions: {', '.join(functions)}." if functions else "It has no functions."
            raise RecipeError(f"evaluate.metrics names {spec}, but {path.name} has no function {name}. {there}")
        if name in [metric.name for metric in metrics]:
            raise RecipeError(f"evaluate.metrics names two functions {name}. Give one of them another name.")
        metrics.append(UserMetric(name=name, path=path, function=function))
    return tuple(metrics)


def measure_rows(
    metrics: Sequence[UserMetric],
    predictions: Sequence[Prediction],
    tasks: Sequence[Task],
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float], ...]:
    """For each prediction the figures of `metrics` by name: what `score_side` takes as ``extra``.

    Args:
        metrics: the functions.
        predictions: the answers of one model.
        tasks: the tasks they belong to.
        rows: for each prediction the row's own fields, as they came.

    Raises:
        RecipeError: a function failed or gave no finite number; names the function, the rows and the errors.
    """
    forms = {task.name: task.form for task in tasks}
    measured: list[dict[str, float]] = [{} for _ in predictions]
    for metric in metrics:
        failures: list[str] = []
        for place, (prediction, row) in enumerate(zip(predictions, rows, strict=True)):
            form = forms[prediction.task]
            gold = form.read_target(prediction.gold)
            try:
                answer = None if prediction.finish == "refused" else form.parse(prediction.answer)
            except FormError:
                answer = None
            told = {"source": prediction.source, "task": prediction.task, "prediction": prediction.answer}
            try:
                given = metric.function(gold, answer, {**copy.deepcopy(dict(row)), **told})
                measured[place] |= _figures(metric, given)
            except Exception as error:  # noqa: BLE001 - a user's function may raise anything; all of it is told
                failures.append(f"{prediction.source}: {_told(error, metric.path)}")
        if failures:
            more = [f"and {len(failures) - NUM_SHOWN} more rows"] if len(failures) > NUM_SHOWN else []
            lines = "\n".join(f"  {line}" for line in [*failures[:NUM_SHOWN], *more])
            raise RecipeError(
                f"The metric {metric.name} of {metric.path} failed on {len(failures)} of {len(predictions)} rows. "
                f"Mend the function, or take it out of evaluate.metrics.\n{lines}"
            )
    return tuple(measured)


def copy_metric_files(metrics: Sequence[UserMetric], run: Path) -> list[Path]:
    """Copies of the metrics' files in ``run/metric_files``, one each, for whoever reads the run; nothing runs them.

    Raises RunError when they cannot be written.
    """
    copies: dict[Path, Path] = {}
    with writing(run):
        for path in dict.fromkeys(metric.path for metric in metrics):
            taken = {other.name for other in copies.values()}
            names = [path.name, *(f"{path.stem}-{number}.py" for number in range(2, len(metrics) + 2))]
            target = run / FOLDER / next(name for name in names if name not in taken)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, path.read_bytes())
            copies[path] = target
    return list(copies.values())


def _import(path: Path, spec: str, run: Path | None) -> ModuleType:
    if not path.is_file():
        kept = "" if run is None else f" The run keeps a copy in {run / FOLDER}; read it before you put it there."
        raise RecipeError(f"evaluate.metrics names {spec}, but there is no file {path}.{kept}")
    found = importlib.util.spec_from_file_location(f"weitiao_user_metrics_{path.stem}", path)
    assert found is not None and found.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"evaluate.metrics names {spec}, but {path} fails: {_told(error, path)}") from error
    return module


def _figures(metric: UserMetric, given: object) -> dict[str, float]:
    """What the function gave, by the metric's name. Raises ValueError for anything but finite numbers."""
    if isinstance(given, Mapping):
        return {f"{metric.name}.{key}": _number(value, f"under {key!r} ") for key, value in given.items()}
    return {metric.name: _number(given, "")}


def _number(value: object, where: str) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"it must give a finite number {where}and gave {value!r:.60}")
    return float(value)


def _told(error: Exception, path: Path) -> str:
    """The error, and the last line of the user's file that it came by."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}."
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"line {lines[-1]}: " if lines else ""
    kind = "" if isinstance(error, ValueError) and not lines else f"{type(error).__name__}: "
    return f"{place}{kind}{error}."
