"""Texts as bags of hashed pieces, for search: many texts at once, in numpy, without a dictionary.

    苹果很甜，iPhone 也不错   →   苹 果 很 甜 苹果 果很 很甜   iphone iph pho hon one   也 不 错 也不 不错

Case, width and compatibility forms are folded. Where no blanks part the words (from U+2E80 on) the pieces are
characters and pairs of them, elsewhere words and the trigrams inside them; nothing reaches across punctuation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

_FIRST_WIDE = 0x2E80
"""The first code point of the scripts without blanks: Han, kana, hangul and all that follow, emoji among them."""
_WIDE_PUNCTUATION = (0x3000, 0x303F)


def hash_pieces(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The hash of every piece of every text, as often as it stands there, and for each the place of its text."""
    folded = [_fold(text) + " " for text in texts]  # the blank ends the last word
    codes = np.frombuffer("".join(folded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    owners = np.repeat(np.arange(len(folded)), [len(text) for text in folded])
    wide = (codes >= _FIRST_WIDE) & ((codes < _WIDE_PUNCTUATION[0]) | (codes > _WIDE_PUNCTUATION[1]))
    inside = np.zeros(len(codes), dtype=bool)
    narrow = codes < _FIRST_WIDE
    inside[narrow] = _word_characters()[codes[narrow]]
    singles = np.flatnonzero(wide)
    pairs = np.flatnonzero(wide[:-1] & wide[1:])
    trigrams = np.flatnonzero(inside[:-2] & inside[1:-1] & inside[2:])
    words, starts = _words(codes, inside)
    hashes = [
        _mix(codes[singles] * np.uint32(0x9E3779B1)),
        _mix(codes[pairs] * np.uint32(0x9E3779B1) + codes[pairs + 1] * np.uint32(0x85EBCA77) + np.uint32(1)),
        _mix(
            codes[trigrams] * np.uint32(0x9E3779B1)
            + codes[trigrams + 1] * np.uint32(0x85EBCA77)
            + codes[trigrams + 2] * np.uint32(0xC2B2AE3D)
            + np.uint32(2)
        ),
        words,
    ]
    return np.concatenate(hashes), np.concatenate([owners[at] for at in (singles, pairs, trigrams, starts)])


def _words(codes: NDArray[np.uint32], inside: NDArray[np.bool_]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The hash of each run of word characters, and where it starts."""
    edges = np.diff(np.concatenate(([False], inside)).astype(np.int8))
    starts = np.flatnonzero(edges == 1)
    if not len(starts):
        return np.zeros(0, dtype=np.uint32), starts
    places = np.flatnonzero(inside)
    first = np.searchsorted(places, starts)  # of each word among the characters that are in words
    offsets = np.arange(len(places)) - np.repeat(first, np.diff(np.append(first, len(places))))
    spread = _mix(codes[places] + (offsets * 0x01000193).astype(np.uint32))
    return _mix(np.add.reduceat(spread, first, dtype=np.uint32) + np.uint32(3)), starts


@cache
def _word_characters() -> NDArray[np.bool_]:
    """For each code point below the wide scripts, whether it belongs to words."""
    return np.array([chr(code).isalnum() for code in range(_FIRST_WIDE)])


def _fold(text: str) -> str:
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _mix(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Every bit of the result depends on every bit of the value (the finaliser of MurmurHash3)."""
    mixed = values ^ (values >> np.uint32(16))
    mixed = mixed * np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed = mixed * np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed
