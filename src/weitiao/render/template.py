"""The chat format of any tokenizer: its own chat template, or plain continuation for base models without one.

The text of a message can never become a control token: a user who writes ``<|im_end|>`` gets those ten characters,
not the end of the turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RenderError
from ..messages import Message, write_calls
from .base import Conversation, Example, Masks, Renderer, Tools, Turns, join_turns
from .tools import describe_tools, tools_as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_MARK = "\ue000weitiao-answer\ue001"
_OPEN, _CLOSE = "\ue002", "\ue003"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_ANCHORS = ("\ue000", "\n")


class TemplateRenderer(Renderer):
    """Renders through ``tokenizer.apply_chat_template``; without a template the prompt is the messages' own text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, extra_stop_ids: Sequence[int] = ()) -> None:
        """
        Args:
            tokenizer: any fast tokenizer of transformers.
            extra_stop_ids: further tokens that end an answer, such as those of generation_config.json.

        Raises:
            RenderError: the tokenizer has no end token, no single chat template, or cannot encode a text in parts.
        """
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._template = _template_of(tokenizer)
        self._knows_tools = "tools" in self._template
        control = self._control_strings()
        self._control_pattern = _any_of(control)
        self._escaped = [*control, _OPEN, _CLOSE]
        self._escaped_pattern = _any_of(self._escaped)
        # looked for first: Gemma has six thousand control strings, too many to try at every character of a text
        self._control_start, self._escaped_start = _any_start_of(control), _any_start_of(self._escaped)
        self._knows_tools = self._knows_tools and self._shows_tools()
        self._anchor, self._anchor_ids = self._find_anchor()
        self._reply_opening = self._find_reply_opening()
        self._end_ids = self._find_end()
        others = [i for i in (tokenizer.eos_token_id, *extra_stop_ids) if isinstance(i, int)]
        self._stop_ids = tuple(dict.fromkeys([self._end_ids[-1], *others]))
        self._opening_ids = self._find_opening()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def template(self) -> str:
        return self._template

    def render_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        return self._encode_all([self._write_prompt(messages, tools)])[0]

    def render_answer(self, answer: str) -> tuple[int, ...]:
        return self._encode_all([self._write_answer(answer)])[0]

    def render_reply(self, messages: Sequence[Message], reply: Message, tools: Tools = ()) -> tuple[int, ...]:
        """As the template writes a reply with tool calls.

        As `write_calls` does where the template knows none, and where the prompt has opened a plain reply.
        """
        return self._encode_all([self._write_reply(messages, reply, tools)])[0]

    def before_answer(self, tools: Tools = ()) -> str:
        return self._reply_opening if tools else ""

    def encode_inside(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(self._cut(text)))

    def render_conversations(
        self, conversations: Sequence[Conversation], *, turns: Turns = "flagged", masks: Masks = "family"
    ) -> list[tuple[Example, ...]]:
        """As the base class says; the texts of all conversations are tokenised together, on all cores."""
        written: list[_Written] = []
        counts: list[int] = []
        for talk in conversations:
            places = talk.learnt_places(turns)
            for place in places:
                before = talk.messages[:place]
                written.append(self._write_prompt(before, talk.tools))
                written.append(self._write_reply(before, talk.turn(place), talk.tools))
            counts.append(len(places))
        encoded = iter(self._encode_all(written))
        return [join_turns([(next(encoded), next(encoded)) for _ in range(count)]) for count in counts]

    def _write_prompt(self, messages: Sequence[Message], tools: Tools) -> _Written:
        if not messages or messages[-1].role not in ("user", "tool"):
            raise RenderError("A prompt must end with a message of the user, or with what a tool gave back.")
        if self._template:
            text = self._apply_template(messages, tools, prompt=True)
            return _Written(pieces=self._cut_templated(text if tools else text + self._reply_opening), opening=True)
        pieces = self._cut(self._plain_text(messages, tools))
        return _Written(before=self._opening_ids, pieces=pieces, opening=True)

    def _write_answer(self, answer: str) -> _Written:
        return _Written(pieces=self._cut(answer), after=tuple(self._end_ids))

    def _write_reply(self, messages: Sequence[Message], reply: Message, tools: Tools) -> _Written:
        if reply.calls and self._knows_tools and (tools or not self._reply_opening):
            prompt = self._apply_template(messages, tools, prompt=True)
            whole = self._apply_template([*messages, reply], tools, prompt=False)
            if whole.startswith(prompt):
                ids = self._encode_templated(whole[len(prompt) :], opening=False)
                if self._end_ids[-1] in ids:
                    return _Written(before=tuple(ids[: ids.index(self._end_ids[-1]) + 1]))
        text = write_calls(reply.text, reply.calls) if reply.calls else reply.text
        return self._write_answer(self.before_answer(tools) + text)

    def read_answer(self, token_ids: Sequence[int], tools: Tools = ()) -> str:
        kept = list(token_ids)
        while kept and kept[-1] in self._stop_ids:
            kept.pop()
        before_end = self._end_ids[:-1]  # such as the blank that Llama 2 writes between an answer and </s>
        if before_end and len(kept) < len(token_ids) and kept[-len(before_end) :] == before_end:
            del kept[-len(before_end) :]
        return self._decode_inside(kept).removeprefix(self.before_answer(tools))

    def show_tokens(self, token_ids: Sequence[int]) -> list[str]:
        shown = [""] * len(token_ids)
        start = 0
        for end in range(1, len(token_ids) + 1):
            piece = token_ids[start:end]
            text = self._decode_inside(piece) if start else self._decode(piece)
            incomplete = text.endswith("\ufffd") and len(piece) < 8
            if not incomplete or end == len(token_ids):
                shown[start], start = text, end
        return shown

    # ---- text -------------------------------------------------------------------------------------------------

    def _plain_text(self, messages: Sequence[Message], tools: Tools) -> str:
        """The prompt of a base model: one message is its own text; a conversation is told turn by turn."""
        messages = tools_as_text(messages, tools)
        if len(messages) == 1:
            return messages[0].text
        names = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
        turns = [f"{names[message.role]}: {message.text}" for message in messages]
        return "\n\n".join([*turns, "Assistant: "])

    def _apply_template(self, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> str:
        """The templated text, control strings inside message texts replaced by numbered marks."""
        if not self._knows_tools:
            messages, tools = tools_as_text(messages, tools), ()
        try:
            text = self._tokenizer.apply_chat_template(
                [self._as_dict(message) for message in messages],
                tools=self._escape_all(describe_tools(tools)) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=False,
            )
        except Exception as error:  # noqa: BLE001 - a template raises jinja's errors for roles or orders it does not know
            roles = ", ".join(message.role for message in messages)
            raise RenderError(f"The model's chat template refuses a conversation of {roles}: {error}.") from None
        return str(text)

    def _as_dict(self, message: Message) -> dict[str, Any]:
        """The message in the shape that chat templates read."""
        turn: dict[str, Any] = {"role": message.role, "content": self._escape(message.text)}
        if message.calls:
            turn["tool_calls"] = [
                {"type": "function", "function": self._escape_all({"name": c.name, "arguments": c.arguments})}
                for c in message.calls
            ]
        return turn

    def _escape_all(self, value: Any) -> Any:
        """`value` with every text inside it escaped."""
        if isinstance(value, str):
            return self._escape(value)
        if isinstance(value, Mapping):
            return {self._escape(key): self._escape_all(item) for key, item in value.items()}
        return [self._escape_all(item) for item in value] if isinstance(value, list | tuple) else value

    def _escape(self, text: str) -> str:
        """`text` with a numbered mark in the place of every control string, and of the characters that make a mark."""
        if not self._escaped_start.search(text):
            return text
        return self._escaped_pattern.sub(lambda match: f"{_OPEN}{self._escaped.index(match.group())}{_CLOSE}", text)

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
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _decode_inside(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that follow others: tokenizers that drop a text's first blank keep it here."""
        if not self._anchor_ids:
            return self._decode(token_ids)
        return self._decode([*self._anchor_ids, *token_ids]).removeprefix(self._decode(self._anchor_ids))

    def _encode_templated(self, text: str, *, opening: bool = True) -> list[int]:
        """Ids of templated text, whose control strings are meant and whose numbered marks are plain text."""
        return self._encode(self._cut_templated(text), opening=opening)

    def _cut_templated(self, text: str) -> list[str]:
        """Templated text in pieces, cut only where a mark stands: the rest is tokenised exactly as it would be."""
        pieces: list[str] = []
        for place, part in enumerate(_MARK.split(text)):
            pieces += self._cut(self._escaped[int(part)]) if place % 2 else [part]
        return pieces

    def _cut(self, text: str) -> list[str]:
        """Plain text in pieces none of which holds a whole control string: each is cut behind its first character."""
        if not self._control_start.search(text):
            return [text]
        pieces: list[str] = []
        while found := self._control_pattern.search(text):
            if len(found.group()) == 1:
                raise RenderError(
                    f"The text holds {found.group()!r}, a control token of one character, which this tokenizer cannot "
                    f"write as text. Remove it from the row."
                )
            pieces.append(text[: found.start() + 1])
            text = text[found.start() + 1 :]
        return [*pieces, text]

    def _encode(self, pieces: Sequence[str], *, opening: bool = False) -> list[int]:
        """Ids of `pieces` one after the other; `opening` says that nothing but control tokens stands before them."""
        return list(self._encode_all([_Written(pieces=pieces, opening=opening)])[0])

    def _encode_all(self, written: Sequence[_Written]) -> list[tuple[int, ...]]:
        """The ids of each, tokenised in one go."""
        texts: list[str] = []
        behind: list[bool] = []
        for each in written:
            for place, piece in enumerate(filter(None, each.pieces)):
                inside = bool(self._anchor) and not (each.opening and place == 0)
                texts.append(self._anchor + piece if inside else piece)
                behind.append(inside)
        encoded = zip(texts, behind, self._tokenize_all(texts), strict=True)
        whole: list[tuple[int, ...]] = []
        for each in written:
            ids = list(each.before)
            for _ in filter(None, each.pieces):
                text, inside, found = next(encoded)
                ids += self._without_anchor(text, found) if inside else found
            whole.append((*ids, *each.after))
        return whole

    def _without_anchor(self, text: str, ids: list[int]) -> list[int]:
        """The ids behind the anchor that `text` begins with."""
        if ids[: len(self._anchor_ids)] != self._anchor_ids:
            inside = text.removeprefix(self._anchor)
            raise RenderError(f"The tokenizer {type(self._tokenizer).__name__} cannot encode {inside[:40]!r} in parts.")
        return ids[len(self._anchor_ids) :]

    def _tokenize_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as `_tokenize` gives them.

        Straight to the Rust library, which works on all cores: transformers' own call costs twice as much as
        tokenising, most of it for masks and offsets that nobody asks for.
        """
        backend = self._backend
        if backend.truncation is not None or backend.padding is not None:  # left by a call with other wishes
            backend.no_truncation()
            backend.no_padding()
        different = list(dict.fromkeys(texts))  # among rows of a few labels half of the texts are the same
        encoded = backend.encode_batch_fast(different, add_special_tokens=False)
        ids_of = {text: encoding.ids for text, encoding in zip(different, encoded, strict=True)}
        return [ids_of[text] for text in texts]

    def _tokenize_behind(self, anchor: str, text: str) -> list[int]:
        """Ids of `text` inside a longer text: tokenizers that put a blank before every text do not put it here."""
        anchor_ids, ids = self._tokenize(anchor), self._tokenize(anchor + text)
        if ids[: len(anchor_ids)] != anchor_ids:
            raise RenderError(f"The tokenizer {type(self._tokenizer).__name__} cannot encode {text[:40]!r} in parts.")
        return ids[len(anchor_ids) :]

    def _find_anchor(self) -> tuple[str, list[int]]:
        """No anchor where the tokens of parts simply follow each other; else a text behind which they do.

        Llama 2's tokenizer puts a blank before every text and drops it on decoding, so the answer of a prompt must
        be encoded as what it is: the inside of a text.
        """
        before = "答案：a"
        probes = ('```json\n["b"]', "b", " b", "\nb")

        def joins(text: str, ids: list[int]) -> bool:
            return self._decode(self._tokenize(before) + ids) == before + text

        if all(joins(text, self._tokenize(text)) and self._decode(self._tokenize(text)) == text for text in probes):
            return "", []
        for anchor in _ANCHORS:
            try:
                if all(joins(text, self._tokenize_behind(anchor, text)) for text in probes):
                    return anchor, self._tokenize(anchor)
            except RenderError:
                continue
        raise RenderError(
            f"The tokenizer {type(self._tokenizer).__name__} cannot encode a prompt and an answer in parts, "
            f"so a prompt would not be the beginning of its training example."
        )

    def _find_opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text, such as ``<bos>``; an end token it adds is left out."""
        ids = self._tokenizer("", add_special_tokens=True)["input_ids"]
        return tuple(i for i in ids if i != self._tokenizer.eos_token_id or i == self._tokenizer.bos_token_id)

    def _shows_tools(self) -> bool:
        """Whether the template writes down the tools on offer; GLM-4's first one reads them from a message instead."""
        name = "weitiao_probe"
        tool = {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}
        try:
            return name in self._apply_template([Message(role="user", text="?")], [tool], prompt=True)
        except RenderError:  # then it is asked for tools only where a conversation has some, and says so there
            return True

    def _find_reply_opening(self) -> str:
        """The line break that the template writes between what asks for a reply and the reply; empty, as a rule.

        GLM-4's history says ``<|assistant|>⏎Hello`` while its prompts end in ``<|assistant|>``: where no tool can be
        called, the line break is no answer's own. What is more than line breaks, such as a thought, is no opening.
        """
        if not self._template:
            return ""
        asked = [Message(role="user", text="?")]
        prompt = self._apply_template(asked, (), prompt=True)
        whole = self._apply_template([*asked, Message(role="assistant", text=_ANSWER_MARK)], (), prompt=False)
        before, _, _ = whole.partition(_ANSWER_MARK)
        opening = before[len(prompt) :] if before.startswith(prompt) else ""
        return opening if not opening.strip("\r\n") else ""

    def _find_end(self) -> list[int]:
        """The tokens that end an answer: what the template writes after it up to its first control token, else eos."""
        if self._template:
            text = self._apply_template(
                [Message(role="user", text="?"), Message(role="assistant", text=_ANSWER_MARK)], (), prompt=False
            )
            after = self._encode([text.partition(_ANSWER_MARK)[2]])
            special = set(self._tokenizer.all_special_ids)
            special |= {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
            first = next((place for place, i in enumerate(after) if i in special), None)
            if first is not None:
                return after[: first + 1]
        if not isinstance(self._tokenizer.eos_token_id, int):
            raise RenderError("The tokenizer has no end-of-sequence token, so answers could never end.")
        return [self._tokenizer.eos_token_id]


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that transformers uses when none is named; empty when the tokenizer has none."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise RenderError(f"The tokenizer has chat templates {', '.join(template)}, but none is called default.")
        return template["default"]
    return template or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """Text on its way to tokens."""

    before: tuple[int, ...] = ()
    """Tokens known already, which stand before the text."""
    pieces: Sequence[str] = ()
    """The text, in pieces that are tokenised apart."""
    opening: bool = False
    """Whether nothing but control tokens stands before the text."""
    after: tuple[int, ...] = ()
    """Tokens known already, which stand behind the text."""


def _any_of(strings: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of `strings`, the longest first; one that finds nothing when there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(strings, key=len, reverse=True)) or r"(?!)")


def _any_start_of(strings: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds the first character of any of `strings`; one that finds nothing when there are none."""
    firsts = "".join(re.escape(first) for first in sorted({text[0] for text in strings}))
    return re.compile(f"[{firsts}]" if firsts else r"(?!)")
