r"""The prompts of ChatGLM3-6B and of GLM-4's original checkpoints: turns behind a token that names who speaks.

    [gMASK] sop <|system|> \n You are … <|user|> \n Hello <|assistant|> \n Hi there! <|user|> …
    … <|assistant|> get_weather\n ```python\ntool_call(city="北京")\n``` <|observation|> \n 21 °C <|assistant|> …

Behind the role stands a line of metadata, empty but for the name of a called tool, then the text. ChatGLM3's
SentencePiece encodes both apart, each behind a blank of its own; GLM-4's vocabulary is byte-level and knows no blank. A
turn has no end token: the next role ends it. Facts: THUDM's ChatGLM3 PROMPT.md, tokenization files and trainers.

Where no tool is on offer a reply can only be plain, so the prompt ends behind its empty line, and what the model writes
is the answer alone, which a grammar can hold. Where tools are on offer the prompt ends at ``<|assistant|>`` and the
reply brings its first line. Without tools on offer the calls of a conversation are text like any other reply's.

Training teaches at the end of a reply what ends it in the family's own trainers: within a conversation the next role,
behind a call ``<|observation|>``, behind the last reply ``</s>`` (ChatGLM3) or ``<|user|>`` (GLM-4). So a conversation
goes on exactly as its prompts do, and makes one example. Those trainers learn the empty line as well (`Masks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import RenderError
from ..messages import Message, Role, ToolCall, write_calls
from .base import Tools
from .glm_base import GlmRenderer, require_question
from .glm_calls import Dialect, offer_tools, read_call, write_call
from .glm_text import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_LINE = "\n"
_CONTROL: dict[Role, str] = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "tool": "<|observation|>",
}


class RolesRenderer(GlmRenderer):
    """Writes turns behind role tokens. `layout` is ``chatglm3`` or ``glm4``."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, layout: Dialect, extra_stop_ids: Sequence[int] = ()
    ) -> None:
        """
        Args:
            tokenizer: the model's fast tokenizer.
            layout: which of the two formats.
            extra_stop_ids: further tokens that end an answer.

        Raises:
            RenderError: the vocabulary lacks a control token of the format.
        """
        self._dialect: Dialect = layout
        user, observation = _CONTROL["user"], _CONTROL["tool"]
        stops = ["</s>", user, observation] if layout == "chatglm3" else [user, "<|endoftext|>", observation]
        super().__init__(tokenizer, name=f"weitiao: roles of {layout}, 1", stops=stops, extra_stop_ids=extra_stop_ids)
        self._roles = {role: self._text.control_id(name) for role, name in _CONTROL.items()}
        self._start = (
            self._text.control_id("[gMASK]"),
            self._text.control_id("sop" if layout == "chatglm3" else "<sop>"),
        )
        self._length_of_empty_line = len(self._text.encode_all([[_EMPTY_LINE]])[0])

    def before_answer(self, tools: Tools = ()) -> str:
        """Each of the two texts, the empty line and the answer, stands behind a blank where the tokenizer sets one."""
        blank = self._text.blank
        return f"{blank}{_EMPTY_LINE}{blank}" if tools else blank

    def read_answer(self, token_ids: Sequence[int], tools: Tools = ()) -> str:
        """Calls as `messages.write_calls` writes them, where tools were on offer and each call can be read.

        A reply that cannot be read as text and then calls comes back as the text it is, first lines included.
        """
        kept = self._without_stop(token_ids)
        if not tools:
            return self._text.decode(kept)
        names = {tool.get("name") for tool in tools}
        turns = [self._read_turn(turn) for turn in _split(kept, self._roles["assistant"])]
        said = [turns.pop(0)[1]] if turns[0][0] == "" else []
        calls: list[ToolCall] = []
        for name, content in turns:
            is_name = name in names or (name is not None and len(name.split()) == 1)
            call = read_call(name, content, self._dialect) if name is not None and is_name else None
            if call is None:
                return self._as_written(kept)
            calls.append(call)
        return write_calls("".join(said), calls) if calls else "".join(said)

    def _prompt(self, messages: Sequence[Message], tools: Tools) -> Sequence[Piece]:
        require_question(messages)
        pieces: list[Piece] = [*self._start]
        own = messages[0].text if messages[0].role == "system" else None
        if tools:
            for text in offer_tools(own or "", tools, self._dialect):
                pieces += self._turn("system", text)
        elif own is not None and (own or self._dialect == "chatglm3"):  # GLM-4's template leaves out an empty one
            pieces += self._turn("system", own)
        for message in messages[own is not None :]:
            if message.role == "assistant":
                pieces += [self._roles["assistant"], *self._said(message, tools)]
            else:
                pieces += self._turn(message.role, message.text)
        return [*pieces, self._roles["assistant"], *([] if tools else [_EMPTY_LINE])]

    def _turn(self, role: Role, text: str) -> list[Piece]:
        """A turn that is only ever read. GLM-4's own template hands line and text to the tokenizer as one."""
        if self._dialect == "glm4":
            return [self._roles[role], _EMPTY_LINE + text]
        return [self._roles[role], _EMPTY_LINE, text]

    def _reply(self, reply: Message, tools: Tools, following: Message | None) -> Sequence[Piece]:
        said = self._said(reply, tools)
        if following is not None:
            end = self._roles[following.role]
        else:
            end = self._roles["tool"] if reply.calls else self._stop_ids[0]
        return [*(said if tools else said[1:]), end]

    def _said(self, reply: Message, tools: Tools) -> list[Piece]:
        """What stands behind the ``<|assistant|>`` of a reply."""
        if not (reply.calls and tools):
            return [_EMPTY_LINE, write_calls(reply.text, reply.calls) if reply.calls else reply.text]
        pieces: list[Piece] = [_EMPTY_LINE, reply.text] if reply.text else []
        for call in reply.calls:
            if "\n" in call.name:
                raise RenderError(f"The tool's name {call.name!r} holds a line break; this chat format ends it there.")
            pieces += [self._roles["assistant"]] if pieces else []
            pieces += [f"{call.name}\n", write_call(call, self._dialect)]
        return pieces

    def _num_opening(self, tools: Tools) -> int:
        return 0 if tools else self._length_of_empty_line

    def _read_turn(self, token_ids: Sequence[int]) -> tuple[str | None, str]:
        """The first line of a reply's turn, without blanks around it, and the text behind it; no line where none ends.

        They are texts of their own, so what SentencePiece sets before the second is told by where its tokens begin.
        """
        for place, token in enumerate(token_ids, start=1):
            if "\n" in self._text.decode_inside([token]):
                line, _, text = self._text.decode(token_ids[:place]).partition("\n")
                rest = token_ids[place:]
                return line.strip(), text + (self._text.decode_inside(rest) if text else self._text.decode(rest))
        return None, self._text.decode(token_ids)

    def _as_written(self, token_ids: Sequence[int]) -> str:
        """The reply as text: its turns with their first lines, what stands between two shown as it is called."""
        turns = [self._read_turn(turn) for turn in _split(token_ids, self._roles["assistant"])]
        return _CONTROL["assistant"].join(text if line is None else f"{line}\n{text}" for line, text in turns)


def _split(token_ids: Sequence[int], separator: int) -> Iterator[Sequence[int]]:
    """The tokens between `separator`s; at least one part."""
    start = 0
    for place, token in enumerate(token_ids):
        if token == separator:
            yield token_ids[start:place]
            start = place + 1
    yield token_ids[start:]
