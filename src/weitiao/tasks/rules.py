"""Answers that a user's regular expression or Lark grammar describes: read strictly, refused where they cannot be used.

Expressions are Python's, matched against the whole answer; the engine must understand them too, so they hold no
look-around and no back references. A grammar is llguidance's dialect of Lark with the rule ``start``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from ..errors import FormError
from . import lexemes
from .byte_matcher import accepts, complaint

LONGEST = 4_000
"""Characters of the longest text that an expression without an end of its own may match."""


def check_rule(kind: Literal["pattern", "grammar"], definition: str) -> str:
    """Why answers cannot be held to `definition`; empty when they can."""
    if kind == "grammar":
        return complaint(definition)
    try:
        re.compile(definition)
    except re.error as error:
        return f"{error}"
    return complaint(rule_of_pattern(definition))


def check_text(kind: Literal["pattern", "grammar"], definition: str, text: str) -> None:
    """Raise FormError unless `text` as a whole follows `definition`."""
    if kind == "pattern":
        if not _compiled(definition).fullmatch(text):
            raise FormError(f"{text[:60]!r} does not match the pattern {definition}.")
        return
    try:
        taken = accepts(definition, text)
    except UnicodeEncodeError:
        raise FormError(f"{text[:60]!r} holds half of a surrogate pair, which no UTF-8 text can hold.") from None
    if taken is not None:
        where = f"after {text[max(0, taken - 20) : taken]!r}" if taken else "at the very beginning"
        what = f"{text[taken : taken + 10]!r} cannot stand" if taken < len(text) else "it breaks off"
        raise FormError(f"The answer does not follow the grammar: {where}, {what}.")


def rule_of_pattern(pattern: str) -> str:
    """The grammar of texts that match `pattern` and are at most `LONGEST` characters long."""
    bare = pattern.removeprefix("^")
    if bare.endswith("$") and not bare.endswith(r"\$"):  # the whole text is matched anyway
        bare = bare[:-1]
    return f"start: ANSWER\nANSWER: {lexemes.regex(f'(?:{bare})')} & /(?s:.{{0,{LONGEST}}})/"


@lru_cache(maxsize=32)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
