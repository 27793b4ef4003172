"""Facts that nearly agree: values compared without regard to spelling, and values of which one overlaps the other.

Labels hold values and no offsets, so whether two values overlap is told from the values themselves: one stands inside
the other, or the end of one is the beginning of the other over more than half of the shorter one. They are compared
in characters for Chinese and in words else, so that "1" does not overlap "2019".

    北京大学 / 北京       overlap 0.5          《红楼梦》 / 红楼梦     equal
    北京 / 京东           none: half only      New York City / new york    overlap 0.67

Facts are matched one to one: equal ones first, then as many overlapping ones as can be had at once, which together
is the matching of the most credit.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection
from functools import lru_cache

from .facts import Fact
from .words import split_characters

PARTIAL_CREDIT = 0.5
"""What an overlapping value is worth, as in MUC-5 and SemEval-2013 task 9.1."""

Link = Callable[[Fact, Fact], float]
"""How alike two facts are: 0 for facts that are not to be matched, at most 1."""

_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">", "《": "》", "〈": "〉", "「": "」", "『": "』", "【": "】", "“": "”",
          "‘": "’", "«": "»", '"': '"', "'": "'", "`": "`"}  # fmt: skip
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
_BLANKS_BESIDE_CJK = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")


@lru_cache(maxsize=1 << 15)
def normalise(value: str) -> str:
    """`value` without what is mere spelling: width (NFKC), case, blanks, quotes and brackets around it.

    >>> normalise(" 《Ｔｈｅ  Times》"), normalise("北京 大学"), normalise("(a) or (b)")
    ('the times', '北京大学', '(a) or (b)')
    """
    text = unicodedata.normalize("NFKC", value).casefold()
    text = _BLANKS_BESIDE_CJK.sub("", " ".join(text.split()))
    while _is_wrapped(text):
        text = text[1:-1].strip()
    return text


def _is_wrapped(text: str) -> bool:
    """Whether the first sign opens what the last one closes, with something between them."""
    if len(text) < 3 or _PAIRS.get(text[0]) != text[-1]:
        return False
    opening, closing, depth = text[0], text[-1], 0
    for sign in text[1:-1]:
        depth += 1 if sign == opening != closing else -1 if sign == closing else 0
        if depth < 0:
            return False
    return bool(text[1:-1].strip())


@lru_cache(maxsize=1 << 15)
def _units(value: str) -> tuple[str, ...]:
    return tuple(split_characters(normalise(value)))


def overlap(a: str, b: str) -> float:
    """How much of the longer value the two share: 1 where they are equal but for spelling, 0 where nothing overlaps."""
    if normalise(a) == normalise(b):
        return 1.0
    short, long = sorted((_units(a), _units(b)), key=len)
    if not short:
        return 0.0
    inside = any(long[start : start + len(short)] == short for start in range(len(long) - len(short) + 1))
    shared = len(short) if inside else max(_edge(short, long), _edge(long, short))
    # equal units in other spelling ("3.5" and "3-5") are alike, not equal
    return min(shared / len(long), 0.99) if inside or 2 * shared > len(short) else 0.0


def _edge(before: tuple[str, ...], behind: tuple[str, ...]) -> int:
    """The most units with which `before` ends and `behind` begins."""
    most = min(len(before), len(behind))
    return next((size for size in range(most, 0, -1) if before[-size:] == behind[:size]), 0)


def alike(gold: Fact, given: Fact, types: Collection[int]) -> float:
    """How alike two facts of the same kind are: the least overlap of their values; 0 where a type differs.

    `types` are the places that hold types. A name of a kind is a word of a fixed vocabulary: it is equal or it is not.
    """
    if any(gold[place] != given[place] for place in types):
        return 0.0
    return min((overlap(a, b) for n, (a, b) in enumerate(zip(gold, given, strict=True)) if n not in types), default=1.0)


def match(golds: Collection[Fact], givens: Collection[Fact], link: Link) -> list[tuple[Fact, Fact, float]]:
    """Facts paired one to one, each with its likeness: as many of likeness 1 as there can be, then as many as can.

    Most alike first where there is a choice; the order of the facts decides nothing.
    """
    links = {gold: {given: value for given in sorted(givens) if (value := link(gold, given))} for gold in sorted(golds)}
    pairs = _most_pairs({gold: [g for g, value in row.items() if value == 1] for gold, row in links.items()})
    taken = set(pairs.values())
    rest = {
        gold: sorted((given for given in row if given not in taken), key=lambda given: (-row[given], given))
        for gold, row in links.items()
        if gold not in pairs
    }
    pairs |= _most_pairs(rest)
    return [(gold, given, links[gold][given]) for gold, given in sorted(pairs.items())]


def _most_pairs(candidates: dict[Fact, list[Fact]]) -> dict[Fact, Fact]:
    """A largest one-to-one matching of the keys with one of their candidates (augmenting paths, Kuhn 1955)."""
    pairs: dict[Fact, Fact] = {}
    holder: dict[Fact, Fact] = {}
    for start in candidates:
        asked_by: dict[Fact, Fact] = {}
        queue = [start]
        for gold in queue:
            new = [given for given in candidates[gold] if given not in asked_by]
            asked_by |= dict.fromkeys(new, gold)
            free = next((given for given in new if given not in holder), None)
            if free is not None:
                _hand_on(free, asked_by, pairs, holder)
                break
            queue += [holder[given] for given in new]
    return pairs


def _hand_on(free: Fact, asked_by: dict[Fact, Fact], pairs: dict[Fact, Fact], holder: dict[Fact, Fact]) -> None:
    """Give `free` to who asked for it, what that one held to who asked for that, and so on to the one without any."""
    given: Fact | None = free
    while given is not None:
        gold = asked_by[given]
        holder[given], pairs[gold], given = gold, given, pairs.get(gold)
