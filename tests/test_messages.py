"""Messages, tool calls and the order of turns."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import product

import pytest

from weitiao.messages import Message, ToolCall, check_order, write_calls

CALL = ToolCall(name="weather", arguments={"city": "北京"})
LETTERS: dict[str, Message] = {
    "s": Message(role="system", text="S"),
    "u": Message(role="user", text="U"),
    "a": Message(role="assistant", text="A"),
    "c": Message(role="assistant", text="", calls=(CALL,)),
    "t": Message(role="tool", text="22"),
}


def conversation(letters: str) -> list[Message]:
    return [LETTERS[letter] for letter in letters]


@pytest.mark.parametrize(
    "letters", ["u", "su", "ua", "sua", "uau", "suauaua", "uc", "uct", "ucta", "ucttaua", "uctcta", "uata"]
)
def test_turns_in_order_are_accepted(letters: str) -> None:
    check_order(conversation(letters))


def may_follow(before: str, letter: str) -> bool:
    """The grammar, written out a second time: which letter may stand after which."""
    return letter in {"": "su", "s": "u", "u": "ac", "a": "ut", "c": "t", "t": "tac"}[before]


def test_exactly_the_conversations_of_the_grammar_are_accepted() -> None:
    for length in range(6):
        for letters in map("".join, product("suact", repeat=length)):
            steps = zip(["", *letters], letters)
            in_order = letters not in ("", "s") and all(may_follow(*step) for step in steps)
            try:
                check_order(conversation(letters))
            except ValueError:
                assert not in_order, letters
            else:
                assert in_order, letters


@pytest.mark.parametrize(
    ("letters", "sentence"),
    [
        ("", "the conversation has no messages; it needs at least one of the user's."),
        ("s", "the conversation has only a system message; it needs at least one of the user's."),
        ("au", "messages[0] is the assistant's, but a conversation starts with the user's."),
        ("sa", "messages[1] is the assistant's, but a conversation starts with the user's."),
        ("t", "messages[0] is a tool's, but a conversation starts with the user's."),
        ("uu", "messages[1] is the user's, but after the user's messages[0] comes the assistant's."),
        ("ut", "messages[1] is a tool's, but after the user's messages[0] comes the assistant's."),
        ("suaa", "messages[3] is the assistant's, but after the assistant's messages[2] comes the user's or a tool's."),
        (
            "uca",
            "messages[2] is the assistant's, but after the assistant's messages[1], which calls a tool, "
            "comes a tool's.",
        ),
        ("uctu", "messages[3] is the user's, but after a tool's messages[2] comes a tool's or the assistant's."),
        ("uas", "messages[2] is the system's, but a system message may only stand first."),
        ("ssu", "messages[1] is the system's, but a system message may only stand first."),
    ],
)  # fmt: skip
def test_the_first_message_out_of_order_is_named_with_the_reason(letters: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_order(conversation(letters))


def test_calls_are_written_in_tags_after_what_is_said() -> None:
    assert write_calls("好的", ()) == "好的"
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert write_calls("", (CALL,)) == one
    assert write_calls("好的", (CALL, CALL)) == f"好的\n{one}\n{one}"
    assert json.loads(one.splitlines()[1]) == {"name": CALL.name, "arguments": CALL.arguments}


def test_a_message_cannot_be_changed() -> None:
    message = Message(role="user", text="hi")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.text = "bye"  # type: ignore[misc]
