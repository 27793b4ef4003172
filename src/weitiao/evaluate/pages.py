"""Jinja for the pages of this folder: one environment, the filters, and the figures' spelling. Knows no report."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jinja2

from ..tasks.labels import INVALID
from ..visible import shorten, visible
from .score import TaskScore


@functools.cache
def template(name: str) -> jinja2.Template:
    """The template `name` of this folder; pages escape what is put into them, Markdown has filters of its own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda value: f"{100 * value:.1f}",
        "signed": lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        "hash": lambda text: base64.b64encode(hashlib.sha256(str(text).encode("utf-8")).digest()).decode("ascii"),
        "position": lambda names, name: names.index(name),
        "visible": visible,
        "shorten": shorten,
        "cell": _markdown_text,
        "code": _markdown_code,
    }
    return environment.get_template(name)


def figure(score: TaskScore | None, name: str, *, plain: Collection[str] = ()) -> str:
    """A metric in per cent with its interval, such as ``84.2 [79.0, 88.9]``; one of `plain` as it is."""
    if score is None or name not in score.metrics:
        return "–"
    scale = 1 if name in plain else 100
    value = f"{scale * score.metrics[name]:.1f}"
    bounds = score.intervals.get(name)
    return value if bounds is None else f"{value} [{scale * bounds[0]:.1f}, {scale * bounds[1]:.1f}]"


def _markdown_text(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or a table would read as a mark."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(visible(text).split()))


def _markdown_code(text: str, limit: int = 300) -> str:
    """`text` as a code span on one line; line breaks are shown as ↵."""
    shown = visible(shorten(text, limit)).replace("\n", "↵").replace("\t", " ") or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{ticks} {shown} {ticks}"


class HeatRow(NamedTuple):
    """One label of the confusion table: how often it was given each answer, and that as a share of its rows."""

    gold: str
    cells: list[tuple[str, int, float]]


def heat(confusion: Mapping[str, Mapping[str, int]]) -> list[HeatRow]:
    """The confusion table, the most frequent label first; answers that are no label stand last."""
    totals = {gold: sum(row.values()) for gold, row in confusion.items()}
    golds = sorted(confusion, key=lambda gold: (-totals[gold], gold))
    others = sorted({given for row in confusion.values() for given in row} - set(golds))
    order = [*golds, *(name for name in others if name != INVALID), *(name for name in others if name == INVALID)]
    return [
        HeatRow(gold, [(given, row.get(given, 0), row.get(given, 0) / totals[gold]) for given in order])
        for gold, row in ((gold, confusion[gold]) for gold in golds)
    ]
