r"""SentencePiece's normalisation rules as steps of a fast tokenizer that give the same text, character for character.

A SentencePiece file carries its rules as a compiled table: texts of one to four characters and what each becomes. At
every place the longest of them is replaced, and nothing is looked at twice. `tokenizers` reads the same table in its
``Precompiled`` step, but looks up user-perceived characters, only short ones, and takes the shortest rule that fits:
combining marks vanish (``Ａ`` with any mark becomes ``A``) and Korean letters and voiced kana stay apart.

What makes it exact rests on a property of such tables, which `normalizer_steps` checks: a rule for several characters
does what the rules for each of them do, and then Unicode's canonical composition; the few that do not are spelt out. So
the places where a rule for several characters applies are marked out first, then single characters are replaced, then
all is composed::

    u ¨ ̄ ̇   →   u ¨ ̄ | ̇          a bar behind every rule's text, and before every character that could join on
              →   u ̈ ̄ | ̇          rules for single characters, each kept from its neighbours while they are looked up
              →   ǖ | ̇             composition, which no bar lets through
              →   ǖ ̇              bars taken out

Source of the table's layout: google/sentencepiece, src/normalizer.cc and third_party/darts_clone.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Regex, normalizers

_BAR, _NUL = "B\x00", "N\x00"
"""A bar, and a NUL of the text: after `_NUL` has replaced these, no text has a bar in it. What stands before the NUL
takes no part in any rule, and nothing joins on to a NUL."""

_APART = "\x02"
"""Parts characters while they are looked up; the rules themselves remove it."""

_MOST_OTHERS = 100
"""Rules that may be spelt out one by one: those of a younger Unicode than the library's composition."""

_JOINING = r"\p{M}\p{Cn}\x{1161}-\x{1175}\x{11A8}-\x{11C2}"
"""All that composition could join to what stands before: marks, Korean vowels and finals, and what is not yet known."""


def normalizer_steps(charsmap: bytes, *, kept: Sequence[str] = ()) -> list[normalizers.Normalizer]:
    """The steps that normalise as SentencePiece does with this table.

    Args:
        charsmap: the table, as the file has it.
        kept: texts of ASCII characters that stay as they are and take no part in a rule with what follows them.

    Raises:
        ValueError: the bytes are no such table, or its rules are not of the kind that can be taken apart.
    """
    rules = read_rules(charsmap)
    single = {text: result for text, result in rules.items() if len(text) == 1}
    several = {text: result for text, result in rules.items() if len(text) > 1}
    apart = ["".join([single.get(character, character) for character in text]) for text in several]
    composed = normalizers.NFC().normalize_str("\x00".join(apart)).split("\x00")
    others = {before: result for before, result, found in zip(apart, several.values(), composed) if found != result}
    if len(others) > _MOST_OTHERS:
        raise ValueError(f"it has {len(others)} rules for several characters that are no compositions")
    joined: defaultdict[str, set[str]] = defaultdict(set)
    """By what follows its first character: the first characters of the rules for several."""
    for text in several:
        joined[text[1:]].add(text[0])
    if single.get(_APART) != "" or any(character in single for character in _BAR + _NUL):
        raise ValueError("it has other rules for control characters than SentencePiece's own tables have")
    joining = _JOINING + _ranges(character for character, result in single.items() if _joins(result))
    steps: list[normalizers.Normalizer] = [normalizers.Replace("\x00", _NUL)]
    if kept:
        behind = "|".join(f"(?<={re.escape(text)})" for text in kept)
        steps.append(normalizers.Replace(Regex(f"(?={'[' + joining + ']'})(?:{behind})"), _BAR))
    any_one = "(?m:.)"
    return [
        *steps,
        normalizers.Prepend(_BAR),  # the step that looks up rules loses count of a text whose beginning it removes
        normalizers.Replace(Regex(rf"(?={any_one}[{joining}])(?>{_longest_first(joined)}|{any_one})\K"), _BAR),
        normalizers.Replace(Regex(rf"[{_ranges(single)}]\K|(?=[{joining}])"), _APART),
        normalizers.Precompiled(charsmap),
        *(normalizers.Replace(before, others[before]) for before in sorted(others, key=len, reverse=True)),
        normalizers.NFC(),
        normalizers.Replace(_BAR, ""),
        normalizers.Replace(_NUL, "\x00"),
    ]


def read_rules(charsmap: bytes) -> dict[str, str]:
    """The table as texts and what each becomes.

    Raises:
        ValueError: the bytes are no such table.
    """
    num_bytes = int.from_bytes(charsmap[:4], "little")
    if num_bytes % 4 or not 0 < num_bytes <= len(charsmap) - 4:
        raise ValueError("its table of rules has another length than it says")
    units, results = np.frombuffer(charsmap[4 : 4 + num_bytes], "<u4"), charsmap[4 + num_bytes :]
    labels, places = units & 0x800000FF, np.arange(len(units))
    by_parent = np.argsort(places ^ labels, kind="stable")
    parents = (places ^ labels)[by_parent]
    rules: dict[str, str] = {}
    nodes, texts = np.zeros(1, np.int64), np.zeros((1, 0), np.uint8)
    while len(nodes):  # all nodes of one depth at a time; the rows of `texts` are the bytes that lead to them
        blocks = nodes ^ _offsets(units[nodes])
        firsts = np.searchsorted(parents, blocks)
        counts = np.searchsorted(parents, blocks, side="right") - firsts
        rows = np.repeat(np.arange(len(nodes)), counts)
        nodes = by_parent[np.arange(len(rows)) + np.repeat(firsts - np.cumsum(counts) + counts, counts)]
        kept = labels[nodes] != 0  # a result, or a place that nothing uses
        nodes, rows = nodes[kept], rows[kept]
        texts = np.hstack([texts[rows], labels[nodes, None].astype(np.uint8)])
        ends = np.flatnonzero(units[nodes] & 0x100)
        starts = units[nodes[ends] ^ _offsets(units[nodes[ends]])] & 0x7FFFFFFF
        written = texts[ends].tobytes().decode()
        at = 0
        for size, start in zip(np.count_nonzero(texts[ends] & 0xC0 != 0x80, axis=1).tolist(), starts.tolist()):
            rules[written[at : at + size]] = results[start : results.index(0, start)].decode()
            at += size
    return rules


def _offsets(units: np.ndarray) -> np.ndarray:
    wide = units.astype(np.int64)
    return (wide >> 10) << ((wide & 0x200) >> 6)


def _joins(result: str) -> bool:
    first = result[:1]
    return bool(first) and (
        unicodedata.category(first).startswith("M") or "\u1161" <= first <= "\u1175" or "\u11a8" <= first <= "\u11c2"
    )


def _longest_first(joined: dict[str, set[str]]) -> str:
    """A pattern of all rules for several characters; those that share their first characters are one alternative."""
    rests: defaultdict[frozenset[str], set[str]] = defaultdict(set)
    for rest, firsts in joined.items():
        rests[frozenset(firsts)].add(rest)
    alternatives: list[tuple[int, str]] = []
    for group, ends in rests.items():
        for length in {len(end) for end in ends}:
            alike = sorted(end for end in ends if len(end) == length)
            written = f"[{_ranges(alike)}]" if length == 1 else "(?:" + "|".join(map(_written, alike)) + ")"
            alternatives.append((length, f"[{_ranges(group)}]{written}"))
    return "|".join(pattern for _, pattern in sorted(alternatives, key=lambda pair: (-pair[0], pair[1])))


def _ranges(characters: Iterable[str]) -> str:
    """The inside of a character class."""
    codes = sorted(map(ord, characters))
    firsts = [code for before, code in zip([-2, *codes], codes) if code != before + 1]
    lasts = [code for code, behind in zip(codes, [*codes[1:], -2]) if behind != code + 1]
    return "".join(
        f"\\x{{{first:X}}}" if first == last else f"\\x{{{first:X}}}-\\x{{{last:X}}}"
        for first, last in zip(firsts, lasts, strict=True)
    )


def _written(text: str) -> str:
    return "".join(f"\\x{{{ord(character):X}}}" for character in text)
