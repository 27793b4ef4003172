"""Runs in a terminal: the table of all of them, and the view of one that is followed."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..visible import shorten, visible
from .summary import RunSummary

_BARS = "▁▂▃▄▅▆▇█"
_SCORINGS_SHOWN = 6
_LONGEST_CELL = 160
_NARROW = 120
_COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow", "died": "red", "unreadable": "red"}


def sparkline(values: Sequence[float], width: int = 20) -> str:
    """`values` as a row of at most `width` bars, each the mean of its share: ▁ is the lowest, a blank no number.

    >>> sparkline([3.0, 2.0, 1.0, 1.0])
    '█▅▁▁'
    """
    if len(values) > width:
        cuts = [len(values) * number // width for number in range(width + 1)]
        values = [math.fsum(values[start:end]) / (end - start) for start, end in itertools.pairwise(cuts)]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)


def runs_table(runs: Sequence[RunSummary], *, width: int = 160) -> Table:
    """One row for each run; a narrow screen has no place for what the recipe says."""
    narrow = width < _NARROW
    titles = ["run", *([] if narrow else ["model", "method"]), "step", "status", "best", "loss", "", "started", "time"]
    table = Table(*titles, box=SIMPLE_HEAD, pad_edge=False)
    for column, title in zip(table.columns, titles, strict=True):
        column.no_wrap = title not in ("run", "model")
    for run in runs:
        table.add_row(
            _plain(run.name),
            *([] if narrow else [_plain(run.model), _plain(run.method)]),
            f"{run.step}/{run.steps}" if run.steps else str(run.step),
            _status(run),
            "" if run.best_score is None else f"{run.best_score:.3f}",
            f"{run.losses[-1]:.4f}" if run.losses else "",
            sparkline(run.losses, 8 if narrow else 20),
            _time_of_day(run.started),
            "" if run.seconds is None else told_seconds(run.seconds),
        )
    return table


def watch_view(run: RunSummary, *, width: int = 100) -> RenderableType:
    """How far `run` is, its figures, its scores and what it answered last."""
    parts: list[RenderableType] = [_progress(run), *_losses(run, width), *_scores(run), *_samples(run)]
    return Panel(Group(*parts), title=_plain(run.name), title_align="left")


def _progress(run: RunSummary) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    of = f"step {run.step}/{run.steps}" if run.steps else f"step {run.step}"
    left = "" if run.seconds_left is None else f"ETA {told_seconds(run.seconds_left)}"
    bar = ProgressBar(total=run.steps or max(run.step, 1), completed=run.step, width=30)
    line.add_row(_status(run), bar, Text(of), Text(left))
    figures = Text(style="dim")
    if run.train_lines:
        last = run.train_lines[-1]
        told = [
            f"lr {last['learning_rate']:.2e}",
            f"gradient {last['grad_norm']:.3g}" if last.get("grad_norm") is not None else "gradient overflowed",
            f"{last['tokens_per_second']:.0f} tokens/s",
            f"{last['memory_bytes'] / 2**30:.2f} GiB" if "memory_bytes" in last else "",
            f"{told_seconds(run.seconds)} trained" if run.seconds is not None else "",
            f"cost {last['price']:.2f}" if "price" in last else "",
        ]
        figures.append("  ".join(part for part in told if part))
    return Group(line, *([_plain(run.reason)] if run.reason else []), figures)


def _losses(run: RunSummary, width: int) -> list[RenderableType]:
    if not run.train_lines:
        return []
    tasks = run.train_lines[-1].get("task_losses", {})
    series = {"loss": run.losses}
    if len(tasks) > 1:
        series |= {name: [line["task_losses"].get(name, math.nan) for line in run.train_lines] for name in tasks}
    if run.dev_lines:
        series["dev loss"] = [line["loss"] for line in run.dev_lines]
    table = Table.grid(padding=(0, 2))
    for name, values in series.items():
        table.add_row(_plain(name), f"{values[-1]:.4f}", sparkline(values, max(20, min(width - 40, 100))))
    return [Text(), table]


def _scores(run: RunSummary) -> list[RenderableType]:
    scored = [line for line in run.dev_lines if line["scores"]][-_SCORINGS_SHOWN:]
    if not scored:
        return []
    names = list(scored[-1]["scores"])
    table = Table("dev scores at step", *map(visible, names), box=None, padding=(0, 2))
    for line in scored:
        values = [line["scores"].get(name, {}).get("primary") for name in names]
        mark = " (best)" if line["step"] == run.best_step else ""
        table.add_row(f"{line['step']}{mark}", *("" if value is None else f"{value:.3f}" for value in values))
    return [Text(), table]


def _samples(run: RunSummary) -> list[RenderableType]:
    if not run.samples:
        return []
    step, samples = run.samples[-1]
    table = Table("task", "question", "gold", f"answer at step {step}", box=None, padding=(0, 2))
    for sample in samples:
        answer = _cell(sample.answer)
        answer.stylize("green" if sample.answer == sample.gold else "yellow")
        table.add_row(_plain(sample.task), _cell(sample.question), _cell(sample.gold), answer)
    return [Text(), table]


def _status(run: RunSummary) -> Text:
    return Text(run.told_status(), style=_COLOURS.get(run.status, ""))


def _plain(text: str) -> Text:
    """`text` as it is: no markup, control characters as signs."""
    return Text(visible(text))


def _cell(text: str) -> Text:
    return Text(visible(shorten(text.replace("\n", " ⏎ "), _LONGEST_CELL)))


def _time_of_day(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds).strftime("%m-%d %H:%M")


def told_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
