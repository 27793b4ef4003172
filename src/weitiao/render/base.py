"""A family's chat format in both directions: messages → tokens and loss mask, tokens → the answer's text.

Knows messages and a tokenizer; knows nothing of torch, tasks or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..messages import Message

Tools = Sequence[Mapping[str, Any]]
"""The tools on offer in a conversation, each ``{"name", "description", "parameters"}``."""

Turns = Literal["flagged", "all", "last"]
"""Which replies of a conversation are learnt: those not flagged otherwise, every one, or the last."""

Masks = Literal["family", "answer"]
"""Which tokens of a reply are learnt: those that the model family's own trainer learns, or the answer and its end token
alone. They differ where a prompt ends in tokens that the family's models otherwise write themselves: `join_turns`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation as tokens.

    >>> Example(token_ids=(2, 17, 9, 1), loss_mask=(False, False, True, True)).num_supervised
    2
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the token is an answer to be learnt (the answer and its end token; what opens it, with some masks)."""

    @property
    def num_supervised(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(self.loss_mask)

    @property
    def num_answer(self) -> int:
        """Number of learnt tokens at the end: the last reply and its end token, with what is learnt before them."""
        return len(self) - 1 - bytes(self.loss_mask).rfind(0)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What training examples are rendered from."""

    messages: Sequence[Message]
    """The turns before the last reply."""
    reply: Message
    """The last reply, always learnt."""
    tools: Tools = ()
    """The tools on offer."""

    def learnt_places(self, turns: Turns) -> list[int]:
        """Which of the turns, the last reply included, are learnt."""
        places = [
            place
            for place, turn in enumerate(self.messages)
            if turn.role == "assistant" and (turns == "all" or (turns == "flagged" and turn.learn))
        ]
        return [*places, len(self.messages)]

    def turn(self, place: int) -> Message:
        """The turn at `place`, counted from 0."""
        return self.reply if place == len(self.messages) else self.messages[place]


class Renderer(ABC):
    """Writes conversations in one chat format and reads answers back."""

    @property
    @abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; the first one is the end token that training teaches."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer of transformers beneath, whose vocabulary answers are written in."""

    @property
    @abstractmethod
    def template(self) -> str:
        """The chat template, byte for byte; empty when there is none."""

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """Token ids up to the place where the model's answer begins. The last message is the user's or a tool's.

        Where a format opens a plain reply otherwise than a call and tools are on offer, that place is before the
        opening: which of the two it will be is the model's to write.
        """

    @abstractmethod
    def render_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of `answer` and its end token."""

    @abstractmethod
    def render_reply(self, messages: Sequence[Message], reply: Message, tools: Tools = ()) -> tuple[int, ...]:
        """Token ids of the assistant's `reply` to `messages`, tool calls included, and its end token."""

    @abstractmethod
    def read_answer(self, token_ids: Sequence[int], tools: Tools = ()) -> str:
        """The text of generated tokens, the end token left out; `tools` are those that were on offer.

        With tools, a reply in a format that has calls of its own comes back as `messages.write_calls` writes it. A call
        that cannot be read comes back as the text it is.
        """

    @abstractmethod
    def show_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; tokens that only together make a character carry it on the first of them."""

    def before_answer(self, tools: Tools = ()) -> str:
        """What the tokens of every plain answer behind `render_prompt` spell before its text; nothing, as a rule.

        Tokenizers that set a blank before every text write ``▁你 好`` for 你好; the blank is no part of the answer.
        """
        return ""

    def encode_inside(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` as they stand within an answer, not at its beginning and without an end token."""
        return self.render_answer(text)[: -len(self.render_answer(""))]

    def read_inside(self, token_ids: Sequence[int]) -> str:
        """The text of tokens as they stand within an answer: what `encode_inside` encoded."""
        return self.read_answer(token_ids)

    def render_example(self, messages: Sequence[Message], answer: str) -> Example:
        """The training example: the prompt as `render_prompt` writes it, then the answer, which alone is learnt."""
        return _join(self.render_prompt(messages), self.render_answer(answer))

    def render_conversation(
        self,
        messages: Sequence[Message],
        reply: Message,
        *,
        tools: Tools = (),
        turns: Turns = "flagged",
        masks: Masks = "family",
    ) -> tuple[Example, ...]:
        """The training examples of a conversation in which several replies are learnt; one, as a rule.

        Every learnt reply follows exactly the tokens that `render_prompt` writes when it is asked for. A conversation
        makes several examples only where the chat format writes a reply differently once it is history (formats that
        drop the thinking of earlier turns, tokenizers that merge a reply's first characters with what stands before).

        Args:
            messages: the turns before the last reply.
            reply: the last reply, always learnt.
            tools: the tools on offer.
            turns: which of the earlier replies are learnt.
            masks: which of a learnt reply's tokens are.
        """
        conversation = Conversation(messages=messages, reply=reply, tools=tools)
        return self.render_conversations([conversation], turns=turns, masks=masks)[0]

    def render_conversations(
        self, conversations: Sequence[Conversation], *, turns: Turns = "flagged", masks: Masks = "family"
    ) -> list[tuple[Example, ...]]:
        """For each conversation what `render_conversation` gives; a renderer may do many at once faster.

        Here, where no prompt ends in what a model otherwise writes, all `masks` are alike.
        """
        rendered = []
        for talk in conversations:
            asked = [
                (
                    self.render_prompt(talk.messages[:place], talk.tools),
                    self.render_reply(talk.messages[:place], talk.turn(place), talk.tools),
                )
                for place in talk.learnt_places(turns)
            ]
            rendered.append(join_turns(asked))
        return rendered


def join_turns(
    turns: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], *, num_opening: int = 0
) -> tuple[Example, ...]:
    """The examples of one conversation from its learnt turns, each the tokens of (prompt, reply).

    ((1, 5), (6, 2)), ((1, 5, 6, 2, 7), (8, 2))   →  one example  1 5 [6 2] 7 [8 2], what is learnt in brackets
    ((1, 5), (6, 2)), ((1, 5, 9, 2, 7), (8, 2))   →  two: the second prompt does not go on from the first reply

    Of each prompt the last `num_opening` tokens are learnt as well.
    """
    examples: list[Example] = []
    growing: Example | None = None
    for prompt, answer in turns:
        if growing is not None and prompt[: len(growing)] == growing.token_ids:
            mask = growing.loss_mask
        else:
            examples += [growing] if growing is not None else []
            mask = ()
        num_read = len(prompt) - len(mask) - num_opening
        growing = Example(
            token_ids=prompt + answer, loss_mask=mask + (False,) * num_read + (True,) * (num_opening + len(answer))
        )
    return (*examples, *([growing] if growing is not None else []))


def _join(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Example:
    return Example(token_ids=prompt + answer, loss_mask=(False,) * len(prompt) + (True,) * len(answer))
