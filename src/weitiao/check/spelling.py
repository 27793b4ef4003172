"""Characters of answers that the model's tokenizer writes otherwise: full-width punctuation by ChatGLM-6B's, for one.

Such answers are learnt, and later given, in the tokenizer's spelling. Training says the same of the rows it learns
(`render/spelling.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..data.findings import Finding, count_of
from .token_counts import TokenCounter

_AROUND = "a"
_MOST_SHOWN = 8


class SpellingWatch:
    """Looks at every character of the answers once."""

    def __init__(self, counter: TokenCounter | None) -> None:
        """Watches nothing without a tokenizer, or with one that reads no text back as it was."""
        plain = _AROUND * 2
        self._counter = counter if counter is not None and _read_back(counter, plain) == plain else None
        self._seen: set[str] = set()
        self._changed: dict[str, str] = {}
        self._sources: list[str] = []

    def add(self, source: str, answer: str) -> None:
        """Look at the answer of the row `source`."""
        if self._counter is None:
            return
        characters = set(answer)
        new = characters - self._seen
        self._seen |= new
        for character in new:
            if "\ud800" <= character <= "\udfff":  # half a character, which is found elsewhere
                continue
            text = f"{_AROUND}{character}{_AROUND}"
            read = _read_back(self._counter, text)
            if read != text:
                self._changed[character] = read.removeprefix(_AROUND).removesuffix(_AROUND)
        if not characters.isdisjoint(self._changed):
            self._sources.append(source)

    def finish(self) -> Iterator[Finding]:
        """What was found, in one finding."""
        if self._sources:
            pairs = sorted(self._changed.items())
            shown = ", ".join(f"{one!r} as {other!r}" for one, other in pairs[:_MOST_SHOWN])
            more = f" and {len(pairs) - _MOST_SHOWN} more" if len(pairs) > _MOST_SHOWN else ""
            yield Finding(
                code="tokenizer-spelling",
                grade="note",
                title=f"{count_of(len(self._sources), 'answer')} that the model's tokenizer spells otherwise",
                message=f"It writes {shown}{more}. The answers are learnt and given so, and differ from their labels.",
                sources=tuple(self._sources),
                count=len(self._sources),
                fix="Write the labels in the tokenizer's spelling, or nothing, if the difference does not matter.",
            )


def _read_back(counter: TokenCounter, text: str) -> str:
    ids = counter.tokenizer.encode(text, add_special_tokens=False).ids
    return str(counter.tokenizer.decode(ids, skip_special_tokens=False))
