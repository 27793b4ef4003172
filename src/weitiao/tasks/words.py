"""Text in units that can be counted: characters and words.

Two ways of cutting, both lower-case and without punctuation, because Chinese marks no words:

    split_characters("GPT-4 说：你好吗")   →   gpt 4 说 你 好 吗     each CJK sign, each run of other letters, digits
    split_words("GPT-4 说：你好吗")        →   gpt 4 说 你好 吗      the same, runs of Chinese signs cut by jieba

Where a text has no Chinese the two are the same, Korean and Japanese apart: a Korean word is a run of signs to
`split_words`, Japanese kana stay single.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_KANA = r"\u3040-\u30ff"
_HANGUL = r"\uac00-\ud7af"

_CHARACTER = re.compile(rf"[{_HAN}{_KANA}{_HANGUL}]|[^\W_{_HAN}{_KANA}{_HANGUL}]+")
_WORD = re.compile(rf"[{_HAN}]+|[{_KANA}]|[^\W_{_HAN}{_KANA}]+")
_CHINESE = re.compile(rf"[{_HAN}]")


def split_characters(text: str) -> list[str]:
    """Each CJK sign of `text` and each run of other letters and digits; a text without any is cut sign by sign."""
    return _CHARACTER.findall(text.lower()) or _signs(text)


def split_words(text: str) -> list[str]:
    """The words of `text`, Chinese cut by jieba; a text without letters and digits is cut sign by sign."""
    found: list[str] = []
    for run in _WORD.findall(text.lower()):
        found += _cutter()(run) if _CHINESE.match(run) else [run]
    return found or _signs(text)


def has_chinese(text: str) -> bool:
    """Whether `text` holds a Chinese sign, so that words and characters differ."""
    return _CHINESE.search(text) is not None


def _signs(text: str) -> list[str]:
    """What is left to compare of "?!" or "👍": the signs themselves, blanks left out."""
    return [sign for sign in text if not sign.isspace()]


@cache
def _cutter() -> Callable[[str], list[str]]:
    """The cutting of jieba by its own dictionary, which half a second and 60 MB load at the first Chinese text.

    A tokenizer of our own: words that a program adds to jieba's global one would change its scores. Its table is
    filled here and not by `initialize`, which trusts a file of a fixed name in the folder of temporary files.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's unescaped patterns, and pkg_resources where an old one is installed
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    cut: Callable[[str], list[str]] = tokenizer.lcut
    return cut
