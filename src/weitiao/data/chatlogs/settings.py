"""How chats become conversations: who is the assistant, what is kept, where a conversation ends, what is held out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta, timezone, tzinfo
from typing import Literal

from weitiao.data.privacy import USUAL_KINDS, Kind
from weitiao.data.redaction import CHINESE, STYLES, RedactionStyle
from weitiao.errors import DataError

from .messages import MESSAGE_KINDS, MessageKind

Side = Literal["user", "assistant"]
Who = Literal["me", "contact"]
ENCODINGS = ("utf-8-sig", "gb18030")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What becomes of one kind of message: its words where it has some, else the placeholder, else it is dropped."""

    words: bool = False
    """Whether its own words are used."""
    placeholder: str = ""
    """What stands for it otherwise."""
    placeholder_on: frozenset[Side] = frozenset({"user"})
    """In whose turns the placeholder is written. By default not in the assistant's: it would learn to write it."""


_SAID = Rule(words=True)
_NOTHING = Rule()
DEFAULT_RULES: Mapping[MessageKind, Rule] = {
    "text": _SAID,
    "quote": _SAID,
    "voice": Rule(words=True, placeholder="[语音]"),
    "image": Rule(placeholder="[图片]"),
    "video": Rule(placeholder="[视频]"),
    "sticker": Rule(placeholder="[表情]"),
    "file": Rule(placeholder="[文件]"),
    "link": Rule(placeholder="[链接]"),
    "music": Rule(placeholder="[音乐]"),
    "location": Rule(placeholder="[位置]"),
    "card": Rule(placeholder="[名片]"),
    "transfer": Rule(placeholder="[转账]"),
    "red_packet": Rule(placeholder="[红包]"),
    "mini_program": Rule(placeholder="[小程序]"),
    "forwarded": Rule(placeholder="[聊天记录]"),
    "note": Rule(placeholder="[笔记]"),
    "call": _NOTHING,
    "pat": _NOTHING,
    "recall": _NOTHING,
    "system": _NOTHING,
    "unknown": _NOTHING,
}
"""What the other person sent stays visible to the assistant, whose reply may be about it; notices are dropped."""

DEFAULT_SYSTEM = (
    "你是{{name}}，正在微信上和{{remark}}聊天。请照{{name}}平时的语气和习惯回复，像真人聊天那样简短自然，"
    "不要提到自己是人工智能。"
)
_PLACEHOLDER = re.compile(r"\{\{\s*(\w*)\s*\}\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSettings:
    """The options of an import; the defaults are meant for a persona of the export's owner.

    Raises:
        DataError: when made with a value that makes no sense; it names every one.
    """

    assistant: Who = "me"
    """Whose messages are the replies."""
    member: str | None = None
    """The member of a group who is the assistant there; None: the owner of the export."""
    contacts: Collection[str] = ()
    """Take these chats only; empty: all."""
    me: Sequence[str] = ()
    """Names of the export's owner; the first stands for {{name}}."""
    members: Collection[str] = ()
    """Names of all who speak, for exports from which they cannot be told."""
    gap_minutes: float = 60.0
    """A silence longer than this ends a conversation."""
    joiner: str = "\n"
    """Between messages that become one turn."""
    min_turns: int = 2
    max_turns: int = 40
    """A longer conversation goes on in another one; 0: never."""
    group_names: bool = True
    """Whether the others' names stand before what they say in a group."""
    system: str = DEFAULT_SYSTEM
    """The system prompt; {{name}} is the assistant, {{remark}} the other one; "" for none."""
    rules: Mapping[MessageKind, Rule] = field(default_factory=lambda: DEFAULT_RULES)
    held_out: float = 0.1
    """Share of the replies that is set apart, the latest of each chat."""
    redaction: RedactionStyle | None = CHINESE
    """How personal data is replaced; None: it is left in."""
    redact_kinds: Collection[Kind] = USUAL_KINDS
    encoding: str = "utf-8-sig"
    utc_offset: float = 8.0
    """Hours that the clock of the export was ahead of UTC; Beijing's by default."""
    samples_assistant: Who = "me"
    """Whom the ready-made conversations of JSON exports have as their assistant."""

    def __post_init__(self) -> None:
        wrong = []
        if self.assistant not in ("me", "contact"):
            wrong.append(f"assistant is {self.assistant!r}; choose me or contact.")
        if self.samples_assistant not in ("me", "contact"):
            wrong.append(f"samples_assistant is {self.samples_assistant!r}; choose me or contact.")
        if not self.gap_minutes > 0:
            wrong.append(f"the gap is {self.gap_minutes} minutes; it must be more than 0, such as 60.")
        if not 0 <= self.held_out < 1:
            wrong.append(f"held_out is {self.held_out}; it is a share, from 0 to less than 1, such as 0.1.")
        if self.min_turns < 2:
            wrong.append(f"min_turns is {self.min_turns}; the shortest conversation has 2, a question and a reply.")
        if self.max_turns and (self.max_turns < self.min_turns or self.max_turns % 2):
            wrong.append(
                f"max_turns is {self.max_turns}; it must be even and no less than min_turns, or 0 for no limit."
            )
        if self.encoding not in ENCODINGS:
            wrong.append(f"the encoding is {self.encoding!r}; choose {' or '.join(ENCODINGS)}.")
        if not -14 <= self.utc_offset <= 14:
            wrong.append(f"the UTC offset is {self.utc_offset} hours; it lies between -14 and 14, Beijing's is 8.")
        wrong += [
            f"the system prompt has {found[0]}; only {{{{name}}}} and {{{{remark}}}} are known."
            for found in _PLACEHOLDER.finditer(self.system)
            if found[1] not in ("name", "remark")
        ]
        if wrong:
            raise DataError("These settings cannot be used: " + " ".join(wrong))

    @property
    def zone(self) -> tzinfo:
        """The time zone of the export's clock."""
        return timezone(timedelta(hours=self.utc_offset))

    def write_system(self, *, name: str, remark: str) -> str:
        """The system prompt with its placeholders filled; a name that holds "{{remark}}" is written as it is."""
        return _PLACEHOLDER.sub(lambda found: name if found[1] == "name" else remark, self.system)

    def mentions(self, placeholder: str) -> bool:
        """Whether the system prompt has ``{{placeholder}}``."""
        return any(found[1] == placeholder for found in _PLACEHOLDER.finditer(self.system))


def change_rules(mapped: Sequence[str], dropped: Sequence[str]) -> Mapping[MessageKind, Rule]:
    """The default rules with changes: ``sticker=[表情]`` writes that in everybody's turns, a dropped kind never shows.

    Raises:
        DataError: for a kind that does not exist or a mapping without ``=``, all of them named.
    """
    rules = dict(DEFAULT_RULES)
    wrong = []
    for change in mapped:
        kind, equals, text = change.partition("=")
        if not equals or not text.strip() or kind not in rules:
            wrong.append(f"{change!r} does not map a kind to a text; write it like sticker=[表情].")
            continue
        known = next(name for name in MESSAGE_KINDS if name == kind)
        rules[known] = replace(rules[known], placeholder=text, placeholder_on=frozenset({"user", "assistant"}))
    for kind in dropped:
        if kind not in rules:
            wrong.append(f"{kind!r} is no kind of message.")
            continue
        rules[next(name for name in MESSAGE_KINDS if name == kind)] = _NOTHING
    if wrong:
        raise DataError(" ".join([*wrong, f"The kinds are: {', '.join(MESSAGE_KINDS)}."]))
    return rules


def make_settings(
    *,
    assistant: str,
    me: Sequence[str],
    contacts: Sequence[str],
    member: str | None,
    members: Sequence[str],
    group_names: bool,
    gap_minutes: float,
    joiner: str,
    min_turns: int,
    max_turns: int,
    system: str | None,
    mapped: Sequence[str],
    dropped: Sequence[str],
    held_out: float,
    redact: str,
    encoding: str,
    utc_offset: float,
    samples_assistant: str,
) -> ImportSettings:
    """The settings that the words of a command line mean.

    Raises:
        DataError: for a word or value that makes no sense.
    """
    if redact not in (*STYLES, "off"):
        raise DataError(f"redact is {redact!r}; choose {', '.join(STYLES)} or off.")
    return ImportSettings(
        assistant=_who("assistant", assistant),
        member=member,
        contacts=tuple(contacts),
        me=tuple(me),
        members=tuple(members),
        gap_minutes=gap_minutes,
        joiner=joiner,
        min_turns=min_turns,
        max_turns=max_turns,
        group_names=group_names,
        system=DEFAULT_SYSTEM if system is None else system,
        rules=change_rules(mapped, dropped),
        held_out=held_out,
        redaction=STYLES.get(redact),
        encoding=encoding,
        utc_offset=utc_offset,
        samples_assistant=_who("samples_assistant", samples_assistant),
    )


def _who(option: str, word: str) -> Who:
    if word == "me":
        return "me"
    if word == "contact":
        return "contact"
    raise DataError(f"{option} is {word!r}; choose me or contact.")
