r"""Faults of a text as such: wrongly decoded, half lost, invisible, left over from a web page.

    find_faults("浣犲ソ锛屼笘鐣")      → mojibake, to be read as "你好，世" and a lost end
    find_faults("Ã©tÃ©")              → mojibake, to be read as "été"
    find_faults("价格\u200b：3 元")    → invisible, mended by leaving the character out

`TextWatch` collects them over all rows. Knows no tasks and no files.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .findings import Edit, Finding, Grade, count_of
from .record import Record

Kind = Literal["mojibake", "lost-characters", "control-characters", "invisible-characters", "carriage-returns",
               "web-leftovers", "full-width"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """A faulty piece of a text, and what should stand there if that is certain."""

    kind: Kind
    piece: str
    mended: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Meaning:
    """What a kind of fault is called and does."""

    kind: Kind
    grade: Grade
    what: str
    message: str
    fix: str


_MEANINGS = (
    _Meaning(
        kind="mojibake",
        grade="warning",
        what="with text decoded in the wrong encoding (mojibake)",
        message="Somewhere UTF-8 was read as GBK or Latin-1; the model would learn the garbage.",
        fix="Export the rows anew as UTF-8; --fix decodes again what can be decoded without loss.",
    ),
    _Meaning(
        kind="lost-characters",
        grade="warning",
        what="with characters lost in an earlier conversion",
        message="U+FFFD (�), 锟斤拷 and the like stand where a character could not be decoded; it is gone.",
        fix="Export the rows anew from the source, or write the characters by hand.",
    ),
    _Meaning(
        kind="control-characters",
        grade="warning",
        what="with control characters",
        message="They are invisible, cost tokens, and separate words that the model knows as one.",
        fix="Remove them; --fix does.",
    ),
    _Meaning(
        kind="invisible-characters",
        grade="note",
        what="with invisible characters (zero-width spaces, byte order marks, direction marks)",
        message="They split words that look whole: 价格 with one inside is another text to the model.",
        fix="Remove them; --fix does.",
    ),
    _Meaning(
        kind="carriage-returns",
        grade="note",
        what="with Windows line ends inside their texts",
        message="The model learns two kinds of line end.",
        fix="Write \\n for \\r\\n; --fix does.",
    ),
    _Meaning(
        kind="web-leftovers",
        grade="note",
        what="with leftovers of a web page, such as &nbsp; or <br>",
        message="Served texts will hold none, and answers may repeat them.",
        fix="Strip the tags and decode the entities, unless they are meant.",
    ),
    _Meaning(
        kind="full-width",
        grade="note",
        what="with full-width letters or digits, such as Ａ１",
        message="To the model they are other characters than A1. An answer must copy them as they stand.",
        fix="Leave them where served texts hold them too; else write half-width ones throughout.",
    ),
)

# --- One text --------------------------------------------------------------------------------------------------------

_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_AS_LATIN = re.compile(  # "你" often comes as "ä½ ", its last byte, a no-break space, turned into a space
    rf"(?:[\u00e4-\u00e9][\u0080-\u00bf{_CP1252}] |[\u00c2-\u00f4][\u0080-\u00bf{_CP1252}]{{1,3}})+"
)
_REAL = re.compile(
    r"[\u00a0-\u024f\u0370-\u052f\u2010-\u2027\u20a0-\u20bf\u2122\u3000-\u9fff\uff00-\uffef\U0001f300-\U0001faff]+"
)
_LONG_UTF8 = re.compile(rb"(?:[\xe3-\xe9\xef][\x80-\xbf]{2}){4,}")
"""Four characters in a row are not there by chance: about one in a hundred places of sound Chinese looks like one."""
_NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")
_HANZI = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uff5e]")
_LOST = re.compile(r"\ufffd+|(?:锟斤拷?)+|[锟烫屯]{3,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")
_INVISIBLE = re.compile(r"[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]+")
_CARRIAGE = re.compile(r"\r\n?")
_WEB = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|#\d{2,5}|#x[0-9a-fA-F]{2,5});|</?(?:br|p|div|span|font|strong|td|tr|li)\b[^<>]{0,200}>",
    re.IGNORECASE,
)
_FULL_WIDTH = re.compile(r"[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]+")


def _gbk_markers() -> str:
    """The characters whose two GBK bytes open a Chinese character in UTF-8 (E3–E9, 80–BF); all of them are rare."""
    pairs = (bytes((lead, trail)) for lead in range(0xE3, 0xEA) for trail in range(0x80, 0xC0))
    return "".join(sorted({pair.decode("gbk", "ignore") for pair in pairs}))


_SUSPICIOUS = re.compile(
    rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u00c2-\u00f4\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufffd"
    rf"\uff10-\uff19\uff21-\uff3a\uff41-\uff5a锟烫屯&<{_gbk_markers()}]"
)


@lru_cache(maxsize=1024)  # a system prompt or an instruction comes back with every row
def find_faults(text: str) -> tuple[Fault, ...]:
    """All faults of `text`."""
    return tuple(_find_faults(text)) if _SUSPICIOUS.search(text) else ()


def _find_faults(text: str) -> Iterator[Fault]:
    garbled = [*_read_as_latin(text), *_read_as_gbk(text)]
    yield from garbled
    for fault in garbled:
        text = text.replace(fault.piece, " ")
    patterns: tuple[tuple[Kind, re.Pattern[str], str | None], ...] = (
        ("lost-characters", _LOST, None),
        ("control-characters", _CONTROL, ""),
        ("invisible-characters", _INVISIBLE, ""),
        ("carriage-returns", _CARRIAGE, "\n"),
        ("web-leftovers", _WEB, None),
        ("full-width", _FULL_WIDTH, None),
    )
    for kind, pattern, mended in patterns:
        for piece in dict.fromkeys(pattern.findall(text)):
            yield Fault(kind, piece, mended)


def _read_as_latin(text: str) -> Iterator[Fault]:
    """UTF-8 that was decoded as Latin-1 or Windows-1252."""
    for piece in dict.fromkeys(match.group() for match in _AS_LATIN.finditer(text)):
        data = b"".join(_latin_byte(character) for character in piece.replace(" ", "\u00a0"))
        try:
            read = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if _REAL.fullmatch(read) and (" " not in piece or len(_HANZI.findall(read)) >= 2):
            yield Fault("mojibake", piece, read)


def _latin_byte(character: str) -> bytes:
    return character.encode("cp1252") if character in _CP1252 else character.encode("latin-1")


def _read_as_gbk(text: str) -> Iterator[Fault]:
    """UTF-8 that was decoded as GBK: encoded back, most of the run is Chinese."""
    for piece in dict.fromkeys(match.group() for match in _NOT_ASCII.finditer(text)):
        try:
            data = piece.encode("gbk")
        except UnicodeEncodeError:
            data = piece.encode("gb18030", "replace")
        read = data.decode("utf-8", "replace")
        good, bad = len(_HANZI.findall(read)), read.count("\ufffd")
        if good >= 2 and bad * 3 <= good and good * 3 >= len(data) * 0.6:
            yield Fault("mojibake", piece, read if not bad else None)
        elif len(data) == 2 * len(piece):
            yield from _read_parts_as_gbk(piece, data)


def _read_parts_as_gbk(text: str, data: bytes) -> Iterator[Fault]:
    """Garbled stretches within a text that is otherwise sound; `data` is the text in two bytes a character."""
    for match in _LONG_UTF8.finditer(data):
        start, end = match.span()
        if "\ufffd" in match.group().decode("utf-8"):
            continue
        whole = start % 2 == end % 2 == 0  # else a byte was lost on the way
        piece = text[start // 2 : (end + 1) // 2]
        yield Fault("mojibake", piece, match.group().decode("utf-8") if whole else None)


# --- All rows --------------------------------------------------------------------------------------------------------


class TextWatch:
    """Takes rows in with `add`; `finish` tells which texts are faulty."""

    def __init__(self) -> None:
        self._sources: defaultdict[Kind, list[str]] = defaultdict(list)
        self._details: defaultdict[Kind, list[str]] = defaultdict(list)
        self._edits: defaultdict[Kind, list[Edit]] = defaultdict(list)

    def add(self, record: Record) -> None:
        """Look at every text of the row, its answer included."""
        faults = dict.fromkeys(fault for text in texts_of(record) for fault in find_faults(text))
        by_kind: defaultdict[Kind, list[Fault]] = defaultdict(list)
        for fault in faults:
            by_kind[fault.kind].append(fault)
        for kind, found in by_kind.items():
            self._sources[kind].append(record.source)
            self._details[kind].append("; ".join(_describe(fault) for fault in found[:3]))
            self._edits[kind] += [
                Edit(source=record.source, action="text", old=fault.piece, new=fault.mended, why=kind)
                for fault in found
                if fault.mended is not None
            ]

    def finish(self) -> list[Finding]:
        """A finding of each kind that was seen."""
        return [
            Finding(
                code=meaning.kind,
                grade=meaning.grade,
                title=f"{count_of(len(self._sources[meaning.kind]), 'row')} {meaning.what}",
                message=meaning.message,
                sources=tuple(self._sources[meaning.kind]),
                details=tuple(self._details[meaning.kind]),
                count=len(self._sources[meaning.kind]),
                fix=meaning.fix,
                edits=tuple(self._edits[meaning.kind]),
            )
            for meaning in _MEANINGS
            if self._sources[meaning.kind]
        ]


def texts_of(record: Record) -> list[str]:
    """Every text of the row: its messages, and the texts in its answer."""
    found = [message.text for message in record.messages]
    waiting: list[object] = [record.target]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return found


def plain_text(text: str) -> str:
    """`text` with all that is mere spelling folded: compatibility forms (１ = 1), case, white space.

    >>> plain_text("Ａ 1\u3000b")
    'a1b'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return "".join(text.split()).casefold()


def _describe(fault: Fault) -> str:
    seen = _written(fault.piece)
    return f"{seen} should be {_written(fault.mended)}" if fault.kind == "mojibake" and fault.mended else seen


def _written(text: str) -> str:
    """The text in quotes on one line, invisible characters as their code points."""
    shown = text if len(text) <= 30 else text[:29] + "…"
    return '"' + "".join(c if c.isprintable() else f"<U+{ord(c):04X}>" for c in shown) + '"'
