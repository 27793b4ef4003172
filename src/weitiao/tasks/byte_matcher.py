"""Whether a grammar compiles, and whether it accepts a text: the engine with bytes for a vocabulary.

For forms that users give: their schemas and grammars are tried when the recipe is read, and a Lark grammar has no other
parser. The engine is imported when it is first asked; it loads no torch.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class _Bytes:
    """The 256 bytes as tokens 1 to 256; token 0 ends an answer."""

    eos_token_id = 0
    bos_token_id = None
    unk_token_id = 0
    special_token_ids = (0,)
    tokens = (b"<|end|>", *(bytes([byte]) for byte in range(256)))

    def __call__(self, text: bytes | str) -> list[int]:
        return _ids(text.encode() if isinstance(text, str) else text)


def complaint(lark: str) -> str:
    """Why the engine cannot compile `lark`, in its words; empty when it can."""
    matcher = _matcher(lark)
    if not matcher.is_error():
        return ""
    lines = matcher.get_error().strip().splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(iter([*told, *lines]), "no reason given").strip().rstrip(".:")


def accepts(lark: str, text: str) -> int | None:
    """None when `text` is a whole answer of the grammar; else how many of its characters could stand."""
    matcher = _matcher(lark).deep_copy()
    data = text.encode()
    taken = matcher.try_consume_tokens(_ids(data))
    if taken == len(data) and matcher.is_accepting():
        return None
    return len(data[:taken].decode(errors="ignore"))


def _ids(data: bytes) -> list[int]:
    return [byte + 1 for byte in data]


@lru_cache(maxsize=32)
def _matcher(lark: str) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(_tokens(), LLMatcher.grammar_from_lark(lark), log_level=0)


@cache
def _tokens() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))
