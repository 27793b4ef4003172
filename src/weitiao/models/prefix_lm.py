"""Rows of prefix language models: a context that all tokens see, then an answer that is read from left to right.

ChatGLM-6B is one. Its context are the tokens before ``<sop>``; in its positions the answer stands still where the mask
token is and counts from 1 in a second channel. Knows token places only; what a context is, the model's class says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPrefix:
    """The context of one row.

    >>> RowPrefix(num_tokens=3, mask_position=2).positions(0, 6)
    ([0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3])
    """

    num_tokens: int
    """How many tokens, from the first on, every token of the row sees."""
    mask_position: int
    """Where the mask token stands that the answer takes the place of."""

    def positions(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Both channels of the positions of the row's tokens start … stop - 1."""
        places = range(start, stop)
        return (
            [place if place < self.num_tokens else self.mask_position for place in places],
            [0 if place < self.num_tokens else place - self.num_tokens + 1 for place in places],
        )


def row_prefix(model: Any, token_ids: Sequence[int]) -> RowPrefix | None:
    """The context of the row `token_ids`, as the model's class says it; None for models that read from left to right.

    `model` is a transformers model or a PEFT model around one; a prefix language model has a method of this name.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tell = getattr(base, "row_prefix", None)
    prefix: RowPrefix | None = None if tell is None else tell(token_ids)
    return prefix
