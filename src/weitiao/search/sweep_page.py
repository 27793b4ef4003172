"""What a search found, for people: values in a line, the score against each parameter as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs import write_bytes
from .space import Parameter, Search, Value
from .trials import Trial

_WIDTH, _HEIGHT = 3.6, 3.2
"""Inches of one parameter's picture."""
_MARKS = (("finished", "o", "tab:blue"), ("stopped", "v", "tab:orange"))


def show_value(value: Value) -> str:
    """A value as one writes it in a recipe, in one line: ``0.0003``, ``[q_proj, v_proj]``."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False).replace('"', "")


def show_values(values: Mapping[str, Value]) -> str:
    """``train.learning_rate=0.0003  method.rank=16``"""
    return "  ".join(f"{key}={show_value(value)}" for key, value in values.items())


def draw_parameters(path: Path, search: Search, trials: Sequence[Trial]) -> None:
    """Draw the best dev score of every trial over its value of each parameter, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(search.parameters)
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(1 + _WIDTH * columns, 0.6 + _HEIGHT * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, parameter in enumerate(search.parameters):
        axes = figure.add_subplot(lines, columns, place + 1)
        _draw_one(axes, parameter, trials)
        if place % columns == 0:
            axes.set_ylabel("dev score")
        if place == 0 and trials:
            axes.legend(loc="best", fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_bytes(path, image.getvalue())


def _draw_one(axes: Any, parameter: Parameter, trials: Sequence[Trial]) -> None:
    def at(trial: Trial) -> float:
        value = trial.values[parameter.key]
        return float(parameter.choices.index(value)) if parameter.choices else float(value)

    for state, marker, color in _MARKS:
        shown = [trial for trial in trials if trial.state == state and trial.best is not None]
        if shown:
            places, scores = [at(trial) for trial in shown], [trial.best for trial in shown]
            axes.plot(places, scores, marker, color=color, label=f"{state} ({len(shown)})", alpha=0.8)
    lost = [at(trial) for trial in trials if trial.state in ("diverged", "failed")]
    if lost:
        axes.plot(lost, [0.0] * len(lost), "x", color="tab:red", label=f"no score ({len(lost)})", clip_on=False)
    if parameter.choices:
        labels = [show_value(value)[:18] for value in parameter.choices]
        axes.set_xticks(range(len(labels)), labels, rotation=0 if sum(map(len, labels)) < 30 else 30)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif parameter.scale == "log":
        axes.set_xscale("log")
        axes.set_xlim(parameter.low / 1.3, parameter.high * 1.3)  # left to itself, one point makes ticks without end
    else:
        margin = 0.05 * (parameter.high - parameter.low)
        axes.set_xlim(parameter.low - margin, parameter.high + margin)
    axes.set_xlabel(parameter.key)
    axes.grid(alpha=0.3)
