"""A family's chat format in both directions: messages → tokens and loss mask, tokens → the answer's text.

Knows messages and a tokenizer; knows nothing of torch, tasks or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..messages import Message


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
    def render_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids up to the place where the model's answer begins. The last message is the user's."""

    @abstractmethod
    def render_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of `answer` and its end token."""

    @abstractmethod
    def read_answer(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, the end token left out."""

    @abstractmethod
    def show_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; tokens that only together make a character carry it on the first of them."""

    def render_example(self, messages: Sequence[Message], answer: str) -> Example:
        """The training example: the prompt as `render_prompt` writes it, then the answer, which alone is learnt."""
        prompt, reply = self.render_prompt(messages), self.render_answer(answer)
        return Example(token_ids=prompt + reply, loss_mask=(False,) * len(prompt) + (True,) * len(reply))
