"""Which values of an answer are right: each one held against the gold answer.

Knows parsed answers; nothing of confidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tasks.forms import Answer, AnswerForm
from ..tasks.value_spans import Step, value_spans


def right_values(form: AnswerForm, gold: Answer, text: str) -> dict[str, bool]:
    """For each value of the answer `text`, by its path, whether the parsed `gold` holds it at its place.

    The order of a list says nothing: a string is right when it is in the gold list, and an object is held against the
    gold object that it shares the most fields with. Each gold object is taken once; the values of an object that is
    left over are wrong, all of them. Only lists of objects deeper inside an answer are compared place by place.

    >>> form = AnswerForm(shape="label list", labels=("手机", "水果"))
    >>> right_values(form, ["水果"], '["手机", "水果"]')
    {'[0]': False, '[1]': True}

    Raises:
        FormError: `text` is not an answer of this form.
    """
    spans = value_spans(form, text)
    answer = form.parse(text)
    if not (_are_objects(answer) and _are_objects(gold)):
        return {span.path: _holds(gold, span.steps, span.value) for span in spans}
    partners = _partners(answer, gold)
    found: dict[str, bool] = {}
    for span in spans:
        number, *inside = span.steps
        partner = partners.get(number)
        found[span.path] = partner is not None and _holds(gold[partner], tuple(inside), span.value)
    return found


def _holds(gold: Answer, steps: tuple[Step, ...], value: Answer) -> bool:
    if not steps:
        return bool(value == gold)
    step, *rest = steps
    if isinstance(gold, list) and isinstance(step, int):
        return value in gold if not rest else step < len(gold) and _holds(gold[step], tuple(rest), value)
    return isinstance(gold, Mapping) and step in gold and _holds(gold[step], tuple(rest), value)


def _are_objects(answer: Answer) -> bool:
    return isinstance(answer, list) and all(isinstance(item, Mapping) for item in answer)


def _partners(items: Sequence[Answer], gold: Sequence[Answer]) -> dict[Step, int]:
    """For each object of the answer, the gold object it is held against: the most alike first."""
    alike = [
        (-shared, number, place)
        for number, item in enumerate(items)
        for place, wanted in enumerate(gold)
        if (shared := sum(key in item and item[key] == wanted[key] for key in wanted))
    ]
    partners: dict[Step, int] = {}
    for _, number, place in sorted(alike):
        if number not in partners and place not in partners.values():
            partners[number] = place
    return partners
