"""One key of an answer's objects, or the strings of a list, as the labels show them: kinds, sets, lengths, copies.

Knows values and the texts they may be copied from; nothing of shapes, spelling or grammars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .patterns import infer_pattern

Answer = Any
"""A parsed answer: list of dicts, dict, list of strings, or string, following the form's shape."""

MAX_LABELS = 64
"""A closed set of strings larger than this is treated as free text."""
MIN_ROWS_PER_LABEL = 2.5
"""On average each label must be seen at least this often for a set of strings to count as closed."""
MAX_LABEL_LENGTH = 40
COPIED_SHARE = 0.98
"""Where so large a share of a key's values occurs in the texts, they are copied, and the others are slips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How far the labelled values go. Zeros say that no label shows it; grammars then take bounds of their own."""

    min_length: int = 1
    """Characters of the shortest string."""
    max_length: int = 0
    """Characters of the longest string; for lists and objects, of the longest inside them, keys included."""
    trimmed: bool = False
    """Whether strings were seen and none begins or ends with a blank."""
    min_items: int = 0
    max_items: int = 0
    """Number of items of the shortest and the longest list, of lists and objects inside these too."""
    numbers: tuple[str, ...] = ()
    """Which of integer, decimal and exponent were seen."""
    whole_digits: int = 0
    fraction_digits: int = 0
    """Most digits before and after the point of a number."""
    depth: int = 0
    """How deep lists and objects were nested in each other: 1 for a list of strings."""
    keys: tuple[str, ...] = ()
    """All keys of objects inside the values, where they form a small closed set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One key of the answer's objects, as the labels show it."""

    key: str
    kind: str
    """JSON kinds seen, joined by ``|``: string, number, boolean, null, list of strings, list, object."""
    values: tuple[str, ...] = ()
    """All values seen when they form a small closed set (most frequent first), else empty."""
    copied_share: float = 0.0
    """Share of the values that occur word for word in the row's text, placeholders of absence and empty ones
    left out."""
    absent: str | None = None
    """The string that stands for "not in the text", when the labels have one."""
    absent_alone: bool = False
    """Whether that string, inside a list, is always the only item."""
    pattern: str = ""
    """A regular expression that every string seen matches as a whole, absence and empty ones aside; else empty."""
    bounds: Bounds = Bounds()

    @property
    def copied(self) -> bool:
        """Whether the values are copied from the text, a slip in fifty aside."""
        return self.copied_share >= COPIED_SHARE

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Field:
        """The field that `dataclasses.asdict` made into JSON."""
        values = dict(data)
        values["values"] = tuple(values["values"])
        if "bounds" in values:  # runs made before bounds were kept have none
            bounds: dict[str, Any] = dict(values["bounds"])
            bounds |= {name: tuple(value) for name, value in bounds.items() if isinstance(value, list)}
            values["bounds"] = Bounds(**bounds)
        return cls(**values)


def kind_of(value: Answer) -> str:
    """The JSON kind of `value`, with lists of strings told apart from other lists."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, Mapping):
        return "object"
    return "list of strings" if all(isinstance(item, str) for item in value) else "list"


def is_closed_set(strings: Sequence[str]) -> bool:
    """Whether `strings` look like draws from a small set of labels rather than free text."""
    distinct = set(strings)
    if not distinct or any(len(label) > MAX_LABEL_LENGTH or "\n" in label for label in distinct):
        return False
    return len(distinct) <= MAX_LABELS and len(strings) >= MIN_ROWS_PER_LABEL * len(distinct)


def infer_fields(values: Sequence[Answer], texts: Sequence[str]) -> tuple[Field, ...]:
    """The fields of the objects in `values`, keys in the most frequent order."""
    objects = [
        (item, text, row)
        for row, (value, text) in enumerate(zip(values, texts))
        for item in (value if isinstance(value, list) else [value])
    ]
    order = Counter(tuple(item) for item, _, _ in objects).most_common(1)[0][0]
    return tuple(infer_field(key, [(item[key], text, row) for item, text, row in objects]) for key in order)


def infer_field(key: str, places: Sequence[tuple[Answer, str, int]]) -> Field:
    """What the labelled values under `key` have in common.

    Args:
        key: the key, empty for the strings of a list.
        places: each value, the text it may be copied from, and the number of its row.
    """
    kinds = Counter(kind_of(value) for value, _, _ in places)
    strings = [
        (string, text, row)
        for value, text, row in places
        for string in (value if isinstance(value, list) else [value])
        if isinstance(string, str)
    ]
    counts = Counter(string for string, _, _ in strings)
    absent = _absent_value(counts, strings)
    present = [(string, text) for string, text, _ in strings if string != absent]
    copied = [string in text for string, text in present if string]  # an empty one stands in every text
    return Field(
        key=key,
        kind="|".join(sorted(kinds)),
        values=tuple(string for string, _ in counts.most_common() if string != absent)
        if is_closed_set([string for string, _ in present])
        else (),
        copied_share=sum(copied) / len(copied) if copied else 0.0,
        absent=absent,
        absent_alone=all(len(value) == 1 for value, _, _ in places if isinstance(value, list) and absent in value),
        pattern=infer_pattern([string for string, _ in present if string]),
        bounds=measure(value for value, _, _ in places),
    )


def measure(values: Iterable[Answer]) -> Bounds:
    """The bounds of `values`."""
    strings: set[str] = set()
    numbers: set[tuple[str, int, int]] = set()
    sizes: set[int] = set()
    keys: Counter[str] = Counter()
    depth = max((_walk(value, strings, numbers, sizes, keys) for value in values), default=0)
    strings |= keys.keys()
    lengths = [len(string) for string in strings]
    return Bounds(
        min_length=min(lengths, default=1),
        max_length=max(lengths, default=0),
        trimmed=bool(strings) and all(string == string.strip() for string in strings),
        min_items=min(sizes, default=0),
        max_items=max(sizes, default=0),
        numbers=tuple(sorted({kind for kind, _, _ in numbers})),
        whole_digits=max((whole for _, whole, _ in numbers), default=0),
        fraction_digits=max((fraction for _, _, fraction in numbers), default=0),
        depth=depth,
        keys=tuple(keys) if is_closed_set(list(keys.elements())) else (),
    )


def _walk(
    value: Answer, strings: set[str], numbers: set[tuple[str, int, int]], sizes: set[int], keys: Counter[str]
) -> int:
    """Collect what `value` holds; returns how deep it is nested."""
    if isinstance(value, str):
        strings.add(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        numbers.add(_number_parts(value))
    elif isinstance(value, Mapping | list):
        sizes.add(len(value))
        if isinstance(value, Mapping):
            keys.update(value.keys())
        inner = value.values() if isinstance(value, Mapping) else value
        return 1 + max((_walk(item, strings, numbers, sizes, keys) for item in inner), default=0)
    return 0


def _number_parts(number: int | float) -> tuple[str, int, int]:
    """How Python writes `number`: its kind, digits before and after the point."""
    if isinstance(number, int):
        return "integer", len(str(abs(number))), 0
    whole, _, fraction = repr(abs(number)).partition(".")
    if "e" in whole + fraction:
        return "exponent", 0, 0
    return "decimal", len(whole), len(fraction)


def _absent_value(counts: Counter[str], strings: Sequence[tuple[str, str, int]]) -> str | None:
    """The placeholder of absence: one string that never occurs in its text while nearly all others always do.

    One row does not make a placeholder, however often it holds the string.
    """
    never = set(counts) - {string for string, text, _ in strings if string in text}
    frequent = {string for string in never if counts[string] >= max(2, 0.02 * len(strings))}
    rows = Counter(string for string, _ in {(string, row) for string, _, row in strings if string in frequent})
    candidates = [string for string in frequent if rows[string] > 1]
    others = [(string, text) for string, text, _ in strings if string not in candidates]
    if len(candidates) != 1 or not others:
        return None
    return candidates[0] if sum(string in text for string, text in others) >= 0.9 * len(others) else None
