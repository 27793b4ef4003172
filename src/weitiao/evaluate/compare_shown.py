"""A comparison on the terminal: the figures, the verdicts, the rows that flipped."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..tasks.base import Task
from ..visible import visible
from .compare import Comparison, Flip, p_text
from .fact_errors import errors_of
from .metric_texts import metric_text
from .prediction import Prediction

NUM_FLIPS_SHOWN = 20
NUM_CHARACTERS = 72


def show_comparison(comparison: Comparison, console: Console, *, num_flips: int = NUM_FLIPS_SHOWN) -> None:
    """Print the metrics of every task with their differences, the verdicts, and the first `num_flips` flipped rows."""
    console.print(_figures(comparison))
    for verdict in comparison.verdicts:
        console.print(Text(visible(verdict)))
    if not comparison.flips:
        console.print(Text("No row flipped between right and wrong."))
        return
    fixed = sum(flip.kind == "wrong → right" for flip in comparison.flips)
    console.print()
    console.print(_flips(comparison, num_flips))
    line = (
        f"{len(comparison.flips)} rows flipped: {fixed} wrong → right, {len(comparison.flips) - fixed} right → wrong."
    )
    more = len(comparison.flips) - num_flips
    console.print(Text(f"{line} {more} more are in the page and the JSON." if more > 0 else line))


def _figures(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "metric", comparison.a, comparison.b, "change", "95 % interval", "p"):
        table.add_column(Text(visible(heading)), justify="left" if heading in ("task", "metric") else "right")
    for one in comparison.compared:
        for number, (name, value) in enumerate(list(one.metrics.items())[: one.num_main]):
            own = name == one.primary
            p_value = p_text(one.p_value if own else value.p_value).removeprefix("p ").removeprefix("= ")
            low, high = (f"{100 * bound:+.1f}" for bound in value.interval)
            cells = (
                visible(one.task) if number == 0 else "",
                metric_text(name).label,
                f"{100 * value.a:.1f}",
                f"{100 * value.b:.1f}",
                f"{100 * value.difference:+.1f}",
                f"{low} … {high}",
                p_value,
            )
            table.add_row(*(Text(cell) for cell in cells), style="bold" if own else "")
    return table


def _flips(comparison: Comparison, limit: int) -> Table:
    tasks = {task.name: task for task in comparison.tasks}
    table = Table(show_lines=True)
    for heading in ("", "row", "input", "label", comparison.a, comparison.b):
        table.add_column(Text(visible(heading)), overflow="fold")
    kinds = ("right → wrong", "wrong → right")
    by_kind = [[flip for flip in comparison.flips if flip.kind == kind] for kind in kinds]
    half = max(limit // 2, limit - len(by_kind[1]))  # both directions are seen, whichever has more rows
    for flip in (*by_kind[0][:half], *by_kind[1][: limit - min(half, len(by_kind[0]))]):
        table.add_row(*_cells(flip, tasks[flip.b.task]), style="red" if flip.kind == "right → wrong" else "green")
    return table


def _cells(flip: Flip, task: Task) -> list[Text]:
    gold, right = flip.b.gold, "a" if flip.kind == "right → wrong" else "b"
    answers = [
        answer if task.kind != "extraction" else "right" if side == right else _faults(task, gold, answer, flip.reason)
        for side, answer in (("a", flip.a.answer), ("b", flip.b.answer))
    ]
    texts = (_ending(flip.b.prompt), _beginning(gold), *map(_beginning, answers))
    return [Text(visible(text)) for text in (flip.kind, flip.b.source, *texts)]


def _faults(task: Task, gold: str, answer: str, reason: str) -> str:
    """What is wrong with facts, which a line has room for; the answer itself where it is spelled otherwise."""
    if reason:
        return f"not in the form: {answer}"
    row = Prediction(source="", task=task.name, prompt="", gold=gold, answer=answer)
    found = errors_of(task, row, task.score(task.form.parse(gold), answer))
    return "; ".join(f"{one.kind}: {one.given or one.gold}" for one in found) or answer


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= NUM_CHARACTERS else f"{line[: NUM_CHARACTERS - 2]} …"


def _ending(prompt: str) -> str:
    """The end of a long prompt: its beginning is most often the same instruction in every row."""
    line = " ".join(prompt.split())
    return line if len(line) <= NUM_CHARACTERS else f"… {line[-NUM_CHARACTERS + 2 :]}"
