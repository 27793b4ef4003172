"""One regular expression that all labelled strings of a key agree on: dates, times, amounts, codes.

infer_pattern(["2024-05-01", "2023-11-30", …])  → [0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])
infer_pattern(["12元", "8.5元", …])             → [0-9]{1,4}(?:\\.[0-9]{1,2})?元
infer_pattern(["ABC1234", "XYZ0001", …])        → [A-Z]{3}[0-9]{4}
infer_pattern(["anything", "else", …])          → ""

Modest on purpose: a pattern is either one of a few well-known ones or the same runs of capitals, small letters and
digits throughout, and it never excludes a string that it was read from. What it says is true of Python's expressions
and of the engine's alike. Knows strings only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

LEAST_VALUES = 8
"""So many different strings must agree; fewer may do so by chance."""
MAX_UNITS = 6
MAX_UNIT_LENGTH = 8

_YEAR = "[12][0-9]{3}"
_MONTH, _DAY = "(?:0[1-9]|1[0-2])", "(?:0[1-9]|[12][0-9]|3[01])"
_BARE_MONTH, _BARE_DAY = "(?:[1-9]|1[0-2])", "(?:[1-9]|[12][0-9]|3[01])"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"

_KNOWN = (
    *(f"{_YEAR}{mark}{_MONTH}{mark}{_DAY}" for mark in ("-", "/", r"\.")),
    *(f"{_YEAR}{mark}{_BARE_MONTH}{mark}{_BARE_DAY}" for mark in ("-", "/", r"\.")),
    f"{_YEAR}年{_MONTH}月{_DAY}日",
    f"{_YEAR}年{_BARE_MONTH}月{_BARE_DAY}日",
    f"{_YEAR}年(?:{_MONTH}|{_BARE_MONTH})月(?:{_DAY}|{_BARE_DAY})日",
    f"{_YEAR}年{_BARE_MONTH}月",
    f"{_YEAR}年",
    f"{_BARE_MONTH}月{_BARE_DAY}日",
    f"{_YEAR}-{_MONTH}",
    _CLOCK,
    f"{_CLOCK}:[0-5][0-9]",
    f"{_YEAR}-{_MONTH}-{_DAY}[T ]{_CLOCK}(?::[0-5][0-9])?(?:Z|[+-][0-9]{{2}}:[0-9]{{2}})?",
)
_AMOUNT = re.compile(r"(?P<sign>-?)(?P<whole>[0-9]+)(?:\.(?P<fraction>[0-9]+))?(?P<unit>[^0-9.,\-\s\"\\\x00-\x1f]*)")
_RUNS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("[0-9]", lambda c: c.isascii() and c.isdecimal()),
    ("[A-Z]", lambda c: c.isascii() and c.isupper()),
    ("[a-z]", lambda c: c.isascii() and c.islower()),
)


def infer_pattern(values: Sequence[str]) -> str:
    """The expression that each of `values` matches as a whole; empty when they agree on none."""
    distinct = sorted(set(values))
    if len(distinct) < LEAST_VALUES:
        return ""
    for pattern in (*_KNOWN, _code(distinct), _amount(distinct)):
        if pattern and all(re.fullmatch(pattern, value) for value in distinct):
            return pattern
    return ""


def _code(values: Sequence[str]) -> str:
    """The runs of digits, capitals and small letters, where all values have the same ones, four characters or more."""
    only = _runs_of(values[0])
    if any(kind == "?" for kind, _ in only) or any(_runs_of(value) != only for value in values):
        return ""
    digits = sum(length for kind, length in only if kind == "[0-9]")
    marks = sum(length for kind, length in only if not kind.startswith("["))
    if sum(length for _, length in only) < 4 or not digits or marks > digits:
        return ""
    return "".join(f"{kind}{{{length}}}" if length > 1 else kind for kind, length in only)


def _runs_of(value: str) -> list[tuple[str, int]]:
    return [(kind, len(list(group))) for kind, group in groupby(map(_kind, value))]


def _kind(character: str) -> str:
    known = next((name for name, holds in _RUNS if holds(character)), "")
    return known or (re.escape(character) if character in "-_./:# +()" else "?")


def _amount(values: Sequence[str]) -> str:
    """A number with one of few units, or none; two digits more than any value has, before the point and after it."""
    parts = [_AMOUNT.fullmatch(value) for value in values]
    found = [part for part in parts if part is not None]
    units = sorted({part["unit"] for part in found})
    if len(found) < len(values) or len(units) > MAX_UNITS or max(map(len, units)) > MAX_UNIT_LENGTH:
        return ""
    whole = max(len(part["whole"]) for part in found) + 2
    fraction = max(len(part["fraction"] or "") for part in found)
    unit = "|".join(map(re.escape, units))
    return "".join(
        [
            "-?" if any(part["sign"] for part in found) else "",
            f"[0-9]{{1,{whole}}}",
            rf"(?:\.[0-9]{{1,{fraction + 2}}})?" if fraction else "",
            f"(?:{unit})" if len(units) > 1 else unit,
        ]
    )
