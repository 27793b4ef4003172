"""Near-duplicate texts by MinHash over character n-grams: rows go in one at a time, groups of alike rows come out.

One-permutation MinHash (Li, Owen, Zhang 2012): every 3-gram of a text is hashed once; the hash says in which of 128
bins the gram falls, and each bin keeps its least value. The share of equal bins among those that either text fills
estimates the Jaccard similarity of the two sets of grams, with a standard deviation of about 0.035 at 0.8. Candidates
are found by banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3): rows that agree in all eight
bins of one of 16 bands are compared.

A row costs 256 bytes, whatever its length. Knows texts and numbers only; what a group of alike rows means is for
repeats.py to say.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .texts import plain_text

NUM_GRAM = 3
NUM_BINS = 128
NUM_BANDS = 16
THRESHOLD = 0.8
"""Texts count as nearly the same from this similarity on: two changed characters in a text of fifty are below it."""
SHORTEST = 20
"""Shorter texts are never called alike: one character is then a difference in meaning as often as a slip."""

_BATCH_CHARACTERS = 1 << 20
_PAIRS_AT_ONCE = 1 << 15
_EMPTY = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows, by the order they were added in, and how alike they are (0–1)."""

    first: int
    second: int
    similarity: float


class NearIndex:
    """Collects texts; `pairs` and `groups` then tell which are alike."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str, int]] = []
        self._waiting_characters = 0
        self._num_rows = 0
        self._rows = array("I")
        self._signatures: list[NDArray[np.uint16]] = []

    def __len__(self) -> int:
        return self._num_rows

    def add(self, text: str, group: str = "") -> None:
        """Take in the next row. Only rows of the same `group` are ever alike."""
        plain = plain_text(text)
        if len(plain) >= SHORTEST:
            self._waiting.append((self._num_rows, plain, zlib.crc32(group.encode("utf-8", "backslashreplace"))))
            self._waiting_characters += len(plain)
        self._num_rows += 1
        if self._waiting_characters >= _BATCH_CHARACTERS:
            self._flush()

    def pairs(self, threshold: float = THRESHOLD) -> list[Pair]:
        """Pairs of rows at least `threshold` alike, enough of them to connect every group; the first row is earlier."""
        self._flush()
        if not self._signatures:
            return []
        candidates = _candidates(self._signatures)
        if not len(candidates):
            return []
        likeness = np.concatenate(
            [self._similarity(candidates[at : at + _PAIRS_AT_ONCE]) for at in range(0, len(candidates), _PAIRS_AT_ONCE)]
        )
        alike = likeness >= threshold
        rows = np.array(self._rows, dtype=np.int64)
        return [
            Pair(int(first), int(second), float(value))
            for (first, second), value in zip(rows[candidates[alike]], likeness[alike])
        ]

    def _similarity(self, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        """The estimated Jaccard similarity of each pair."""
        left, right = self._take(pairs[:, 0]), self._take(pairs[:, 1])
        filled = (left != 0) | (right != 0)
        equal = (left == right) & filled
        return np.asarray(equal.sum(axis=1) / np.maximum(filled.sum(axis=1), 1))

    def _take(self, places: NDArray[np.int64]) -> NDArray[np.uint16]:
        """The signatures at `places`; the batches are never joined, which would need their memory twice."""
        ends = np.cumsum([len(batch) for batch in self._signatures])
        batches = np.searchsorted(ends, places, side="right")
        taken = np.empty((len(places), NUM_BINS), dtype=np.uint16)
        for batch in np.unique(batches):
            here = batches == batch
            signatures = self._signatures[batch]
            taken[here] = signatures[places[here] - (ends[batch] - len(signatures))]
        return taken

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._rows.extend(row for row, _, _ in self._waiting)
        texts, salts = [text for _, text, _ in self._waiting], [salt for _, _, salt in self._waiting]
        self._signatures.append(sign(texts, np.array(salts, dtype=np.uint32)))
        self._waiting, self._waiting_characters = [], 0


def sign(texts: Iterable[str], salts: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """The signature of each text, shape (texts, 128); 0 is an empty bin. Each text has at least `NUM_GRAM` characters.

    The same text with another salt has another signature.
    """
    encoded = [text.encode("utf-32-le", "surrogatepass") for text in texts]
    lengths = np.array([len(data) // 4 for data in encoded])
    codes = np.frombuffer(b"".join(encoded), dtype=np.uint32)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    grams = _mix(
        codes[:-2] * np.uint32(0x9E3779B1)
        + codes[1:-1] * np.uint32(0x85EBCA77)
        + codes[2:] * np.uint32(0xC2B2AE3D)
        + salts[owners[:-2]]
    )
    whole = owners[:-2] == owners[2:]  # a gram never reaches from one text into the next
    grams, owners = grams[whole], owners[:-2][whole]
    least = np.full(len(lengths) * NUM_BINS, _EMPTY, dtype=np.uint32)
    np.minimum.at(least, owners * NUM_BINS + (grams >> np.uint32(25)), grams & np.uint32(0x1FFFFFF))
    kept = (_mix(least) % np.uint32(65535) + np.uint32(1)).astype(np.uint16)
    kept[least == _EMPTY] = 0
    return kept.reshape(len(lengths), NUM_BINS)


def _mix(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Every bit of the result depends on every bit of the value (the finaliser of MurmurHash3)."""
    mixed = values ^ (values >> np.uint32(16))
    mixed = mixed * np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed = mixed * np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _candidates(batches: Sequence[NDArray[np.uint16]]) -> NDArray[np.int64]:
    """Pairs (earlier, later) of places in the joined `batches` that agree in a band; at most two a row and band.

    Within a bucket a row is paired with the first and with the one before it, so a boilerplate shared by ten
    thousand rows costs twenty thousand comparisons and not fifty million.
    """
    found = []
    width = NUM_BINS // NUM_BANDS
    for band in range(NUM_BANDS):
        part = np.concatenate([signatures[:, band * width : (band + 1) * width] for signatures in batches])
        filled = np.flatnonzero(part.any(axis=1))
        halves = part[filled].view(np.uint64)
        keys = halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ (halves[:, 1] + np.uint64(0x7F4A7C15))
        order = np.argsort(keys, kind="stable")
        ordered, places = keys[order], filled[order]
        same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        if not len(same):
            continue
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        firsts = places[starts[np.searchsorted(starts, same, side="right") - 1]]
        found += [np.stack([places[same - 1], places[same]], axis=1), np.stack([firsts, places[same]], axis=1)]
    return np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), dtype=np.int64)


def group(pairs: Iterable[Pair]) -> list[list[int]]:
    """The rows that `pairs` connect, each group in order, groups in the order of their first row.

    >>> group([Pair(1, 4, 0.9), Pair(4, 9, 0.8), Pair(2, 3, 1.0)])
    [[1, 4, 9], [2, 3]]
    """
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for pair in pairs:
        low, high = sorted((root(pair.first), root(pair.second)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for row in sorted(parent):
        members.setdefault(root(row), []).append(row)
    return list(members.values())
