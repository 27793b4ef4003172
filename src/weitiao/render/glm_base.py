"""What the prompt formats of the ChatGLM family share: pieces of text and control tokens that become token ids.

A format says how prompts and replies are written as pieces (`rounds.py`, `roles.py`); here they are encoded, cut into
what is read and what is learnt, and read back. No text of a message can spell a control token (`glm_text.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import RenderError
from ..messages import Message
from .base import Conversation, Example, Masks, Renderer, Tools, Turns, join_turns
from .glm_text import GlmText, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GlmRenderer(Renderer):
    """A format of the family, made of pieces."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, name: str, stops: Sequence[str], extra_stop_ids: Sequence[int]
    ) -> None:
        """
        Args:
            tokenizer: the model's fast tokenizer.
            name: what the format is called in contracts; another number in it means another format.
            stops: control tokens that end an answer; the first is the one taught at the end of a conversation.
            extra_stop_ids: further ones, such as those of generation_config.json.

        Raises:
            RenderError: the vocabulary lacks a control token of the format.
        """
        self._text = GlmText(tokenizer)
        self._name = name
        self._stop_ids = tuple(dict.fromkeys([*map(self._text.control_id, stops), *extra_stop_ids]))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._text.tokenizer

    @property
    def template(self) -> str:
        """A name in the place of a chat template: the format stands in this library and not in the checkpoint."""
        return self._name

    def render_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        return self._text.encode_all([self._prompt(messages, tools)])[0]

    def render_answer(self, answer: str) -> tuple[int, ...]:
        return self._text.encode_all([[answer, self._stop_ids[0]]])[0]

    def render_reply(self, messages: Sequence[Message], reply: Message, tools: Tools = ()) -> tuple[int, ...]:
        return self._text.encode_all([self._reply(reply, tools, None)])[0]

    def read_answer(self, token_ids: Sequence[int], tools: Tools = ()) -> str:
        return self._text.decode(self._without_stop(token_ids))

    def show_tokens(self, token_ids: Sequence[int]) -> list[str]:
        return self._text.show_tokens(token_ids)

    def before_answer(self, tools: Tools = ()) -> str:
        return self._text.blank

    def encode_inside(self, text: str) -> tuple[int, ...]:
        return self._text.encode_inside(text)

    def read_inside(self, token_ids: Sequence[int]) -> str:
        return self._text.decode_inside(token_ids)

    def render_conversations(
        self, conversations: Sequence[Conversation], *, turns: Turns = "flagged", masks: Masks = "family"
    ) -> list[tuple[Example, ...]]:
        """As the base class says; the texts of all conversations are tokenised together."""
        written: list[Sequence[Piece]] = []
        counts: list[int] = []
        for talk in conversations:
            places = talk.learnt_places(turns)
            for place in places:
                following = talk.turn(place + 1) if place < len(talk.messages) else None
                written.append(self._prompt(talk.messages[:place], talk.tools))
                written.append(self._reply(talk.turn(place), talk.tools, following))
            counts.append(len(places))
        encoded = iter(self._text.encode_all(written))
        return [
            join_turns(
                [(next(encoded), next(encoded)) for _ in range(count)],
                num_opening=self._num_opening(talk.tools) if masks == "family" else 0,
            )
            for talk, count in zip(conversations, counts, strict=True)
        ]

    @abstractmethod
    def _prompt(self, messages: Sequence[Message], tools: Tools) -> Sequence[Piece]:
        """The pieces of `render_prompt`."""

    @abstractmethod
    def _reply(self, reply: Message, tools: Tools, following: Message | None) -> Sequence[Piece]:
        """The pieces of a reply and the token that ends it before the `following` turn; None: before nothing."""

    @abstractmethod
    def _num_opening(self, tools: Tools) -> int:
        """How many tokens at a prompt's end the family's own trainer learns together with the reply."""

    def _without_stop(self, token_ids: Sequence[int]) -> list[int]:
        kept = list(token_ids)
        while kept and kept[-1] in self._stop_ids:
            kept.pop()
        return kept


def require_question(messages: Sequence[Message]) -> None:
    """Return when a reply may follow `messages`. Raises RenderError."""
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RenderError("A prompt must end with a message of the user, or with what a tool gave back.")
