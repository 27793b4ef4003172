"""JSON text → values, strictly: what a lenient reader would settle by guessing is noted.

Repeated keys, NaN and infinity, NUL characters, half characters (lone surrogates) and bottomless nesting. Knows no
files; what a place is called is the caller's business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from weitiao.errors import Problem

MAX_DEPTH = 100
"""Lists and objects inside each other; what walks values may then recurse without fear."""

_JSON_SPACE = re.compile(r"[ \t\n\r]*")


class JsonReader:
    """Decodes one JSON value after the other; `repeated` and `odd` speak of the value decoded last.

    One decoder for a whole file: making one for each row would cost as much as decoding the row.
    """

    def __init__(self) -> None:
        self.repeated: list[str] = []
        """Keys that stand twice in one object."""
        self.odd = False
        """Whether a number was not finite."""
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value at `start` and where it ends. Raises json.JSONDecodeError."""
        if self.repeated:
            self.repeated = []
        self.odd = False
        try:
            return self._decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise json.JSONDecodeError("Too many lists or objects inside each other", text, start) from None
        except ValueError:  # Python's limit on the digits of an integer
            raise json.JSONDecodeError("A number with too many digits", text, start) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated += [key for index, key in enumerate(keys) if key in keys[:index]]
        return value

    def _constant(self, text: str) -> float:
        self.odd = True
        return float(text.replace("Infinity", "inf"))

    def _float(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self.odd = True
        return value


def needs_walk(text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether the JSON text may hold what only a walk over its value finds; a few substring searches, so cheap."""
    if text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0:
        return True
    if text.find("\\u0000", start, end) >= 0:
        return True
    return text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH


def find_odd_values(value: object, source: str) -> Iterator[Problem]:
    """A problem for each number, text or key inside `value` that JSON or UTF-8 cannot say, and for deep nesting."""
    waiting: list[tuple[str, object, int]] = [("", value, 0)]
    while waiting:
        place, found, depth = waiting.pop()
        if isinstance(found, dict | list) and depth >= MAX_DEPTH:
            message = f"holds more than {MAX_DEPTH} lists or objects inside each other."
            outermost = re.split(r"[.\[]", place, maxsplit=1)[0]
            yield Problem(source=source, field=printable(outermost), message=message, fix="Flatten the row.")
            return
        if isinstance(found, dict):
            for key in found:
                yield from _odd(printable(str(key)), key, source)
            inside = [(f"{place}.{key}" if place else str(key), item, depth + 1) for key, item in found.items()]
            waiting += reversed(inside)
        elif isinstance(found, list):
            waiting += reversed([(f"{place}[{index}]", item, depth + 1) for index, item in enumerate(found)])
        else:
            yield from _odd(printable(place) or "row", found, source)


def _odd(place: str, value: object, source: str) -> Iterator[Problem]:
    if isinstance(value, float) and not math.isfinite(value):
        message, fix = f"is {value}, which JSON cannot say.", "Write a finite number, or a text."
    elif isinstance(value, str) and "\0" in value:
        message, fix = "holds a NUL character.", "Remove \\u0000."
    elif isinstance(value, str) and printable(value) != value:
        message, fix = "holds half a character (a lone surrogate).", "Write the character itself instead of \\ud8…."
    else:
        return
    yield Problem(source=source, field=place, message=message, fix=fix)


def parse_inner(text: str) -> Any:
    """The value of JSON that stands inside a text, such as a tool's arguments. Raises ValueError with the reason."""
    reader = JsonReader()
    value, end = reader.decode(text, skip_space(text, 0))
    if skip_space(text, end) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    if reader.repeated:
        raise ValueError(f"the key {printable(reader.repeated[0])} stands twice in one object")
    if reader.odd or needs_walk(text):
        for problem in find_odd_values(value, ""):
            raise ValueError(f"{problem.field} {problem.message.removesuffix('.')}")
    return value


def skip_space(text: str, start: int) -> int:
    """Where the first character that is no JSON white space stands, from `start` on."""
    found = _JSON_SPACE.match(text, start)
    return found.end() if found else start


def printable(text: str) -> str:
    """The text with half characters written out, so that printing it cannot fail."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- What is wrong with text that is not JSON ------------------------------------------------------------------------

_JSON_FIXES = (
    ("Extra data", "Write one JSON object per line."),
    ("Unterminated string", "Close the text with a double quote; a line break inside a text is written \\n."),
    ("Invalid control character", "Inside a text write a tab as \\t and a line break as \\n."),
    ("Invalid \\", "Inside a text write a backslash twice: \\\\."),
    ("Expecting property name", "Put keys in double quotes, and no comma after the last one."),
    ("", "Write complete JSON objects: double quotes around texts, commas between pairs, braces closed."),
)


def json_problem(error: json.JSONDecodeError, source: str) -> Problem:
    """The problem of a line that is not JSON: what is wrong, at which column, and what stands there."""
    there = error.doc[error.pos :].partition("\n")[0]
    seen = f"`{repr(there[:24])[1:-1]}{'…' if len(there) > 24 else ''}` stands" if there.strip() else "the line ends"
    fix = next(fix for start, fix in _JSON_FIXES if error.msg.startswith(start))
    message = f"is not JSON: {error.msg.removesuffix(' at').rstrip(': ')}, at column {error.colno}, where {seen}."
    return Problem(source=source, field="row", message=message, fix=fix)
