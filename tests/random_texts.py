"""Random texts of every kind of character that tokenizers trip over, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

_POOLS: dict[str, list[str]] = {
    "ascii": [chr(code) for code in range(32, 127)],
    "control": [chr(code) for code in (*range(32), *range(127, 160))],
    "latin": [chr(code) for code in range(0xA0, 0x250)],
    "marks": [chr(code) for code in range(0x300, 0x370)],
    "greek, cyrillic": [chr(code) for code in range(0x370, 0x530)],
    "arabic": [chr(code) for code in (*range(0x600, 0x700), *range(0xFB50, 0xFE00))],
    "indic": [chr(code) for code in range(0x900, 0xE80)],
    "jamo": [chr(code) for code in (*range(0x1100, 0x1200), *range(0x3131, 0x3190), *range(0xFFA0, 0xFFDD))],
    "hangul": [chr(code) for code in range(0xAC00, 0xD7A4, 31)],
    "kana": [chr(code) for code in (*range(0x3041, 0x3100), *range(0xFF66, 0xFFA0))],
    "chinese": list(
        "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方"
    ),
    "rare chinese": [chr(code) for code in range(0x4E00, 0x9FFF, 7)],
    "punctuation": [chr(code) for code in (*range(0x2000, 0x2070), *range(0x3000, 0x3040), *range(0xFF00, 0xFF66))],
    "compatible": [
        chr(code)
        for code in (*range(0x2100, 0x2200), *range(0x2460, 0x2500), *range(0x3200, 0x3400), *range(0xF900, 0xFB50))
    ],
    "mathematical": [chr(code) for code in range(0x1D400, 0x1D800)],
    "emoji": [*map(chr, range(0x1F300, 0x1FA70)), "\u200d", "\ufe0f"],
    "astral": [chr(code) for code in range(0x10000, 0x2FA20, 101)],
    "private": [chr(code) for code in (*range(0xE000, 0xF900, 13), *range(0xF0000, 0xF0100), 0x10FFFD)],
    "any": [chr(code) for code in range(0, 0x110000, 17) if not 0xD800 <= code < 0xE000],
    "blanks": [
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\r",
        "\r\n",
        " " * 5,
        "\u3000",
        "\xa0",
        "▁",
        "▁▁",
        "\n\n",
        " " * 99,
        "\u200b",
    ],
    "control tokens": [
        *("<sop>", "<eop>", "[MASK]", "[gMASK]", "▁[gMASK]", "<pad>", "<unk>", "<s>", "</s>", "<n>", "<|tab|>", "sop"),
        *("<|blank_2|>", "<|blank_81|>", "<|user|>", "▁<|assistant|>", "<|endoftext|>", "<0x0A>", "<0xE4>"),
    ],
    "words": [
        *("hello", "world", "The", "quick", "brown", "fox", "import", "def", "return", "class", "self", "None"),
        *("int", "float", "你好", "世界", "今天", "天气"),
    ],
}
_RUNS = [character * size for character in ("a", "=", "-", ".", "0", "哈", "！") for size in (2, 3, 4, 5, 7, 11)]


def random_texts(count: int, *, seed: int, runs: bool = True) -> Iterator[str]:
    """`count` texts of one to some dozens of pieces, each from a few kinds.

    Args:
        count: how many.
        seed: the same seed gives the same texts.
        runs: whether the same character may stand in long runs.
    """
    draw = random.Random(seed)
    pools = [*_POOLS.values(), _RUNS] if runs else list(_POOLS.values())
    for _ in range(count):
        kinds = draw.sample(pools, draw.randint(1, 5))
        pieces = [draw.choice(draw.choice(kinds)) for _ in range(draw.choice((1, 2, 3, 5, 8, 24)))]
        yield "".join(piece + draw.choice(("", "", "", "", "", " ", "\n")) for piece in pieces)
