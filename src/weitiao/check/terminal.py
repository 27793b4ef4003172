"""A `Checkup` on a terminal: what was understood, the findings by grade with the first rows, what to type next."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from ..data.findings import GRADES, Finding, Grade, count_of
from ..data.lengths import Lengths
from ..visible import shorten, visible
from .checkup import Checkup

SHOWN_ROWS: dict[Grade, int] = {"error": 50, "warning": 4, "note": 2}
_COLOURS: dict[Grade, str] = {"error": "red", "warning": "yellow", "note": "cyan"}
_SIGNS: dict[Grade, str] = {"error": "✗", "warning": "!", "note": "·"}
_BLOCKS = " ▁▂▃▄▅▆▇█"


def print_checkup(checkup: Checkup, console: Console) -> None:
    """Print everything: files, tasks, lengths, findings, the verdict, the next command."""
    for file in checkup.files:
        formats = ", ".join(
            name if count == file.accepted else f"{name} ({count:,})" for name, count in file.formats.items()
        )
        console.print(_line(f"{file.path}: {count_of(file.rows, 'row')} as {formats or 'no known format'}", "bold"))
        if file.rejected:
            console.print(_line(f"  {file.complaint}", "red"))
    for summary in checkup.tasks:
        asked = _asked(summary.task.wordings)
        counts = f"{summary.train:,} train, {summary.dev:,} dev rows"
        console.print(
            _line(f"• {summary.task.name} ({counts}): {summary.task.form.describe()}.{asked}".replace("\n", "⏎"))
        )
    for lengths in checkup.lengths:
        console.print(_line(describe_lengths(lengths), "dim"))
    told = [f"{one.over:,} over {one.limit:,}" for one in checkup.limits]
    if told:
        console.print(_line(f"  rows too long for a limit in {checkup.limits_unit}: {', '.join(told)}", "dim"))
    for what, figure in checkup.plan.figures() if checkup.plan else ():
        console.print(_line(f"{what}: {figure}"))
    for grade in GRADES:
        for finding in checkup.of_grade(grade):
            print_finding(finding, console)
    console.print()
    console.print(verdict(checkup))
    console.print(_line(f"{'Next' if checkup.ok else 'Mend the errors, then'}: {checkup.next_command}"))


def print_finding(finding: Finding, console: Console) -> None:
    """Print one finding: its title in the colour of its grade, the first rows, the cure."""
    colour = _COLOURS[finding.grade]
    console.print()
    console.print(_line(f"{_SIGNS[finding.grade]} {finding.grade}: {finding.title}", f"bold {colour}"))
    console.print(_line(f"  {finding.message}"))
    shown = SHOWN_ROWS[finding.grade]
    if finding.details:
        for source, detail in list(zip(finding.sources, finding.details, strict=True))[:shown]:
            console.print(_line(f"  {source}: {shorten(visible(detail), 1200)}"))
    elif finding.sources:
        console.print(_line("  " + ", ".join(finding.sources[:shown])))
    more = len(finding.sources) - shown
    if more > 0:
        console.print(_line(f"  … and {more:,} more: --json and --html list them", "dim"))
    if finding.fix:
        console.print(_line(f"  → {finding.fix}", "green"))


def print_briefly(checkup: Checkup, console: Console) -> None:
    """Print the warnings and notes in one line each, for `train`."""
    for finding in checkup.findings:
        console.print(_line(f"{finding.grade}: {finding.title}", _COLOURS[finding.grade]))
    if checkup.findings:
        console.print(_line(f"More about the rows: weitiao check {checkup.name}", "dim"))


def verdict(checkup: Checkup) -> Text:
    """The last word: whether the data can be trained on."""
    counts = {grade: len(checkup.of_grade(grade)) for grade in GRADES}
    rows = f"{checkup.train:,} train and {checkup.dev:,} dev rows"
    others = [count_of(counts[grade], grade) for grade in ("warning", "note") if counts[grade]]
    if counts["error"]:
        told = ", ".join([count_of(counts["error"], "error"), *others])
        return Text(f"Not ready to train: {told} in {count_of(checkup.rows, 'row')}.", style="bold red")
    if counts["warning"]:
        return Text(f"Can be trained on, with {' and '.join(others)}: {rows}.", style="bold yellow")
    return Text(f"No problems in {rows}.{f' {others[0]}.' if others else ''}", style="bold green")


def describe_lengths(lengths: Lengths) -> str:
    """One line with a small histogram.

    ``  input  ▂█▅▁    median 127, 95 % up to 217, longest 1,636 characters``
    """
    most = max(lengths.bins)
    bars = "".join(_BLOCKS[-(-8 * count // most)] for count in lengths.bins)
    figures = f"median {lengths.median:,}, 95 % up to {lengths.ninety_fifth:,}, longest {lengths.longest:,}"
    return f"  {lengths.of:<8}{bars:<28}{figures} {lengths.unit}"


def _asked(wordings: tuple[str, ...], limit: int = 3) -> str:
    if not wordings:
        return ""
    more = len(wordings) - limit
    shown = ", ".join(repr(shorten(words, 60)) for words in wordings[:limit])
    return f" Asked as {shown}{f' and {more} more' if more > 0 else ''}."


def _line(text: str, style: str = "") -> Text:
    """`text` as it is: nothing in it is read as markup."""
    return Text("\n".join(_visible_lines(text)), style=style)


def _visible_lines(text: str) -> Iterator[str]:
    yield from (visible(line) for line in text.split("\n"))
