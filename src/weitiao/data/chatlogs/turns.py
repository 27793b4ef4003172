"""Chat logs → conversations of turns: who is the assistant, where a conversation ends, what is merged, what is dropped.

    me 20:00 "早"   她 20:01 "在吗"   她 20:01 "吃了吗"   me 20:02 "吃了"   她 20:03 "哦"
    → user "在吗\\n吃了吗", assistant "吃了"       1 leading reply, 1 trailing question dropped, 1 merged

Every message is counted: used as the start of a turn, merged into one, or dropped for a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from .messages import ChatLog, ChatMessage
from .settings import ImportSettings, Side


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side says before the other does."""

    role: Side
    text: str
    num_messages: int
    start: datetime | None
    end: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns, a user's first and the assistant's last, in alternation."""

    contact: str
    """The name of the chat."""
    name: str
    """Who the assistant is."""
    remark: str
    """Whom it talks to."""
    session: int
    """Conversations with the same number follow each other without a silence between them."""
    turns: tuple[Turn, ...]

    @property
    def start(self) -> datetime | None:
        """When it begins."""
        return self.turns[0].start

    @property
    def end(self) -> datetime | None:
        """When it ends."""
        return self.turns[-1].end

    @property
    def num_replies(self) -> int:
        """How many turns are the assistant's."""
        return len(self.turns) // 2

    @property
    def num_messages(self) -> int:
        """How many messages its turns were made of."""
        return sum(turn.num_messages for turn in self.turns)


@dataclass(slots=True)
class Tally:
    """What became of messages."""

    used: int = 0
    """Each begins a turn."""
    merged: int = 0
    """Each was joined to the turn of the same speaker before it."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""

    @property
    def total(self) -> int:
        """All that were counted."""
        return self.used + self.merged + self.dropped.total()

    def drop(self, conversation: Conversation, reason: str) -> None:
        """Count a conversation that was used as dropped instead."""
        self.used -= len(conversation.turns)
        self.merged -= conversation.num_messages - len(conversation.turns)
        self.dropped[reason] += conversation.num_messages


def build_conversations(log: ChatLog, settings: ImportSettings, tally: Tally) -> list[Conversation]:
    """The conversations of a log in the order of time, all its messages counted in `tally`."""
    before = tally.total
    conversations: list[Conversation] = []
    refused = _refuse(log, settings)
    if refused:
        tally.dropped[refused] += len(log.messages)
    else:
        for session, messages in enumerate(_split_by_silence(log.messages, settings.gap_minutes)):
            conversations += _converse(log, session, messages, settings, tally)
    assert tally.total - before == len(log.messages), "a message was counted twice or not at all"
    return conversations


def _refuse(log: ChatLog, settings: ImportSettings) -> str:
    """Why nothing of the log can be used; "" when it can."""
    if settings.contacts and log.contact not in settings.contacts:
        return "chat not asked for"
    if log.is_group and settings.assistant == "contact" and settings.member is None:
        return "group chat, no member chosen"
    theirs = {message.sender for message in log.messages if not message.from_me}
    if log.is_group and settings.member is not None and settings.member not in theirs:
        return "group chat without the chosen member"
    return ""


def _split_by_silence(messages: Sequence[ChatMessage], gap_minutes: float) -> Iterator[list[ChatMessage]]:
    """Runs of messages without a silence; every message counts as noise, notices too."""
    gap = timedelta(minutes=gap_minutes)
    run: list[ChatMessage] = []
    for message in messages:
        if run:
            last = run[-1]
            silent = message.time is not None and last.time is not None and message.time - last.time > gap
            if silent or message.block != last.block:
                yield run
                run = []
        run.append(message)
    if run:
        yield run


def _side_of(message: ChatMessage, log: ChatLog, settings: ImportSettings) -> Side:
    if log.is_group and settings.member is not None:
        return "assistant" if not message.from_me and message.sender == settings.member else "user"
    return "assistant" if message.from_me == (settings.assistant == "me") else "user"


def _converse(
    log: ChatLog, session: int, messages: Sequence[ChatMessage], settings: ImportSettings, tally: Tally
) -> list[Conversation]:
    """The conversations of one session, mostly one."""
    said: list[tuple[Side, str, ChatMessage]] = []
    for message in messages:
        side = _side_of(message, log, settings)
        words = _words_of(message, side, settings)
        if words:
            said.append((side, words, message))
        else:
            empty = message.kind in ("text", "quote") and settings.rules[message.kind].words
            tally.dropped["empty" if empty else message.kind] += 1
    first = next((index for index, (side, _, _) in enumerate(said) if side == "user"), len(said))
    last = next((index for index in range(len(said), first, -1) if said[index - 1][0] == "assistant"), first)
    tally.dropped["leading reply"] += first
    tally.dropped["trailing question"] += len(said) - last
    turns = _merge(said[first:last], log, settings)
    name, remark = (log.me, log.contact) if settings.assistant == "me" else (log.contact, log.me)
    if log.is_group:
        name, remark = settings.member or log.me, log.contact
    made = []
    for part in _cut(turns, settings):
        conversation = Conversation(contact=log.contact, name=name, remark=remark, session=session, turns=tuple(part))
        tally.used += len(part)
        tally.merged += conversation.num_messages - len(part)
        if len(part) < settings.min_turns:
            tally.drop(conversation, "too short")
        else:
            made.append(conversation)
    return made


def _words_of(message: ChatMessage, side: Side, settings: ImportSettings) -> str:
    """What a message says in a turn; "" when it is to be dropped."""
    rule = settings.rules[message.kind]
    if rule.words and message.text.strip():
        return message.text
    if message.kind in ("text", "quote") and rule.words:
        return ""
    return rule.placeholder if side in rule.placeholder_on else ""


def _merge(said: Sequence[tuple[Side, str, ChatMessage]], log: ChatLog, settings: ImportSettings) -> list[Turn]:
    """Turns of what follows each other on one side; in a group the others' names stand before what they say."""
    turns: list[Turn] = []
    start = 0
    while start < len(said):
        side = said[start][0]
        end = start
        pieces = []
        speaker = ""
        while end < len(said) and said[end][0] == side:
            _, words, message = said[end]
            if log.is_group and settings.group_names and side == "user" and message.sender != speaker:
                speaker = message.sender or (log.me if message.from_me else "")
                words = f"{speaker}：{words}" if speaker else words
            pieces.append(words)
            end += 1
        turns.append(
            Turn(
                role=side,
                text=settings.joiner.join(pieces),
                num_messages=end - start,
                start=said[start][2].time,
                end=said[end - 1][2].time,
            )
        )
        start = end
    return turns


def _cut(turns: Sequence[Turn], settings: ImportSettings) -> Iterator[Sequence[Turn]]:
    """The turns in parts of at most `max_turns`, each beginning with the user's; the last is not left too short."""
    most = settings.max_turns or len(turns)
    start = 0
    while start < len(turns):
        end = start + most
        if len(turns) - end < settings.min_turns:
            end = len(turns)
        yield turns[start:end]
        start = end
