"""The chat format of any tokenizer: its own chat template, or plain continuation for base models without one.

The text of a message can never become a control token: a user who writes ``<|im_end|>`` gets those ten characters,
not the end of the turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import RenderError
from ..messages import Message
from .base import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_MARK = "\ue000weitiao-answer\ue001"
_ESCAPE = "\ue002{}\ue003"
_ESCAPED = re.compile("\ue002(\\d+)\ue003")
_ANCHOR = "\n"


class TemplateRenderer(Renderer):
    """Renders through ``tokenizer.apply_chat_template``; without a template the prompt is the messages' own text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, extra_stop_ids: Sequence[int] = ()) -> None:
        """
        Args:
            tokenizer: any fast tokenizer of transformers.
            extra_stop_ids: further tokens that end an answer, such as those of generation_config.json.

        Raises:
            RenderError: the tokenizer has no end token, or cannot encode a text in parts.
        """
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        if isinstance(tokenizer.chat_template, dict):
            self._template = tokenizer.chat_template["default"]
        self._control = self._control_strings()
        self._control_pattern = re.compile(
            "|".join(re.escape(text) for text in sorted(self._control, key=len, reverse=True)) or r"(?!)"
        )
        self._anchor_ids = self._find_anchor()
        self._end_ids = self._find_end()
        others = [i for i in (tokenizer.eos_token_id, *extra_stop_ids) if isinstance(i, int)]
        self._stop_ids = tuple(dict.fromkeys([self._end_ids[-1], *others]))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def template(self) -> str:
        return self._template

    def render_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if not messages or messages[-1].role != "user":
            raise RenderError("A prompt must end with a message of the user.")
        if self._template:
            return tuple(self._encode_with_control(self._apply_template(messages, prompt=True), messages))
        return (*self._opening_ids(), *self._encode(self._plain_text(messages)))

    def render_answer(self, answer: str) -> tuple[int, ...]:
        return (*self._encode(answer), *self._end_ids)

    def read_answer(self, token_ids: Sequence[int]) -> str:
        kept = list(token_ids)
        while kept and kept[-1] in self._stop_ids:
            kept.pop()
        return self._decode([*self._anchor_ids, *kept]).removeprefix(_ANCHOR if self._anchor_ids else "")

    def show_tokens(self, token_ids: Sequence[int]) -> list[str]:
        shown: list[str] = []
        start = 0
        for end in range(1, len(token_ids) + 1):
            text = self._decode(token_ids[start:end])
            if "\ufffd" in text and end - start < 8:
                shown.append("")
                continue
            shown.append("")
            shown[start] = text
            start = end
        if start < len(token_ids):
            shown[start] = self._decode(token_ids[start:])
        return shown

    # ---- text -------------------------------------------------------------------------------------------------

    def _plain_text(self, messages: Sequence[Message]) -> str:
        """The prompt of a base model: one message is its own text; a conversation is told turn by turn."""
        if len(messages) == 1:
            return messages[0].text
        names = {"system": "System", "user": "User", "assistant": "Assistant"}
        turns = [f"{names[message.role]}: {message.text}" for message in messages]
        return "\n\n".join([*turns, "Assistant: "])

    def _apply_template(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The templated text, control strings inside message texts replaced by numbered marks."""
        escaped = [{"role": m.role, "content": self._escape(m.text)} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                escaped, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
            )
        except Exception as error:  # a template raises jinja's errors for roles or orders it does not know
            roles = ", ".join(message.role for message in messages)
            raise RenderError(f"The model's chat template refuses a conversation of {roles}: {error}.") from None
        return str(text)

    def _escape(self, text: str) -> str:
        if "\ue002" in text or "\ue003" in text:
            raise RenderError("A message holds the private characters U+E002 or U+E003, which mark control text here.")
        return self._control_pattern.sub(lambda match: _ESCAPE.format(self._control.index(match.group())), text)

    def _control_strings(self) -> list[str]:
        """Every string the tokenizer would turn into a control token."""
        return [
            token.content
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special or (token.content.strip() and token.content in self._template)
        ]

    # ---- tokens -----------------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, text: str) -> list[int]:
        """Ids of plain text: no part of it becomes a control token."""
        return self._encode_with_control(self._control_pattern.sub(
            lambda match: _ESCAPE.format(self._control.index(match.group())), text), ())  # fmt: skip

    def _encode_with_control(self, text: str, messages: Sequence[Message]) -> list[int]:
        """Ids of `text` whose control strings are meant, and whose numbered marks are plain text.

        The text is cut only where a mark stands, so everything else is tokenised exactly as the tokenizer would.
        """
        ids: list[int] = []
        for place, piece in enumerate(_ESCAPED.split(text)):
            if place % 2:  # a mark: its first character apart from the rest, so that no control string forms
                control = self._control[int(piece)]
                ids += self._piece(control[:1]) + self._piece(control[1:])
            elif piece:
                ids += self._piece(piece)
        return ids

    def _piece(self, text: str) -> list[int]:
        """Ids of one piece of text. Behind the anchor, tokenizers that put a space before a text do not."""
        if not text or not self._anchor_ids:
            return self._tokenize(text) if text else []
        return self._tokenize(_ANCHOR + text)[len(self._anchor_ids) :]

    def _find_anchor(self) -> list[int]:
        """No anchor where the tokens of parts simply follow each other; the newline's ids where they must not."""
        probe = ("答案：a", '```json\n["b"]')
        if self._decode(self._tokenize(probe[0]) + self._tokenize(probe[1])) == "".join(probe):
            return []
        anchor = self._tokenize(_ANCHOR)
        ids = self._tokenize(_ANCHOR + probe[1])
        if ids[: len(anchor)] != anchor or self._decode(self._tokenize(probe[0]) + ids[len(anchor) :]) != "".join(probe):
            raise RenderError(
                f"The tokenizer {type(self._tokenizer).__name__} cannot encode a prompt and an answer in parts, "
                f"so a prompt would not be the beginning of its training example."
            )
        return anchor

    def _opening_ids(self) -> list[int]:
        """What the tokenizer puts before every text, such as ``<bos>``; an end token it adds is left out."""
        ids = self._tokenizer("", add_special_tokens=True)["input_ids"]
        return [i for i in ids if i != self._tokenizer.eos_token_id or i == self._tokenizer.bos_token_id]

    def _find_end(self) -> list[int]:
        """The tokens that end an answer: what the template writes after it up to its first control token, else eos."""
        if self._template:
            text = self._apply_template(
                [Message(role="user", text="?"), Message(role="assistant", text=_ANSWER_MARK)], prompt=False
            )
            after = self._tokenize(text.partition(_ANSWER_MARK)[2])
            special = set(self._tokenizer.all_special_ids)
            special |= {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
            first = next((place for place, i in enumerate(after) if i in special), None)
            if first is not None:
                return after[: first + 1]
        if not isinstance(self._tokenizer.eos_token_id, int):
            raise RenderError("The tokenizer has no end-of-sequence token, so answers could never end.")
        return [self._tokenizer.eos_token_id]
