r"""A reply with tools on offer, as it comes: text is told at once, what may be a call is held back until it is one.

>>> stream = CallStream(names=["weather"], in_tags=True)
>>> [stream.push(piece) for piece in ("好的。\n<tool", "_call>\n{\"name\"")]
['好的。', '']
"""

from __future__ import annotations

from collections.abc import Sequence

from ..messages import ToolCall
from .conversations import read_said

_OPENING = "<tool_call>"


class CallStream:
    """Tells the text before the first call; the calls are read when the reply is complete."""

    def __init__(self, *, names: Sequence[str], in_tags: bool) -> None:
        """
        Args:
            names: the tools on offer; with none, every piece is text.
            in_tags: whether the chat format writes calls in tags. Where it has words of its own, which a plain reply
                could begin with too, everything is held back until the end.
        """
        self._names, self._in_tags = names, in_tags
        self._seen = ""
        self._told = 0

    def push(self, text: str) -> str:
        """What of the reply so far can be told now."""
        self._seen += text
        if not self._names:
            end = len(self._seen)
        elif not self._in_tags:
            end = 0
        elif (start := self._seen.find(_OPENING)) >= 0:
            end = start
        else:
            held = next((size for size in range(len(_OPENING) - 1, 0, -1) if self._seen.endswith(_OPENING[:size])), 0)
            end = len(self._seen) - held
        if self._names:
            end = len(self._seen[:end].rstrip("\n"))
        new = self._seen[self._told : end]
        self._told = max(self._told, end)
        return new

    def finish(self, whole: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The text that is left to tell, and the calls of the `whole` reply."""
        if not self._names:
            return self._seen[self._told :], ()
        said = read_said(whole, self._names)
        told = self._seen[: self._told]
        assert said.text.startswith(told), "what was told is no beginning of the reply"
        return said.text[len(told) :], said.calls
