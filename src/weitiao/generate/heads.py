"""Keys and values of prompts' beginnings, kept so that a row that begins alike copies them instead of computing them.

What many requests begin with, such as the instruction and the examples of a task or the earlier turns of a
conversation, is computed once. Tokens are compared one by one, never by a hash alone. What is kept is cut into blocks
of 16 tokens, each under the one before it, so two prompts share the memory of what they share; the block that was
used longest ago goes first when the memory is full.

Only for models that read from left to right: there keys and values of a token depend on nothing that comes after it.
Another adapter makes other keys, so each has beginnings of its own, by the name of their `owner`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

BLOCK = 16
"""Tokens of a block."""
_STRIDE = 64

_Key = tuple[int, tuple[int, ...]]
"""The number of the block before, and the tokens of this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    number: int
    states: Tensor
    """``[L, 2, K, 16, D]``."""


class HeadStore:
    """The blocks that are kept, of all owners together."""

    def __init__(self, most_bytes: int) -> None:
        """`most_bytes`: bound of the memory; 0 keeps nothing."""
        self.most_bytes = most_bytes
        self.num_bytes = 0
        self.num_hits = 0
        """Rows that found their beginning here."""
        self.num_tokens = 0
        """Tokens that were copied from here."""
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        """The one used longest ago first; of a prompt's blocks the last, so none outlives what it stands behind."""
        self._numbers = count()
        self._roots: dict[str, int] = {}

    def find(self, owner: str, tokens: Sequence[int], *, most: int) -> list[_Block]:
        """The blocks that the first `most` of `tokens` begin with."""
        found = list(self._walk(owner, tokens, most))
        for key, _ in reversed(found):
            self._blocks.move_to_end(key)
        return [block for _, block in found]

    def take(self, blocks: Sequence[_Block]) -> Tensor:
        """Keys and values ``[L, 2, K, n, D]`` of blocks that `find` gave; counts as a hit."""
        self.num_hits += 1
        self.num_tokens += BLOCK * len(blocks)
        return torch.cat([block.states for block in blocks], dim=3)

    def keep(self, owner: str, tokens: Sequence[int], read: Callable[[int, int], Tensor | None]) -> None:
        """Keep the whole blocks of `tokens` that are not there yet, the earlier ones first.

        Args:
            owner: whose keys they are.
            tokens: of which all are computed.
            read: gives a copy ``[L, 2, K, end - start, D]`` of their keys and values from start to end, or None where
                they cannot be kept.
        """
        if not self.most_bytes:
            return
        found = self.find(owner, tokens, most=len(tokens))
        start = BLOCK * len(found)
        whole = len(tokens) // BLOCK * BLOCK
        states = read(start, whole) if start < whole else None
        if states is None:
            return
        # A prompt longer than the memory keeps its beginning.
        room = self.most_bytes // (states.nbytes * BLOCK // (whole - start))
        before = found[-1].number if found else self._root(owner)
        new: list[_Key] = []
        for first in range(start, min(whole, BLOCK * room), BLOCK):
            key = (before, tuple(tokens[first : first + BLOCK]))
            block = _Block(
                number=next(self._numbers), states=states[:, :, :, first - start : first - start + BLOCK].clone()
            )
            self._blocks[key] = block
            self.num_bytes += block.states.nbytes
            before = block.number
            new.append(key)
        for key in reversed(new):
            self._blocks.move_to_end(key)
        for key, _ in reversed(list(self._walk(owner, tokens, start))):
            self._blocks.move_to_end(key)
        while self.num_bytes > self.most_bytes:
            _, gone = self._blocks.popitem(last=False)
            self.num_bytes -= gone.states.nbytes

    def forget(self) -> None:
        """Give all memory back."""
        self._blocks.clear()
        self.num_bytes = 0

    def _walk(self, owner: str, tokens: Sequence[int], most: int) -> Iterator[tuple[_Key, _Block]]:
        before = self._root(owner)
        for first in range(0, most // BLOCK * BLOCK, BLOCK):
            key = (before, tuple(tokens[first : first + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                return
            yield key, block
            before = block.number

    def _root(self, owner: str) -> int:
        """The number that the first blocks of an owner stand under."""
        return self._roots.setdefault(owner, -1 - len(self._roots))


def num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    one, other = tuple(one), tuple(other)  # a list is never equal to a tuple
    shorter, place = min(len(one), len(other)), 0
    while place < shorter and one[place : place + _STRIDE] == other[place : place + _STRIDE]:
        place += _STRIDE  # whole pieces are compared many times faster than tokens
    return next((at for at in range(place, shorter) if one[at] != other[at]), shorter)
