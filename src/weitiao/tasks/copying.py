"""Values that should have been copied from the text and were not: which piece of the text was meant.

nearest_piece("IPhone 15", "他买了 iphone15 。")     → "iphone15", certain: only case and spacing differ
nearest_piece("周星池", "《喜剧之王》由周星驰主演")   → "周星驰", not certain
nearest_piece("火星", "今天下雨")                     → None

Knows two texts; which values are meant to be copied is for answers.py to say.
"""

from __future__ import annotations

import difflib
import unicodedata
from dataclasses import dataclass

_LEAST_LIKENESS = 0.6
_AROUND = " \t\n　\"'“”‘’「」『』《》〈〉()（）[]【】,，.。、;；:：!！?？"
"""What labellers put around a value that the text has bare."""
_LONGEST = 100
"""A longer value is a sentence of its own, and which one was meant is for a person to see."""
_SURE_LENGTH = 5
"""A single differing character is taken for a slip from this length on; in a shorter name it may be another name."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a text that a value may have meant."""

    text: str
    certain: bool
    """Whether only spelling differs, and no other piece of the text fits as well."""


def nearest_piece(value: str, text: str) -> Piece | None:
    """The piece of `text` that `value` most likely is a copy of; None when nothing is near."""
    spelt = _pieces_spelt_otherwise(value, text)
    if spelt:
        return Piece(spelt[0], certain=len(set(spelt)) == 1)
    bare = value.strip(_AROUND)
    if bare and bare in text:
        return Piece(bare, certain=True)
    scored = _similar_pieces(value, text) if len(value) <= _LONGEST else []
    if not scored or scored[0][0] < _LEAST_LIKENESS:
        return None
    piece = scored[0][1]
    one_slip = [other for _, other in scored if num_edits(other, value) == 1]
    return Piece(piece, certain=one_slip == [piece] and len(value) >= _SURE_LENGTH)


def _pieces_spelt_otherwise(value: str, text: str) -> list[str]:
    """Pieces equal to `value` but for case, width, blanks and compatibility forms."""
    wanted, _ = _fold(value)
    folded, places = _fold(text)
    found, start = [], folded.find(wanted) if wanted else -1
    while start >= 0:
        found.append(text[places[start] : places[start + len(wanted) - 1] + 1])
        start = folded.find(wanted, start + 1)
    return found


def _fold(text: str) -> tuple[str, list[int]]:
    """`text` without blanks, case and width, and for each of its characters the place in `text`."""
    folded, places = [], []
    for place, character in enumerate(text):
        for one in unicodedata.normalize("NFKC", character).casefold():
            if not one.isspace():
                folded.append(one)
                places.append(place)
    return "".join(folded), places


def _similar_pieces(value: str, text: str) -> list[tuple[float, str]]:
    """Pieces of about the length of `value` around their longest common run, the most similar first."""
    matcher = difflib.SequenceMatcher(None, text, value, autojunk=False)
    anchor = matcher.find_longest_match()
    if not anchor.size:
        return []
    start = anchor.a - anchor.b
    pieces = {
        text[max(0, begin) : begin + length]
        for begin in range(start - 2, start + 3)
        for length in range(max(1, len(value) - 2), len(value) + 3)
        if begin + length > 0
    }
    scored = {(1 - num_edits(piece, value) / max(len(piece), len(value)), piece.strip()) for piece in pieces}
    return sorted(scored, key=lambda pair: (-pair[0], abs(len(pair[1]) - len(value)), pair[1]))


def num_edits(a: str, b: str) -> int:
    """How many characters must be put in, left out or replaced to make `b` of `a` (Levenshtein).

    >>> num_edits("周星池", "周星驰"), num_edits("abc", "bc")
    (1, 1)
    """
    row = list(range(len(b) + 1))
    for number, left in enumerate(a, start=1):
        before, row[0] = row[0], number
        for place, right in enumerate(b, start=1):
            before, row[place] = row[place], min(before + (left != right), row[place] + 1, row[place - 1] + 1)
    return row[-1]
