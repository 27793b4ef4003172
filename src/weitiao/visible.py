"""Strangers' texts made fit to look at: what is invisible is shown, what is endless is shortened."""

from __future__ import annotations

import unicodedata

MAX_SHOWN_CHARACTERS = 4000
"""A longer text is shown up to here, with the number of characters left out."""

_AS_THEY_ARE = "\n\t\u200c\u200d"
"""Not printable, but part of a text's layout, and of how Persian words and emoji families are written."""


def shorten(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """`text`, or its beginning and how many characters were left out."""
    return text if len(text) <= limit else f"{text[:limit]} … {len(text) - limit} more characters"


def visible(text: str) -> str:
    r"""`text` with control characters as signs (␀ …), and what would reorder or hide text as ``\u202e``."""
    return "".join(map(_sign, text))


def _sign(character: str) -> str:
    code = ord(character)
    if character.isprintable() or character in _AS_THEY_ARE:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\\u{code:04x}"
    return character  # unassigned, private use and wide spaces: for the font to show
