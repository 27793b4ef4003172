"""Tokens coloured by loss mask, for a terminal: what the model reads is grey, what it learns is green."""

from __future__ import annotations

from rich.text import Text

from .base import Example, Renderer

_READ = ("grey62", "grey46")
_LEARNT = ("bold green", "bold bright_green")


def colour_example(example: Example, renderer: Renderer) -> Text:
    """The example's text, one colour shade per token, learnt tokens in green; newlines shown as ⏎."""
    text = Text()
    pieces = renderer.show_tokens(example.token_ids)
    for place, (piece, learnt) in enumerate(zip(pieces, example.loss_mask, strict=True)):
        shade = (_LEARNT if learnt else _READ)[place % 2]
        text.append(piece.replace("\n", "⏎\n"), style=shade)
    return text
