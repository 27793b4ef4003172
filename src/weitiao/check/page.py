"""A `Checkup` as one HTML page that opens offline: findings with their rows, lengths, labels, rows of every task.

The texts are strangers': the page escapes them, shows invisible characters as signs and runs no script.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from ..data.findings import GRADES, Finding
from ..runs import write_bytes, writing
from ..tasks.answers import TaskSummary
from ..visible import shorten, visible
from .checkup import Checkup
from .terminal import verdict

FEW_ROWS = 5
"""Rows of a finding shown at once; the others unfold, …"""
MOST_ROWS = 200
"""… up to this many: a page must open quickly. ``--json`` lists all."""
MOST_LABELS = 24


def write_page(checkup: Checkup, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises RunError when it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, render_page(checkup).encode("utf-8", "backslashreplace"))


def render_page(checkup: Checkup) -> str:
    """The page as text."""
    worst = next((finding.grade for finding in checkup.findings if finding.grade != "note"), "good")
    return _template().render(
        checkup=checkup,
        lengths=checkup.lengths,
        grades=GRADES,
        tone=worst,
        verdict=verdict(checkup).plain,
        rows_of=_rows_of,
        most_answers=_most_answers,
        few=FEW_ROWS,
        most_rows=MOST_ROWS,
        most_labels=MOST_LABELS,
    )


def _rows_of(finding: Finding) -> list[tuple[str, str]]:
    """Each row of the finding with what is wrong with it."""
    return list(zip(finding.sources, finding.details or [""] * len(finding.sources), strict=True))


def _most_answers(summary: TaskSummary) -> int:
    """The answers with the most frequent label: the longest bar."""
    return max(1, *(one.train + one.dev for one in summary.labels))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "shorten": shorten}
    return environment.get_template("page.html.jinja")
