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


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation as tokens.

    >>> Example(token_ids=(2, 17, 9, 1), loss_mask=(False, False, True, True)).num_supervised
    2
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True where the token is an answer to be learnt (the answer and its end token)."""

    @property
    def num_supervised(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(self.loss_mask)

    @property
    def num_answer(self) -> int:
        """Number of learnt tokens at the end: the last reply and its end token."""
        return next((length for length, learnt in enumerate(reversed(self.loss_mask)) if not learnt), len(self))

    def __len__(self) -> int:
        return len(self.token_ids)


class Renderer(ABC):
    """Writes conversations in one chat format and reads answers back."""

    @property
    @abstractmethod
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; the first one is the end token that training teaches."""

    @property
    @abstractmethod
    def template(self) -> str:
        """The chat template, byte for byte; empty when there is none."""

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """Token ids up to the place where the model's answer begins. The last message is the user's or a tool's."""

    @abstractmethod
    def render_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of `answer` and its end token."""

    @abstractmethod
    def render_reply(self, messages: Sequence[Message], reply: Message, tools: Tools = ()) -> tuple[int, ...]:
        """Token ids of the assistant's `reply` to `messages`, tool calls included, and its end token."""

    @abstractmethod
    def read_answer(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, the end token left out."""

    @abstractmethod
    def show_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; tokens that only together make a character carry it on the first of them."""

    def render_example(self, messages: Sequence[Message], answer: str) -> Example:
        """The training example: the prompt as `render_prompt` writes it, then the answer, which alone is learnt."""
        return _join(self.render_prompt(messages), self.render_answer(answer))

    def render_conversation(
        self, messages: Sequence[Message], reply: Message, *, tools: Tools = (), turns: Turns = "flagged"
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
        """
        examples: list[Example] = []
        growing: Example | None = None
        for place, turn in enumerate((*messages, reply)):
            last = place == len(messages)
            if not (last or (turn.role == "assistant" and (turns == "all" or (turns == "flagged" and turn.learn)))):
                continue
            before = messages[:place]
            prompt, answer = self.render_prompt(before, tools), self.render_reply(before, turn, tools)
            if growing is not None and prompt[: len(growing)] == growing.token_ids:
                num_new = len(prompt) - len(growing)
                growing = Example(
                    token_ids=prompt + answer,
                    loss_mask=growing.loss_mask + (False,) * num_new + (True,) * len(answer),
                )
            else:
                examples += [growing] if growing is not None else []
                growing = _join(prompt, answer)
        return (*examples, *([growing] if growing is not None else []))


def _join(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Example:
    return Example(token_ids=prompt + answer, loss_mask=(False,) * len(prompt) + (True,) * len(answer))
