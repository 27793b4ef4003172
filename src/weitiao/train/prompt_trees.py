"""Rows that begin with the same tokens, as trees: the common beginning once, then what is each row's own.

Arithmetic on token ids alone: what a tree is computed with, `models/tree_attention.py` says; whether it may be,
`shared_prompts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..data.order import share_passes

FEWEST_SHARED = 32
"""Fewer common tokens are not worth a segment of their own: its products would be too small to be fast."""

_BLOCK = 8
"""Beginnings are compared in blocks of so many tokens, and segments end at their bounds: fewer different shapes."""

Tokens = Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of tokens that one or several rows have in common, at the same places in each."""

    start: int
    """Its first token's place in the rows."""
    stop: int
    parent: int
    """The number of the segment that it goes on from; -1 where it begins its rows."""
    rows: tuple[int, ...]
    """The places of its rows among those of the step."""

    def __len__(self) -> int:
        return self.stop - self.start


def plain_rows(rows: Sequence[Tokens], places: Sequence[int]) -> list[Segment]:
    """Each of the rows at `places` as one segment of its own."""
    return [Segment(start=0, stop=len(rows[place]), parent=-1, rows=(place,)) for place in places]


def grow_trees(rows: Sequence[Tokens], places: Sequence[int]) -> list[Segment]:
    """The rows at `places` as segments, parents first; what they begin with alike, from 32 tokens on, is one segment.

    Rows of 40 tokens that differ in the last two: one segment of 32 tokens, the block of eight being the smallest
    thing that is compared, and two of eight.
    """
    if not places:
        return []
    ordered = sorted(places, key=lambda place: (rows[place], place))
    alike = [_common(rows[one], rows[other]) for one, other in pairwise(ordered)]
    segments: list[Segment] = []
    _grow(rows, ordered, alike, 0, -1, segments)
    return segments


def _grow(
    rows: Sequence[Tokens], ordered: Sequence[int], alike: Sequence[int], start: int, parent: int, out: list[Segment]
) -> None:
    """Add to `out` the segments of sorted rows from their token `start` on; `alike`: what neighbours have in common."""
    for run in _runs(alike, start + FEWEST_SHARED):
        places = ordered[run.start : run.stop]
        if len(places) == 1:
            stop = len(rows[places[0]])
        else:
            stop = min(alike[run.start : run.stop - 1])
        if stop > start:
            out.append(Segment(start=start, stop=stop, parent=parent, rows=tuple(places)))
        if len(places) > 1:
            own = len(out) - 1
            _grow(rows, places, alike[run.start : run.stop - 1], stop, own, out)


def _runs(alike: Sequence[int], least: int) -> Iterator[range]:
    """The longest runs of sorted rows in which neighbours have at least so many tokens in common."""
    first = 0
    for place, common in enumerate(alike):
        if common < least:
            yield range(first, place + 1)
            first = place + 1
    yield range(first, len(alike) + 1)


def _common(one: Tokens, other: Tokens) -> int:
    """With how many tokens both begin alike, in whole blocks."""
    for start in range(0, min(len(one), len(other)), _BLOCK):
        if one[start : start + _BLOCK] != other[start : start + _BLOCK]:
            return start
    return min(len(one), len(other)) // _BLOCK * _BLOCK


def share_trees(rows: Sequence[Tokens], places: Sequence[int], *, tokens_per_pass: int) -> list[list[Segment]]:
    """The rows at `places` as trees in as few passes as fit `tokens_per_pass`; a longer row gets a pass of its own.

    Rows that begin alike stay in one pass as far as their tree fits it.
    """
    trees = [tree for tree in _trees(rows, places) for tree in _cut(rows, tree, tokens_per_pass)]
    passes = share_passes([num_tokens(tree) for tree in trees], tokens_per_pass=tokens_per_pass)
    return [_end_to_end([trees[place] for place in places]) for places in passes]


def prompt_groups(rows: Sequence[Tokens], *, batch_size: int) -> list[int]:
    """For each row the number of its group, -1 for none: rows of which half the tokens or more are a common beginning.

    A group is as large as it can be within `batch_size`. Where more rows than that share so much, those of them that
    belong to no smaller group are one.
    """
    groups = [-1] * len(rows)
    segments = [segment for segment in grow_trees(rows, range(len(rows))) if len(segment.rows) > 1]
    few = [number for number, segment in enumerate(segments) if len(segment.rows) <= batch_size]
    many = [number for number, segment in enumerate(segments) if len(segment.rows) > batch_size]
    for number in (*few, *reversed(many)):  # the longest beginning comes last among the few, first among the many
        free = [place for place in segments[number].rows if groups[place] < 0]
        if len(free) > 1 and 2 * len(free) * segments[number].stop >= sum(len(rows[place]) for place in free):
            for place in free:
                groups[place] = number
    return groups


def num_tokens(segments: Sequence[Segment]) -> int:
    """The tokens that are computed."""
    return sum(map(len, segments))


def _trees(rows: Sequence[Tokens], places: Sequence[int]) -> list[list[Segment]]:
    """The trees of the rows at `places`, one list of segments for each root, parents counted from its first."""
    trees: list[list[Segment]] = []
    before = 0
    for number, segment in enumerate(grow_trees(rows, places)):
        if segment.parent < 0:
            trees.append([])
            before = number
        trees[-1].append(replace(segment, parent=segment.parent - before if segment.parent >= 0 else -1))
    return trees


def _cut(rows: Sequence[Tokens], tree: list[Segment], limit: int) -> list[list[Segment]]:
    """`tree`, or several of fewer rows where it is longer than `limit`."""
    places = tree[0].rows
    if num_tokens(tree) <= limit or len(places) == 1:
        return [tree]
    parts: list[list[Segment]] = []
    kept: list[int] = []
    for place in places:
        if kept and num_tokens(grow_trees(rows, [*kept, place])) > limit:
            parts.append(grow_trees(rows, kept))
            kept = []
        kept.append(place)
    return [*parts, grow_trees(rows, kept)]


def _end_to_end(trees: Sequence[Sequence[Segment]]) -> list[Segment]:
    segments: list[Segment] = []
    for tree in trees:
        before = len(segments)
        segments += [replace(s, parent=s.parent + before if s.parent >= 0 else -1) for s in tree]
    return segments
