"""Every row of an evaluation as the page's script reads it: short JSON, rendered when it is looked at.

Texts are made visible and shortened here, in Python, so that nothing that reorders or hides text ever reaches the
page; the script puts them into the page as text, never as markup. The keys are short because ten thousand rows repeat
them; their meaning stands at `_row`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..tasks.base import RowScore, Task
from ..visible import MAX_SHOWN_CHARACTERS, shorten, visible
from .constrained import pair_rows
from .differences import label_in_answers_order
from .fact_errors import errors_of
from .prediction import Prediction
from .score import Side, row_value

MAX_CHARACTERS = 20_000_000
"""What the texts of all rows together may come to: beyond it each is shown shorter, and says so."""
MIN_SHOWN_CHARACTERS = 300


def rows_json(
    tasks: Sequence[Task],
    sides: Mapping[str, Side],
    *,
    examined: str,
    reasons: Mapping[int, str],
    free: str | None,
    flips: bool = False,
) -> str:
    """The JSON that the page's script shows rows from, fit to stand in a script element.

    Args:
        tasks: all tasks, in the page's order.
        sides: scored predictions by name; rows of other sides are joined to those of `examined`.
        examined: the side that is shown.
        reasons: why a row's label looks wrong, by the row's place.
        free: the side without the constraint, where there is one.
        flips: whether rows that flipped between right and wrong may be asked for.
    """
    side = sides[examined]
    others = [name for name in sides if name != examined]
    pairs = {name: pair_rows(side, sides[name]) for name in others}
    values = {name: _values(tasks, sides[name]) for name in sides}
    limit = min(MAX_SHOWN_CHARACTERS, max(MIN_SHOWN_CHARACTERS, MAX_CHARACTERS // max(1, len(side.rows) * 4)))
    places = {task.name: number for number, task in enumerate(tasks)}
    rows = []
    for place, (prediction, score) in enumerate(zip(side.predictions, side.rows, strict=True)):
        number = places[prediction.task]
        row = _row(tasks[number], prediction, score, limit=limit) | {
            "t": number,
            "v": round(values[examined][place], 4),
        }
        row["o"] = [
            [
                None
                if (answer := sides[name].predictions[match].answer) == prediction.answer
                else _text(answer, limit),
                round(values[name][match], 4),
                outcome(sides[name].rows[match]),
            ]
            if (match := pairs[name].get(place)) is not None
            else None
            for name in others
        ]
        if place in reasons:
            row["q"] = _text(reasons[place], limit)
        if side.extra and side.extra[place]:
            row["u"] = {_text(name, 80): round(value, 4) for name, value in side.extra[place].items()}
        rows.append(row)
    data = {
        "examined": visible(examined),
        "others": [visible(name) for name in others],
        "free": others.index(free) if free in others else None,
        "flips": flips,
        "tasks": [{"name": visible(task.name), "kind": task.kind} for task in tasks],
        "rows": rows,
    }
    return script_json(data)


def script_json(data: Any) -> str:
    """`data` as JSON in which nothing can end a script element or open a comment.

    >>> script_json({"a": "</script><!-- & -->"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u003c!-- \\\\u0026 --\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _values(tasks: Sequence[Task], side: Side) -> list[float]:
    by_name = {task.name: task for task in tasks}
    return [row_value(by_name[row.task], score) for row, score in zip(side.predictions, side.rows, strict=True)]


def _row(task: Task, prediction: Prediction, score: RowScore, *, limit: int) -> dict[str, Any]:
    """What one row shows; keys that would hold nothing are left out.

    s source, f file, p prompt, b earlier turns, g gold (in the answer's order), a answer, k what became of it,
    r why it was refused, x how it ended if not by itself, c confidence, l loss, n names that the label or the answer
    holds, e errors, m confidence of single values. The caller adds t task, v score, o other sides, q suspicion,
    u users' metrics.
    """
    errors = [[one.kind, _text(one.gold, 300), _text(one.given, 300)] for one in errors_of(task, prediction, score)]
    optional = {
        "b": [[_text(speaker, 80), _text(text, limit)] for speaker, text in prediction.before],
        "r": _text(score.reason, 600),
        "x": "" if prediction.finish == "stop" else prediction.finish,
        "c": None if prediction.confidence is None else round(prediction.confidence, 4),
        "l": None if prediction.loss is None else round(prediction.loss, 4),
        "n": [_text(name, 80) for name in names_of(score)],
        "e": errors,
        "m": [[_text(one.path, 80), _text(one.value, 80), round(one.confidence, 4)] for one in prediction.fields],
    }
    return {
        "s": _text(prediction.source, 300),
        "f": _text(prediction.file, 120),
        "p": _text(prediction.prompt, limit),
        "g": _text(label_in_answers_order(task.form, prediction.gold, prediction.answer), limit),
        "a": _text(prediction.answer, limit),
        "k": outcome(score),
        **{key: value for key, value in optional.items() if value is not None and value not in ("", [])},
    }


def outcome(score: RowScore) -> str:
    """`right`, `wrong` or `refused`. Right is a whole answer, types included, in any order."""
    if not score.valid:
        return "refused"
    faults = sum(score.counts.get(key, 0.0) for key in ("fp", "fn", "fp_typed", "fn_typed"))
    whole = score.exact or ("tp" in score.counts and not faults) or bool(score.counts.get("correct"))
    return "right" if whole else "wrong"


def names_of(score: RowScore) -> list[str]:
    """The labels, predicates or keys that the label or the answer of a row holds, sorted."""
    return sorted({key.split(":", 1)[1] for key in score.counts if key.startswith(("tp:", "fp:", "fn:"))})


def _text(text: str, limit: int) -> str:
    """`text` shortened and visible; almost all texts are printable as they stand, and are then only looked at."""
    short = shorten(text, limit)
    return short if short.replace("\n", "").isprintable() else visible(short)
