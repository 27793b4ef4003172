"""BM25 over hashed pieces of texts: which texts share the rarest pieces with a given one.

Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond". A piece is known by a 32-bit
hash; among a hundred thousand pieces about one pair shares its hash. Knows texts and numbers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from .pieces import hash_pieces

SATURATION = 1.2
"""BM25's k1: how soon a piece that comes again adds nothing more."""
LENGTH_SHARE = 0.75
"""BM25's b: how much a long text is held back; 1 is fully."""
MOST_TEXTS = 1 << 24
"""Places take 24 bits of a number while an index is built."""

_BATCH_TEXTS = 4096
_MOST_READ = 500_000
"""Postings read for one search, the rarest pieces first: the commonest say least and are by far the most to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Postings:
    """For each piece the texts that hold it. P pieces, N postings, T texts."""

    pieces: NDArray[np.uint32]
    """The hashes of all pieces, rising; (P,)."""
    starts: NDArray[np.int64]
    """Where each piece's postings start, and where the last ones end; (P + 1,)."""
    holders: NDArray[np.uint32]
    """The places of the texts, piece by piece, each once for a piece; (N,)."""
    weights: NDArray[np.float32]
    """What each posting adds to its text's score when the piece is looked for; (N,)."""
    num_texts: int

    @classmethod
    def build(cls, texts: Iterable[str]) -> Postings:
        """The postings of `texts`, of which there are at most `MOST_TEXTS`."""
        packed, lengths = _pack(texts)
        all_pieces = (packed >> np.uint64(32)).astype(np.uint32)
        changes = np.flatnonzero(all_pieces[1:] != all_pieces[:-1]) + 1
        starts = np.concatenate(([0], changes, [len(packed)])) if len(packed) else np.zeros(1, dtype=np.int64)
        holders = ((packed >> np.uint64(8)) & np.uint64(0xFFFFFF)).astype(np.uint32)
        counts = (packed & np.uint64(0xFF)).astype(np.float32)
        held = np.diff(starts)
        rarity = np.log1p((len(lengths) - held + 0.5) / (held + 0.5)).astype(np.float32)
        relative = lengths / max(1.0, float(lengths.sum()) / max(1, len(lengths)))
        slack = (SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * relative)).astype(np.float32)
        gain = counts * np.float32(SATURATION + 1) / (counts + slack[holders])
        return cls(
            pieces=all_pieces[starts[:-1]],
            starts=starts,
            holders=holders,
            weights=(np.repeat(rarity, held) * gain).astype(np.float32, copy=False),
            num_texts=len(lengths),
        )

    def best_first(self, text: str, *, wanted: int) -> Iterator[tuple[int, float]]:
        """Each text that shares a piece with `text` as (place, score), the best first, of equals the earlier one.

        `wanted` is how many will likely be taken; more may be, at the price of sorting again.
        """
        scores = self._score(text)
        done = 0
        while done < len(scores):
            size = min(len(scores), wanted)
            least = max(0.0, float(np.partition(scores, len(scores) - size)[len(scores) - size]))
            top = np.flatnonzero(scores >= least if least else scores > 0)  # at the edge all equals, or none would be
            ordered = top[np.argsort(-scores[top], kind="stable")]
            yield from ((int(place), float(scores[place])) for place in ordered[done:])
            if not least:
                return
            done, wanted = len(ordered), 4 * len(ordered)

    def _score(self, text: str) -> NDArray[np.float64]:
        """The score of every text; (T,)."""
        pieces, times = np.unique(hash_pieces([text])[0], return_counts=True)
        at = np.minimum(np.searchsorted(self.pieces, pieces), max(0, len(self.pieces) - 1))
        known = self.pieces[at] == pieces if len(self.pieces) else np.zeros(len(pieces), dtype=bool)
        at, times = at[known], times[known]
        if not len(at):
            return np.zeros(self.num_texts)
        held = self.starts[at + 1] - self.starts[at]
        rarest = np.argsort(held, kind="stable")
        read = rarest[: max(1, int(np.searchsorted(np.cumsum(held[rarest]), _MOST_READ, side="right")))]
        spans = [slice(self.starts[place], self.starts[place + 1]) for place in at[read]]
        holders = np.concatenate([self.holders[span] for span in spans])
        weights = np.concatenate(
            [self.weights[span] * time for span, time in zip(spans, times[read].tolist(), strict=True)]
        )
        return np.asarray(np.bincount(holders, weights=weights, minlength=self.num_texts), dtype=np.float64)


def _pack(texts: Iterable[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """All postings in order, each as one number, piece (32 bits), place (24), count (8); and the texts' lengths.

    Numbers are sorted several times as fast as rows of three are.
    """
    packed = [np.zeros(0, dtype=np.uint64)]
    lengths = [np.zeros(0, dtype=np.uint32)]
    num_texts = 0
    waiting = iter(texts)
    while batch := list(islice(waiting, _BATCH_TEXTS)):
        hashes, owners = hash_pieces(batch)
        places = (owners + num_texts).astype(np.uint64)
        keys, counts = np.unique((hashes.astype(np.uint64) << np.uint64(24)) | places, return_counts=True)
        packed.append((keys << np.uint64(8)) | np.minimum(counts, 255).astype(np.uint64))
        lengths.append(np.bincount(owners, minlength=len(batch)).astype(np.uint32))
        num_texts += len(batch)
    whole = np.concatenate(packed)
    whole.sort()
    return whole, np.concatenate(lengths)
