r"""The prompts of ChatGLM-6B and ChatGLM2-6B: numbered rounds of question and answer in plain text.

    ChatGLM-6B     question [gMASK] <sop> ▁answer <eop>
                   [Round 0]\n问：q\n答：a\n[Round 1]\n问：q\n答： [gMASK] <sop> ▁answer <eop>
    ChatGLM2-6B    [gMASK] sop [Round 1]\n\n问：q\n\n答：a\n\n[Round 2]\n\n问：q\n\n答： ▁answer </s>

ChatGLM-6B's first question stands alone and its rounds count from 0; ChatGLM2's first question is round 1 already. The
whole prompt is one text. Earlier answers stand in it without the blank that a new one begins with (and, in ChatGLM-6B,
before the ``<sop>`` of which a row has one), so a conversation of several learnt replies makes as many examples.

Neither model was made for system messages or tools. A system message stands first, as a paragraph of its own before the
rounds; tools, calls and results are told in text (`tools.py`). Facts: THUDM's tokenization and modeling files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ..errors import RenderError
from ..messages import Message, write_calls
from .base import Tools
from .glm_base import GlmRenderer, require_question
from .glm_text import Piece
from .tools import tools_as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RoundsRenderer(GlmRenderer):
    """Writes rounds. `layout` is ``chatglm`` (ChatGLM-6B) or ``chatglm2``."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: Literal["chatglm", "chatglm2"],
        extra_stop_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            tokenizer: the model's fast tokenizer.
            layout: which of the two formats.
            extra_stop_ids: further tokens that end an answer.

        Raises:
            RenderError: the vocabulary lacks a control token of the format.
        """
        self._first = layout == "chatglm"
        end = "<eop>" if self._first else "</s>"
        super().__init__(tokenizer, name=f"weitiao: rounds of {layout}, 1", stops=[end], extra_stop_ids=extra_stop_ids)
        self._mask = self._text.control_id("[gMASK]")
        self._start = self._text.control_id("<sop>" if self._first else "sop")

    def _prompt(self, messages: Sequence[Message], tools: Tools) -> Sequence[Piece]:
        require_question(messages)
        text = self._write(tools_as_text(messages, tools))
        return [text, self._mask, self._start] if self._first else [self._mask, self._start, text]

    def _reply(self, reply: Message, tools: Tools, following: Message | None) -> Sequence[Piece]:
        text = write_calls(reply.text, reply.calls) if reply.calls else reply.text
        return [text, self._stop_ids[0]]

    def _num_opening(self, tools: Tools) -> int:
        """ChatGLM-6B's ``<sop>`` is itself a label of the trainers of its time, predicted from ``[gMASK]``."""
        return 1 if self._first else 0

    def _write(self, messages: Sequence[Message]) -> str:
        """The whole prompt as one text."""
        gap = "\n" if self._first else "\n\n"
        system = ""
        if messages[0].role == "system":
            system, messages = messages[0].text + gap, messages[1:]
        expected = ["user", "assistant"] * (len(messages) // 2) + ["user"]
        if [message.role for message in messages] != expected:
            roles = ", ".join(message.role for message in messages)
            raise RenderError(f"Rounds are a question and an answer in turn, not {roles}.")
        if self._first and len(messages) == 1:
            return system + messages[0].text
        answered = zip(messages[::2], messages[1::2], strict=False)
        rounds = [(question.text, f"{answer.text}{gap}") for question, answer in answered]
        rounds.append((messages[-1].text, ""))
        return system + "".join(
            f"[Round {number}]{gap}问：{question}{gap}答：{answer}"
            for number, (question, answer) in enumerate(rounds, start=0 if self._first else 1)
        )
