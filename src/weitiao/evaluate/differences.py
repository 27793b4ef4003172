"""Where two texts differ, piece by piece. `rows.js.jinja` marks differences in the page by the same rules.

Knows texts and answer forms; knows nothing of scores or pages.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from ..errors import FormError
from ..tasks.forms import AnswerForm
from ..visible import shorten

MAX_EXACT_DIFF_TOKENS = 800
"""Longer texts are compared with difflib's shortcut: without it a looping answer takes many seconds."""


class Span(NamedTuple):
    """A piece of a text and whether the other text lacks it."""

    text: str
    differs: bool


_TOKEN = re.compile(r"\A\s+|(?:[A-Za-z0-9_]+|\S)\s*")


def mark_differences(gold: str, answer: str, *, keep_space: bool = True) -> tuple[list[Span], list[Span]]:
    """Both texts in pieces, marked where the other lacks them: words of Latin letters, else single characters.

    Without `keep_space` spacing is no difference, as between two spellings of the same JSON.

    >>> mark_differences('["书籍"]', '[ "书店" ]', keep_space=False)[1]
    [Span(text='[ "书', differs=False), Span(text='店', differs=True), Span(text='" ]', differs=False)]
    """
    tokens = [_TOKEN.findall(shorten(text)) for text in (gold, answer)]
    keys = tokens if keep_space else [[token.strip() for token in side] for side in tokens]
    shortcut = max(map(len, tokens)) > MAX_EXACT_DIFF_TOKENS
    blocks = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=shortcut).get_matching_blocks()
    sides: list[list[Span]] = []
    for place, side in enumerate(tokens):
        spans, end = [], 0
        for block in blocks:
            start = block[place]
            spans += [Span("".join(side[end:start]), True), Span("".join(side[start : start + block.size]), False)]
            end = start + block.size
        sides.append([span for span in spans if span.text])
    return sides[0], sides[1]


def label_in_answers_order(form: AnswerForm, gold: str, answer: str) -> str:
    """The label `gold` with its items in the order of `answer`, where the answer is a list: their order is free.

    Else, and where the answer has not the form, `gold` as it is.

    >>> form = AnswerForm(shape="label list", labels=("甲", "乙", "丙"))
    >>> label_in_answers_order(form, '["甲", "乙"]', '["乙", "丙"]')
    '["乙", "甲"]'
    """
    try:
        wanted, given = form.parse(gold), form.parse(answer)
    except FormError:
        return gold
    if not (isinstance(wanted, list) and len(wanted) > 1) or wanted == given:
        return gold
    left = list(wanted)
    for item in given:
        if item in left:
            left.remove(item)
    spare, open_items, ordered = iter(left), list(wanted), []
    for item in given:
        if item in open_items and item not in left:
            ordered.append(item)
            open_items.remove(item)
        elif (other := next(spare, None)) is not None:
            ordered.append(other)
            open_items.remove(other)
    return form.write([*ordered, *spare])
