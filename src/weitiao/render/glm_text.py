"""Texts ↔ tokens of the ChatGLM family's tokenizers, each text encoded by itself and control tokens put in by id.

SentencePiece sets a blank before every text, so 你好 is ``▁你 好`` wherever a piece of a conversation begins with it.
That blank is no part of the text and is gone when it is read back. Knows tokens and texts; knows no chat format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

from ..errors import RenderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = int | str
"""A control token, or a text that is encoded by itself."""

_SIGN = "▁"
"""Before the name of a control token: that it is one which texts cannot spell (`models/glm/tokenizers.py`)."""

_ANCHOR = "\n"
"""A text that merges with nothing behind it in SentencePiece's vocabularies: what stands behind it is inside a text."""


class GlmText:
    """Encodes and decodes texts none of which can spell a control token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Args:
            tokenizer: a fast tokenizer of the family.
        """
        self.tokenizer = tokenizer
        self._backend = deepcopy(tokenizer.backend_tokenizer)  # the user's own may go on reading control tokens
        self._backend.encode_special_tokens = True  # the library's name for: control tokens in texts are mere text
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control = {
            i: token.content.removeprefix(_SIGN) for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.blank = ""
        self._anchor_ids: list[int] = []
        """What stands before every text that is encoded by itself."""
        if self._decode(self._encode("a") * 2) == "a a":
            self.blank, self._anchor_ids = " ", self._encode(_ANCHOR)

    def control_id(self, name: str) -> int:
        """The id of the control token `name`. Raises RenderError when the vocabulary has none."""
        found = next((i for i, content in self._control.items() if content == name), None)
        if found is None:
            raise RenderError(
                f"The tokenizer {type(self.tokenizer).__name__} has no token {name!r}, which this chat format needs. "
                "Its vocabulary belongs to another model: download the model's own tokenizer files."
            )
        return found

    def encode_all(self, written: Sequence[Sequence[Piece]]) -> list[tuple[int, ...]]:
        """The ids of each; all texts are tokenised in one call, on all cores, and equal ones once."""
        texts = list(dict.fromkeys(piece for pieces in written for piece in pieces if isinstance(piece, str) and piece))
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ids_of = {text: encoding.ids for text, encoding in zip(texts, encoded, strict=True)}
        ids_of[""] = []

        def ids(pieces: Sequence[Piece]) -> Iterator[int]:
            for piece in pieces:
                if isinstance(piece, str):
                    yield from ids_of[piece]
                else:
                    yield piece

        return [tuple(ids(pieces)) for pieces in written]

    def encode_inside(self, text: str) -> tuple[int, ...]:
        """Ids of `text` as they stand inside a text that began before."""
        return tuple(self._encode(_ANCHOR + text)[len(self._anchor_ids) :] if self.blank else self._encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that the tokens were encoded from."""
        return self.decode_inside(token_ids).removeprefix(self.blank)

    def decode_inside(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that follow others; control tokens, which have none, by their names."""
        shown = ""
        run: list[int] = []
        for token in token_ids:
            if token in self._control:
                shown += self._decode_run(run) + self._control[token]
                run = []
            else:
                run.append(token)
        return shown + self._decode_run(run)

    def show_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; tokens that only together make a character carry it on the first of them."""
        shown = [""] * len(token_ids)
        start = 0
        for end in range(1, len(token_ids) + 1):
            piece = token_ids[start:end]
            text = self.decode_inside(piece) if start else self.decode(piece)
            incomplete = text.endswith("\ufffd") and len(piece) < 8
            if not incomplete or end == len(token_ids):
                shown[start], start = text, end
        return shown

    def _decode_run(self, token_ids: Sequence[int]) -> str:
        if not self._anchor_ids:
            return self._decode(token_ids)
        return self._decode([*self._anchor_ids, *token_ids]).removeprefix(_ANCHOR)

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))
