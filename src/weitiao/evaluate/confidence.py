"""How probable an answer and each of its values were to the model that wrote them, out of all it was allowed to write.

Knows answers, their tokens and log-probabilities; knows nothing of gold answers. What share of answers with such a
probability is right is a matter of calibration (calibration.py).

    >>> form = AnswerForm(shape="label list", labels=("手机", "水果"))
    >>> tokens = [(0, 2, 0.0), (2, 4, math.log(0.8)), (4, 5, math.log(0.9)), (5, 6, math.log(0.5)), (6, 6, 0.0)]
    >>> [(one.path, one.value, round(one.confidence, 2)) for one in field_confidences(form, '["水果"]', tokens)]
    [('[0]', '水果', 0.72)]
    >>> round(answer_confidence(tokens), 2)
    0.36

The token that closes the list, the fourth, belongs to no value: whether there should be a second label is a matter of
the answer as a whole.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from ..tasks.forms import Answer, AnswerForm
from ..tasks.value_spans import ValueSpan, value_spans
from .prediction import FieldConfidence

Token = tuple[int, int, float]
"""First character, place behind the last one, and log-probability of one generated token, in the order of writing.

The log-probability is that under the constraint: renormalised over the tokens that were allowed, 0 where only one was.
Tokens that spell one character together share its place. A token without characters, such as the one that ends the
answer, has an empty place.
"""


def answer_confidence(tokens: Sequence[Token]) -> float:
    """The probability (0–1) of the whole answer: the product over all its tokens, the one that ends it included.

    It holds every decision: each value, how many there are, and that no more follow.
    """
    if not tokens:
        raise ValueError("An answer without tokens has no confidence: hand over the token that ends it, too.")
    return _probability(tokens)


def field_confidences(form: AnswerForm, text: str, tokens: Sequence[Token]) -> tuple[FieldConfidence, ...]:
    """For each value of the answer `text`, in the order they are written, its probability (0–1) given what precedes it.

    That is the product over the tokens that decide what the value is: from the one with its first letter to the one
    that decides where it ends, which is the closing quotation mark of a string, whatever follows a number, and the end
    of an answer that is one label or free text. An opening quotation mark decides something only where the form allows
    other things than strings. A token at the value's edge that holds more than the value, such as ``"}]``, counts
    whole, because its probability cannot be divided: the value's own is at least the figure given.

    Raises:
        FormError: `text` is not an answer of this form, and so has no values.
        ValueError: `tokens` are not those of `text`: they are out of order, or leave characters of it out.
    """
    places = _Places(text, tokens)
    return tuple(
        FieldConfidence(
            path=span.path,
            value=_as_text(span.value),
            confidence=_probability(places.within(*_decided(form, span))),
        )
        for span in value_spans(form, text)
    )


def _decided(form: AnswerForm, span: ValueSpan) -> tuple[int, int]:
    """The characters that decide what the value is: the first of them, and the place behind the last."""
    if form.is_plain:
        return span.start, span.end + 1
    if isinstance(span.value, str):
        return span.start + _is_surely_string(form, span), span.end
    closes_itself = isinstance(span.value, bool | list | dict) or span.value is None
    return span.start, span.end + (not closes_itself)


def _is_surely_string(form: AnswerForm, span: ValueSpan) -> bool:
    """Whether nothing but a string can stand where the value does."""
    kinds = {field.key: field.kind for field in form.fields}
    match span.steps[1:] if form.shape == "object list" else span.steps:
        case [str(key)]:
            return kinds.get(key) == "string"
        case [str(key), int()]:
            return kinds.get(key) == "list of strings"
        case _:
            return form.shape in ("label list", "string list")


class _Places:
    """Tokens by the characters they hold; one without characters counts as standing on the character after it."""

    def __init__(self, text: str, tokens: Sequence[Token]) -> None:
        self._tokens = tokens
        self._starts = [start for start, _, _ in tokens]
        self._ends = [max(end, start + 1) for start, end, _ in tokens]
        if self._starts != sorted(self._starts) or self._ends != sorted(self._ends):
            raise ValueError("The tokens of an answer must stand in the order of their characters.")
        reached = 0
        for start, end, _ in (*tokens, (len(text), len(text), 0.0)):
            if start > reached:
                raise ValueError(f"No token holds character {reached + 1} of {len(text)} of the answer.")
            reached = max(reached, end)

    def within(self, start: int, end: int) -> Sequence[Token]:
        """The tokens that hold any of the characters from `start` to before `end`."""
        return self._tokens[bisect_right(self._ends, start) : bisect_left(self._starts, end)]


def _probability(tokens: Sequence[Token]) -> float:
    return math.exp(min(0.0, math.fsum(logprob for _, _, logprob in tokens)))  # rounding may lift 0 a little above


def _as_text(value: Answer) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
