"""A learning curve for people: a page of tables and sentences, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs import write_bytes

if TYPE_CHECKING:
    from .learning_curve import TaskCurve


_FASTER = 0.02
"""By so much a last score above the law is told: the score then grows faster than a power law can."""


def describe_forecast(curve: TaskCurve) -> str:
    """What is foretold of a task, with its uncertainty, in two or three sentences."""
    told, last = curve.forecast, curve.points[-1]
    low, high = told.gain_interval
    above = last.score - (told.score - told.gain)
    faster = f" The last score lies {above:.3f} above the law, so it may be more." if above > _FASTER else ""
    return (
        f"As many rows again ({last.rows} → {told.rows}) are foretold to bring {curve.metric} of {curve.task} from "
        f"{told.score - told.gain:.3f} to {told.score:.3f}: {told.gain:+.3f} (95 %: {low:+.3f} to {high:+.3f}). "
        f"{told.verdict}{faster}"
    )


def write_page(name: str, curves: Sequence[TaskCurve], *, num_seeds: int) -> str:
    """The page in Markdown."""
    parts = [f"# Learning curve of {name}", "![](curve.png)"]
    for curve in curves:
        lines = ["| rows | share | score | 95 % interval |", "|---|---|---|---|"]
        for point in curve.points:
            low, high = point.interval
            lines.append(f"| {point.rows} | {point.share * 100:g} % | {point.score:.3f} | {low:.3f} – {high:.3f} |")
        a, b, c = curve.law
        law = f"Power law: {a:.3f} − {b:.3g} · rows^−{c:.2f}."
        parts += [f"## {curve.task}: {curve.metric}", "\n".join(lines), f"{describe_forecast(curve)} {law}"]
    return "\n\n".join([*parts, "## How to read this", _caution(curves, num_seeds)]) + "\n"


def _caution(curves: Sequence[TaskCurve], num_seeds: int) -> str:
    """What the figures rest on and what they leave out."""
    sentences = [
        "The intervals come from drawing the dev rows again, the same draw for all trainings, with a power law through "
        "each draw.",
        "The law itself is an assumption: that scores rise ever more slowly towards a level.",
    ]
    if min(len(curve.points) for curve in curves) == 3:
        sentences.append("Three points always fit a law of three numbers, so they cannot show that it is wrong.")
    if num_seeds == 1:
        sentences.append("Each share was trained once: what another seed would change is not in the intervals.")
    sentences.append(
        "The best checkpoint of each training was chosen on the dev rows, and all tasks and labels are known to each "
        "training, as they would be with all rows."
    )
    return " ".join(sentences)


def draw_curves(path: Path, curves: Sequence[TaskCurve]) -> None:
    """Draw score over rows for every task, the law and its interval up to twice the rows, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    columns = min(len(curves), 3)
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(1 + 3.8 * columns, 0.6 + 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, curve in enumerate(curves):
        axes = figure.add_subplot(lines, columns, place + 1)
        rows = [point.rows for point in curve.points]
        scores = [point.score for point in curve.points]
        below = [max(0.0, point.score - point.interval[0]) for point in curve.points]
        above = [max(0.0, point.interval[1] - point.score) for point in curve.points]
        places, low, high = zip(*curve.band, strict=True)
        a, b, c = curve.law
        axes.fill_between(places, low, high, color="tab:blue", alpha=0.15, linewidth=0)
        axes.plot(places, [a - b * number**-c for number in places], color="tab:blue", linewidth=1)
        axes.errorbar(rows, scores, yerr=[below, above], fmt="o", color="tab:blue", capsize=3)
        for point in curve.points:
            if len(point.by_seed) > 1:
                axes.plot([point.rows] * len(point.by_seed), point.by_seed, ".", color="gray", alpha=0.6)
        axes.plot([curve.forecast.rows], [curve.forecast.score], "o", color="tab:blue", fillstyle="none")
        axes.set_xscale("log")
        axes.set_xlim(0.85 * places[0], 1.18 * places[-1])
        axes.set_xticks([*rows, curve.forecast.rows], [str(number) for number in [*rows, curve.forecast.rows]])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1.02)
        axes.set_title(f"{curve.task}: {curve.metric}", fontsize="medium")
        axes.set_xlabel("rows learnt from")
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_bytes(path, image.getvalue())
