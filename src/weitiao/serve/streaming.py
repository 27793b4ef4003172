"""An answer's tokens turned into text as they come: what is sent can never be unsaid by what follows.

    stream = TextStream(renderer)
    for piece in pieces: send(stream.push(piece))       # often "": half a character, or what may begin a stop text
    send(stream.finish(generation))                     # the rest

All that is sent, joined, is the text that `generate.chat.reply_of` reads from the whole answer, to the character. Held
back is what later tokens could still change: bytes that are no whole character yet; runs of byte tokens, which
SentencePiece's decoders read as one; what the chat format writes between an answer and its stop token; and where calls
of tools may be told in a format's own words, everything. Knows renderers and tokens; knows no HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache

from ..generate.chat import answer_text
from ..generate.constraint import end_text
from ..generate.row import Generation
from ..render.base import Renderer, Tools
from ..render.roles import RolesRenderer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """The text of one answer on its way."""

    def __init__(self, renderer: Renderer, *, tools: Tools = (), held: bool = False, stops: Sequence[str] = ()) -> None:
        """
        Args:
            renderer: the model's chat format.
            tools: those that were on offer.
            held: whether the answer has a constraint.
            stops: texts before the first of which the answer is cut.
        """
        self.stopped = False
        """Whether a stop text was found: nothing more is sent, and what is still generated is not wanted."""
        self.num_tokens = 0
        """Tokens that were pushed, until a stop text was found."""
        self._renderer = renderer
        self._tools = tools
        self._held = held
        self._stops = _Stops(stops)
        self._end_ids = renderer.render_answer("")
        self._end_text = end_text(renderer) if held else ""
        self._before = renderer.before_answer(tools)
        self._bytes = _byte_ids(renderer)
        self._waits = bool(tools) and isinstance(renderer, RolesRenderer)  # a call changes the whole text
        self._token_ids: list[int] = []
        self._num_read = 0
        """How many tokens are read for good: their text depends on nothing that follows."""
        self._text = ""
        """The text of those."""
        self._next_read = (0, "")
        """What both will be once a token follows that is no byte: bytes are not read apart from what stands before."""
        self._sure = ""
        """The text that is sure, stop texts aside: `_text` and what the tokens behind it surely write."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is sure now and was not before; token ids without the stop token."""
        if self.stopped:
            return ""
        sent = ""
        for token in token_ids:
            self._token_ids.append(token)
            self.num_tokens += 1
            sent += self._advance()
            if self.stopped:
                break
        return sent

    def finish(self, done: Generation) -> str:
        """The rest of the answer that became `done`, all of whose tokens were pushed; nothing of a refused one."""
        if self.stopped or done.finish == "refused":
            return ""
        whole = answer_text(
            self._token_ids, self._renderer, self._tools, stopped=done.finish == "stop", held=self._held
        )
        if not whole.startswith(self._sure):
            raise AssertionError(f"{self._sure[-40:]!r} was sent, but the answer reads {whole[:200]!r}")
        rest, self.stopped = self._stops.push(whole[len(self._sure) :])
        return rest if self.stopped else rest + self._stops.finish()

    def _advance(self) -> str:
        """What the last token makes sure, stop texts considered."""
        sure = self._read()
        if len(sure) <= len(self._sure):
            return ""
        new, self._sure = sure[len(self._sure) :], sure
        sent, self.stopped = self._stops.push(new)
        return sent

    def _read(self) -> str:
        """The text that is sure, of all tokens."""
        if self._waits:
            return ""
        end, (place, text) = len(self._token_ids), self._next_read
        if place < end and self._token_ids[place] not in self._bytes:
            self._num_read, self._text = place, text
        while end > self._num_read and self._token_ids[end - 1] in self._bytes:
            end -= 1
        new = self._token_ids[self._num_read : end]
        if not new:
            return self._sure
        whole = self._decode(new)
        sure = whole.rstrip("\ufffd")  # a character of which bytes are missing
        for start in range(1, len(self._end_ids)):  # the last tokens may begin what ends the answer
            ended = (*new, *self._end_ids[start:])
            sure = _alike(sure, self._decode(ended))
        if self._before and not self._num_read and self._before.startswith(sure):
            return self._sure  # the opening, which is no part of the answer, may not be whole yet
        text = self._text + sure
        if sure == whole:
            self._next_read = end, text
        kept = _num_beginning(text, self._end_text) if self._end_text else 0
        return text[: len(text) - kept]

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._num_read:
            return self._renderer.read_inside(token_ids)
        return self._renderer.read_answer(token_ids, self._tools)


class _Stops:
    """Cuts a text that comes in pieces before the stop text that is whole first, holding back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._kept = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be sent, and whether a stop text was found behind it."""
        if not self._stops:
            return text, False
        text = self._kept + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:  # the one that was whole first, however the text was cut into pieces
            self._kept = ""
            return text[: min(found)[1]], True
        kept = max(_num_beginning(text, stop) for stop in self._stops)
        sent, self._kept = text[: len(text) - kept], text[len(text) - kept :]
        return sent, False

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        kept, self._kept = self._kept, ""
        return kept


def _alike(one: str, other: str) -> str:
    """What both begin with."""
    return one[: next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), len(other))]


def _num_beginning(text: str, stop: str) -> int:
    """How many of the last characters of `text` are a beginning of `stop`.

    >>> _num_beginning("one two E", "END")
    1
    """
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


@lru_cache(maxsize=8)
def _byte_ids(renderer: Renderer) -> frozenset[int]:
    """Tokens that write single bytes, a run of which is read as one; none where every token writes bytes (BPE)."""
    decoder = renderer.tokenizer.backend_tokenizer.decoder
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    if "ByteFallback" not in {step.get("type") for step in state.get("decoders", [state])}:
        return frozenset()
    return frozenset(i for token, i in renderer.tokenizer.get_vocab().items() if _BYTE.fullmatch(token))
