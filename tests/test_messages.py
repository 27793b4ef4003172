"""Messages and the order of turns."""

from __future__ import annotations

import dataclasses
import re
from itertools import product

import pytest

from weitiao.messages import Message, Role, check_order

LETTERS: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant"}


def conversation(letters: str) -> list[Message]:
    return [Message(role=LETTERS[letter], text=f"turn {index}") for index, letter in enumerate(letters)]


@pytest.mark.parametrize("letters", ["u", "su", "ua", "sua", "uau", "suauaua"])
def test_alternating_turns_with_an_optional_system_message_are_in_order(letters: str) -> None:
    check_order(conversation(letters))


def test_exactly_the_alternating_conversations_are_accepted() -> None:
    alternating = {start + "ua" * 3 for start in ("", "s")}
    for length in range(6):
        for letters in map("".join, product("sua", repeat=length)):
            in_order = any(full.startswith(letters) for full in alternating) and letters.strip("s") != ""
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
        ("uu", "messages[1] is the user's, but after the user's messages[0] comes the assistant's."),
        ("suaa", "messages[3] is the assistant's, but after the assistant's messages[2] comes the user's."),
        ("uas", "messages[2] is the system's, but a system message may only stand first."),
        ("ssu", "messages[1] is the system's, but a system message may only stand first."),
    ],
)
def test_the_first_message_out_of_order_is_named_with_the_reason(letters: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_order(conversation(letters))


def test_a_message_cannot_be_changed() -> None:
    message = Message(role="user", text="hi")
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.text = "bye"  # type: ignore[misc]
