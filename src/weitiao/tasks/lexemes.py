"""The words of grammars: JSON strings, numbers and fixed texts as terminals of llguidance's Lark dialect.

Every function returns text that may stand on the right of a rule or a terminal. Knows one JSON dialect (whether
characters beyond ASCII are escaped) and nothing of shapes, fields or texts longer than a value.

    literal('["a"')          → "[\\"a\\""          exactly these bytes
    string(min_length=1, max_length=3)            one to three characters between quotes, escaped as json.dumps does
    copied("a\\nb")          → any non-empty piece of these three characters, an escape never cut in two
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from ..errors import FormError

_ESCAPES = r'\\["\\nrtbf]|\\u00(?:0[0-7bef]|1[0-9a-f])'
"""How json.dumps writes quote, backslash and control characters: never raw, never in another spelling."""
_CHARACTER = rf'[^"\\\x00-\x1f]|{_ESCAPES}'
_ASCII_CHARACTER = (
    rf"[ !#-\[\]-~]|{_ESCAPES}|\\u00(?:7f|[89a-f][0-9a-f])|"
    r"\\u(?:0[1-9a-f]|[1-9a-c][0-9a-f]|d[0-7]|[ef][0-9a-f])[0-9a-f]{2}|"
    r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}"
)
"""Characters beyond U+FFFF are two escapes and count as one; half of such a pair stands for no character."""
_ESCAPES_NOT_BLANK = r'\\["\\b]|\\u00(?:0[0-7ef]|1[0-9ab])'
_NOT_BLANK = rf'[^"\\\s\x00-\x1f]|{_ESCAPES_NOT_BLANK}'
_ASCII_NOT_BLANK = _ASCII_CHARACTER.replace("[ !", "[!").replace(_ESCAPES, _ESCAPES_NOT_BLANK)


def literal(text: str) -> str:
    """Exactly `text`. Raises FormError for text that has no UTF-8 bytes."""
    _require_utf8(text)
    return json.dumps(text)


def one_of(texts: Iterable[str]) -> str:
    """Exactly one of `texts`."""
    return " | ".join(map(literal, texts))


def regex(pattern: str) -> str:
    """What `pattern` matches, the whole of it."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", r"\n") + "/"


def quoted(text: str, *, ensure_ascii: bool) -> str:
    """`text` as a JSON string."""
    return json.dumps(text, ensure_ascii=ensure_ascii)


def string(*, min_length: int, max_length: int, trimmed: bool = False, ensure_ascii: bool = False) -> str:
    """A JSON string of `min_length` (0 or 1) to `max_length` characters.

    Args:
        trimmed: whether it may neither begin nor end with a blank.
    """
    character = _ASCII_CHARACTER if ensure_ascii else _CHARACTER
    if not trimmed:
        return regex(f'"(?:{character}){{{min_length},{max_length}}}"')
    edge = _ASCII_NOT_BLANK if ensure_ascii else _NOT_BLANK
    inner = f"(?:(?:{character}){{0,{max_length - 2}}}(?:{edge}))?" if max_length > 1 else ""
    body = f"(?:{edge}){inner}"
    return regex(f'"{body}"' if min_length else f'"(?:{body})?"')


def copied(text: str, *, trimmed: bool = False, ensure_ascii: bool = False) -> str | None:
    """The inside of a JSON string that is a non-empty piece of `text`; None when there is no such piece.

    Each character of `text`, as it is spelled inside a JSON string, is one link of the chain: a piece begins and ends
    between characters, never inside an escape. Nothing else of JSON can be written, so no text can end its string.
    """
    parts = [text] if ensure_ascii else re.split("[\ud800-\udfff]", text)  # half a pair has no UTF-8, and is no word
    chains = [
        [quoted(character, ensure_ascii=ensure_ascii)[1:-1] for character in part]
        for part in parts
        if (part.strip() if trimmed else part)
    ]
    if not chains:
        return None
    either = " | ".join(f"%regex {json.dumps({'substring_chunks': chain})}" for chain in chains)
    if not trimmed:
        return f"({either}) & /(?s:.+)/"
    character, edge = (_ASCII_CHARACTER, _ASCII_NOT_BLANK) if ensure_ascii else (_CHARACTER, _NOT_BLANK)
    return f"({either}) & {regex(f'(?:{edge})(?:(?:{character})*(?:{edge}))?')}"


def number(kinds: Iterable[str] = (), *, whole_digits: int = 0, fraction_digits: int = 0) -> str:
    """A JSON number as Python writes it: no needless zeros, no plus, no minus zero.

    Args:
        kinds: which of integer, decimal and exponent may be written; none: integers and decimals.
        whole_digits: most digits before the point; 0: 12.
        fraction_digits: most digits after it; 0: 3. Up to 15 digits together, each decimal is read and written back
            alike; beyond that, and with exponents, only the number is the same.
    """
    allowed = set(kinds) or {"integer", "decimal"}
    whole, fraction = whole_digits or 12, fraction_digits or 3
    forms = []
    if "integer" in allowed:
        forms.append(f"0|-?[1-9][0-9]{{0,{whole - 1}}}")
    if "decimal" in allowed:  # Python changes to exponents below 0.0001
        forms.append(rf"-?[1-9][0-9]{{0,{whole - 1}}}\.(?:[0-9]{{0,{fraction - 1}}}[1-9]|0)")
        rest = f"(?:[0-9]{{0,{fraction - 2}}}[1-9])?" if fraction > 1 else ""
        forms.append(rf"0\.0|-?0\.0{{0,{min(3, fraction - 1)}}}[1-9]{rest}")
    if "exponent" in allowed:
        small, large = "0[5-9]|[1-9][0-9]|[12][0-9]{2}|3(?:[01][0-9]|2[0-4])", "1[6-9]|[2-9][0-9]|[12][0-9]{2}|30[0-7]"
        forms.append(rf"-?[1-9](?:\.[0-9]{{0,15}}[1-9])?e(?:-(?:{small})|\+(?:{large}))")
        forms.append(r"-?1(?:\.(?:[0-6][0-9]{0,15}|7(?:[0-8][0-9]{0,14})?|79[0-6][0-9]{0,13}))?e\+308")
    return regex("|".join(forms))


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FormError(f"{text[:60]!r} holds half of a surrogate pair, which no UTF-8 text can hold.") from None
