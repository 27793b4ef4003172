r"""How rows of a task are asked: the conversation with a hole where the row's text stands.

A tuned model that is asked otherwise than it learnt answers worse. So the wordings are kept with the task: a text alone
is enough to ask, and a conversation that is asked in one of them is known to be of that task, with its text found.

    >>> one = Phrasing(turns=(), before="类别？\n\n", after="")
    >>> one.ask("苹果很甜")[-1].text
    '类别？\n\n苹果很甜'
    >>> one.find_text(one.ask("苹果很甜"))
    '苹果很甜'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.records import Record
from ..messages import Message, Role

MAX_PHRASINGS = 50
FEW = 20
"""So many different wordings of a task are kept although none comes twice; of more, those that do: others hold what is
said in single rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrasing:
    """One wording."""

    turns: tuple[tuple[Role, str], ...]
    """The messages before the last one, such as the system's."""
    before: str
    """What stands in the last message before the text."""
    after: str
    """What stands in it behind the text."""

    def ask(self, text: str) -> tuple[Message, ...]:
        """The conversation that asks for `text`."""
        turns = [Message(role=role, text=said) for role, said in self.turns]
        return (*turns, Message(role="user", text=f"{self.before}{text}{self.after}"))

    def find_text(self, messages: Sequence[Message]) -> str | None:
        """The text in a conversation that is asked in this wording; None for any other conversation."""
        last = messages[-1]
        if last.role != "user" or _turns_of(messages) != self.turns:
            return None
        start, end = len(self.before), len(last.text) - len(self.after)
        if start > end or not (last.text.startswith(self.before) and last.text.endswith(self.after)):
            return None
        return last.text[start:end]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; `from_json` reads it back equal."""
        return {"turns": [list(turn) for turn in self.turns], "before": self.before, "after": self.after}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Phrasing:
        """The wording that `to_json` wrote."""
        turns = tuple((role, text) for role, text in data["turns"])
        return cls(turns=turns, before=data["before"], after=data["after"])


def phrasings_of(records: Sequence[Record]) -> tuple[Phrasing, ...]:
    """The wordings that `records` are asked in, most frequent first; of rows that stand alone with theirs, none.

    Rows with tools are left out, as are those whose text cannot be told from the question.
    """
    counted = Counter(
        Phrasing(turns=turns, before=record.prompt[: span[0]], after=record.prompt[span[1] :])
        for record in records
        if (span := record.text_span) is not None
        and record.messages[-1].role == "user"
        and not record.tools
        and (turns := _turns_of(record.messages)) is not None
    )
    repeated = [one for one, count in counted.most_common() if count > 1 or len(counted) <= FEW]
    return tuple(repeated[:MAX_PHRASINGS])


def _turns_of(messages: Sequence[Message]) -> tuple[tuple[Role, str], ...] | None:
    """What is said before the last message; None where tools are called."""
    if any(message.calls for message in messages):
        return None
    return tuple((message.role, message.text) for message in messages[:-1])
