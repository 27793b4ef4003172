"""JSON as answers are allowed to be: no key twice in one object, no NaN, no number too large, no bottomless nesting."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any


def loads(text: str) -> Any:
    """Parsed JSON; duplicate keys and NaN or Infinity are refused.

    Raises:
        ValueError: not JSON (then a `json.JSONDecodeError` with the place), or one key given twice.
    """
    if text.startswith("\ufeff"):  # json.loads would complain in words about Python's codecs
        raise json.JSONDecodeError("Unexpected byte order mark", text, 0)
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("The JSON is nested too deeply.") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"The key {', '.join(repeated)} is given twice in one object.")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value.")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"The number {digits} is too large for JSON.")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite)
"""Made once: json.loads would make one for every answer, which costs as much as reading it."""
