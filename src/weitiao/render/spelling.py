"""Which characters of labelled answers a tokenizer cannot write, and what it writes in their place.

ChatGLM-6B's vocabulary turns full-width punctuation into ASCII (``，`` into ``,``), other tokenizers compose accents.
An answer is then learnt, and given, in the tokenizer's spelling, and no longer equals its label.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.records import Record
from ..tasks.base import Task
from .base import Renderer
from .fitting import conversation_of

MOST_ROWS = 5_000
"""Rows that are looked at, evenly spread where there are more."""

_MOST_SHOWN = 8
_AROUND = "a"


def respelled_characters(renderer: Renderer, characters: Sequence[str]) -> dict[str, str]:
    """The characters that come back as something else when an answer with them is read back, and as what."""
    found = {}
    for character in characters:
        text = f"{_AROUND}{character}{_AROUND}"
        read = renderer.read_answer(renderer.render_answer(text))
        if read != text:
            found[character] = read.removeprefix(_AROUND).removesuffix(_AROUND)
    return found


def spelling_note(records: Sequence[Record], tasks: Sequence[Task], renderer: Renderer) -> str:
    """A sentence on the characters of the answers that this model's tokenizer writes otherwise; empty without any.

    Args:
        records: labelled rows.
        tasks: for each of them, its task.
        renderer: the model's chat format.
    """
    step = -(-len(records) // MOST_ROWS) or 1
    answers = [
        (records[place].source, set(conversation_of(records[place], tasks[place]).reply.text))
        for place in range(0, len(records), step)
    ]
    seen = set().union(*(characters for _, characters in answers))
    changed = respelled_characters(renderer, sorted(seen - {chr(code) for code in range(0xD800, 0xE000)}))
    if not changed:
        return ""
    sources = [source for source, characters in answers if not characters.isdisjoint(changed)]
    shown = ", ".join(f"{one!r} as {other!r}" for one, other in list(changed.items())[:_MOST_SHOWN])
    more = f" and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
    of = f"of {len(answers)} looked at " if step > 1 else ""
    return (
        f"note: this model's tokenizer writes {shown}{more}. {len(sources)} answers {of}are learnt and given in its "
        f"spelling, and so differ from their labels: {', '.join(sources[:5])}{' …' if len(sources) > 5 else ''}"
    )
