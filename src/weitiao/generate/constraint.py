"""An answer's grammar as a mask over tokens: which may come next, which must, and whether the answer may end here.

The grammars are llguidance's Lark dialect, the parser llguidance's own. This module gives it the model's vocabulary as
bytes and the tokenisation of training, and says in sentences why an answer could not go on.

Whoever holds a `Constraint` does this, over and over::

    forced = constraint.forced()       # tokens that need not be asked for
    allowed = constraint.allowed()     # else: the ids that may come next
    constraint.advance(token)          # the one that was chosen
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import GrammarError, ModelError
from ..render.base import Renderer
from ..tasks.grammar import LEXER_FUEL

Encode = Callable[[str], Sequence[int]]

_PROBES = ('```json\n[{"主语": "é b"}]\n```', "Ⅳ\t🙂\n\n", " b")
_TAIL = 30
"""Characters of an unfinished answer that a refusal quotes."""


class ConstraintCompiler:
    """Compiles grammars for one vocabulary; costs about a second for 262 144 tokens, so one is kept per model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        end_ids: Sequence[int] = (),
        encode: Encode | None = None,
        read: Callable[[Sequence[int]], str] | None = None,
        control_ids: Collection[int] = (),
    ) -> None:
        """
        Args:
            tokenizer: any fast tokenizer with byte-level BPE, or with blanks written as ``▁`` and bytes as ``<0x0A>``.
            vocab_size: number of scores that the model gives; tokens beyond it do not exist.
            stop_ids: tokens that end an answer; the first is the one written where nothing else can follow.
            end_ids: tokens that training writes between every answer and its stop token, such as the blank of Llama 2.
            encode: token ids of a text as training writes it inside an answer; by default the tokenizer's own.
            read: the text that such token ids are read back as, where that may be another text than was written, as
                with a tokenizer that normalises; by default nothing may.
            control_ids: further tokens that are never text, besides the tokenizer's special ones.

        Raises:
            ModelError: the tokenizer's tokens cannot be understood as bytes.
        """
        self.stop_ids = tuple(stop_ids)
        self.vocab_size = vocab_size
        self.end_ids = tuple(end_ids)
        added = tokenizer.added_tokens_decoder
        never_text = {i for i, token in added.items() if token.special} | {*control_ids, *stop_ids}
        never_text |= set(tokenizer.all_special_ids)
        self._bytes = _token_bytes(tokenizer, vocab_size, never_text)
        self._encode = encode or (lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        for probe in _PROBES:
            expected = probe if read is None else read(self._encode(probe))
            if not expected or self.text_bytes(self._encode(probe)) != expected.encode():
                raise ModelError(
                    f"The tokens of {type(tokenizer).__name__} cannot be read as bytes ({probe!r} comes out as "
                    f"{self.text_bytes(self._encode(probe))!r}), so answers cannot be constrained with it. "
                    "Generate without a grammar."
                )
        self._tokens = LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._bytes, self._encode_exactly, self.stop_ids[0])),
            n_vocab=vocab_size,
            eos_token=list(self.stop_ids),
        )

    def compile(self, lark: str, *, before: str = "") -> Constraint:
        """The constraint of the grammar `lark` (llguidance's dialect, rule ``start``), at the answer's beginning.

        Args:
            lark: the grammar of the answer's text.
            before: what its tokens spell before that text (`Renderer.before_answer`).

        Raises:
            GrammarError: it cannot be compiled; the text says where.
        """
        limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, step_lexer_fuel=LEXER_FUEL)
        matcher = LLMatcher(self._tokens, _behind(before, lark), log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"The answer's grammar cannot be compiled: {_first_lines(matcher.get_error())}")
        return Constraint(self, matcher, [])

    def text_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of tokens that are text."""
        return b"".join(self._bytes[i] or b"" for i in token_ids)

    def _encode_exactly(self, text: str) -> list[int]:
        """The tokens of `text` as in training; where these spell another text (a tokenizer that normalises), others."""
        ids = list(self._encode(text))
        return ids if self.text_bytes(ids) == text.encode() else self._tokens.greedy_tokenize(text)


class Constraint:
    """Where one answer stands in its grammar."""

    __slots__ = ("_compiler", "_matcher", "_num_end", "_written")

    def __init__(self, compiler: ConstraintCompiler, matcher: LLMatcher, written: list[int], num_end: int = 0) -> None:
        self._compiler = compiler
        self._matcher = matcher
        self._written = written
        self._num_end = num_end
        """How many of the tokens between answer and stop token are written. They are no part of the grammar: behind one
        that may end in blanks, its parser would look for a blank's end for ever."""

    def fork(self) -> Constraint:
        """A copy that goes its own way; takes microseconds, where compiling takes milliseconds."""
        return Constraint(self._compiler, self._matcher.deep_copy(), list(self._written), self._num_end)

    def forced(self) -> list[int]:
        """The tokens that must come next, as training would tokenise them; empty where there is a choice.

        Where the grammar can only end, that is the stop token. A token whose first bytes are forced, but which could
        be longer, is not.
        """
        tokens: list[int] = [] if self._num_end else self._matcher.compute_ff_tokens()
        if tokens or not (self._num_end or self.ended):
            return tokens
        return [*self._compiler.end_ids[self._num_end :], self._compiler.stop_ids[0]]

    def allowed(self) -> NDArray[np.int64]:
        """The ids that may come next, in rising order; stop tokens where the answer may end, none after an error."""
        if self._matcher.is_error():
            return np.empty(0, np.int64)
        if self._num_end or self.ended:
            rest = self._compiler.end_ids[self._num_end :]
            return np.array(rest[:1] or sorted(self._compiler.stop_ids))
        words = np.zeros((self._compiler.vocab_size + 31) // 32, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            return np.empty(0, np.int64)
        filled = np.flatnonzero(words)  # most words of a mask are empty
        bits = np.unpackbits(words[filled].view(np.uint8), bitorder="little").reshape(-1, 32)
        places, offsets = np.nonzero(bits)
        ids = filled[places] * 32 + offsets
        if not self._compiler.end_ids or not self._matcher.is_accepting():
            return ids
        return np.union1d(np.setdiff1d(ids, self._compiler.stop_ids), self._compiler.end_ids[:1])

    def advance(self, token: int) -> bool:
        """Go on by `token`, which is no stop token; False where the grammar refuses it (see `why`)."""
        if self._ends_with(token):
            self._num_end += 1
        elif not self._matcher.consume_token(token) or self._num_end:
            return False
        self._written.append(token)
        return True

    def _ends_with(self, token: int) -> bool:
        """Whether `token` is the next of those between answer and stop token, and cannot belong to the answer."""
        rest = self._compiler.end_ids[self._num_end :]
        if not rest or token != rest[0]:
            return False
        return (
            self._num_end > 0
            or self.ended
            or (self._matcher.is_accepting() and not self._matcher.validate_tokens([token]))
        )

    @property
    def accepting(self) -> bool:
        """Whether the stop token may stand here: the answer may end, and what belongs between is written."""
        return self._matcher.is_accepting() and self._num_end == len(self._compiler.end_ids)

    @property
    def ended(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def why(self) -> str:
        """A clause that says where the answer stands, such as ``it cannot end after '… "作者": "九玄'``."""
        if self._matcher.is_error():
            error = _first_lines(self._matcher.get_error())
            dead_end = error.startswith("NoExtension")
            return f"the grammar {'has no way on' if dead_end else f'gave up ({error})'} after {self._tail()!r}"
        return f"it {'may' if self.accepting else 'cannot'} end after {self._tail()!r}"

    def _tail(self) -> str:
        text = self._compiler.text_bytes(self._written[-8 * _TAIL :]).decode(errors="replace")
        return text if len(text) <= _TAIL else f"…{text[-_TAIL:]}"


@lru_cache(maxsize=2)
def compiler_of(renderer: Renderer, vocab_size: int) -> ConstraintCompiler:
    """The compiler for answers that `renderer` writes and a model of `vocab_size` scores; kept for the last two."""
    tokenizer: PreTrainedTokenizerBase = renderer.tokenizer
    end_ids = renderer.render_answer("")
    added = tokenizer.added_tokens_decoder.items()
    return ConstraintCompiler(
        tokenizer,
        vocab_size=vocab_size,
        stop_ids=renderer.stop_ids,
        end_ids=end_ids[:-1],
        encode=renderer.encode_inside,
        read=renderer.read_inside,
        control_ids=[i for i, token in added if token.content.strip() and token.content in renderer.template],
    )


def _behind(before: str, lark: str) -> str:
    """The grammar of `before` and then a text of `lark`, which stays a grammar of its own, whatever its rules are."""
    if not before:
        return LLMatcher.grammar_from_lark(lark)
    outer = f"start: {json.dumps(before)} @answer"
    return json.dumps(
        {"grammars": [{"name": "whole", "lark_grammar": outer}, {"name": "answer", "lark_grammar": lark}]}
    )


def end_text(renderer: Renderer) -> str:
    """What stands between every answer of this chat format and its stop token; nothing, as a rule."""
    return renderer.read_answer(renderer.render_answer("")[:-1])


class _Vocabulary:
    """The vocabulary in the shape that llguidance's TokenizerWrapper reads."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes | None], encode: Callable[[str], list[int]], stop_id: int) -> None:
        self.eos_token_id = stop_id
        self.tokens = [b"<token %d>" % i if token is None else token for i, token in enumerate(tokens)]
        self.special_token_ids = [i for i, token in enumerate(tokens) if token is None]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("The vocabulary encodes text, not bytes.")  # TokenizerWrapper asks, and takes this for no
        return self._encode(text)


def _token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int, never_text: set[int]) -> list[bytes | None]:
    """The bytes that each token writes; None for those that are never text."""
    spell = _speller(tokenizer)
    added = tokenizer.added_tokens_decoder
    tokens: list[bytes | None] = [None] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        if i < vocab_size and i not in never_text:
            tokens[i] = (added[i].content.encode() if i in added else spell(token)) or None
    return tokens


def _speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes | None]:
    """The function from a token as the vocabulary writes it to its bytes, told by the tokenizer's decoder."""
    decoder = tokenizer.backend_tokenizer.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [state])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def spell_bytes(token: str) -> bytes | None:
            known = all(character in byte_of for character in token)
            return bytes(byte_of[character] for character in token) if known else None

        return spell_bytes
    rewrites = [rewrite for step in steps if (rewrite := _rewrite(step))]
    if not any(step.get("type") == "Metaspace" or step.get("content") == " " for step in steps):
        raise ModelError(
            f"{type(tokenizer).__name__} decodes by {sorted(map(str, kinds))}, which is neither byte-level BPE nor "
            "SentencePiece, so answers cannot be constrained with it. Generate without a grammar."
        )
    single = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if "ByteFallback" in kinds else {}

    def spell(token: str) -> bytes | None:
        if token in single:
            return single[token]
        for rewrite in rewrites:
            token = rewrite(token)
        return token.encode()

    return spell


def _rewrite(step: dict[str, Any]) -> Callable[[str], str] | None:
    """What a step of a decoder makes of one token's text; None for a step that only joins tokens."""
    if step.get("type") == "Metaspace":
        return lambda token: token.replace(step["replacement"], " ")
    if step.get("type") != "Replace":
        return None
    pattern, content = step["pattern"], step["content"]
    if "String" in pattern:
        return lambda token: token.replace(pattern["String"], content)
    replace = decoders.Replace(Regex(pattern["Regex"]), content)
    return lambda token: str(replace.decode([token]))


def _first_lines(error: str) -> str:
    """The message of llguidance without the state of its parser."""
    return " ".join(error.partition("\n<state>")[0].split())[:300]
