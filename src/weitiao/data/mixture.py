"""Several files of rows → one set to learn from, and the choice of rows to score on: seeded, stratified, grouped.

Knows records only. The order within an epoch is drawn from the weights in `order.py`.
"""

from __future__ import annotations

import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, Problem
from .checks import SameRows
from .conversion import keep_rows
from .near import NearIndex, Pair, group
from .options import ReadOptions
from .record import Record
from .record_store import RowKeeper, select_rows
from .workers import Workers

NEAR = 0.9
"""Inputs at least this much alike are kept on one side of the split."""

LARGEST_NEAR_GROUP = 0.02
"""Nearly equal inputs that are more than this share of all rows share a boilerplate, not a source: they are not tied
together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRows:
    """One source of the recipe: where its rows stand and how they are used."""

    path: str
    options: ReadOptions = field(default_factory=ReadOptions)
    weight: float = 1.0
    limit: int | None = None
    """At most so many of its rows, chosen by the seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """All rows of a recipe, before any are set apart."""

    train: Sequence[Record]
    """Rows in memory where they are few, else rows on the disk (record_store.py); `dev` too."""
    weights: tuple[float, ...]
    """For each train row, how often it is seen per epoch."""
    dev: Sequence[Record]
    """The rows of the dev files."""
    left_out: tuple[str, ...]
    """For each source with more rows than its limit, a sentence that says so."""


def read_mixture(
    train: Sequence[SourceRows],
    dev: Sequence[SourceRows],
    *,
    seed: int,
    folder: Path | None = None,
    workers: Workers | None = None,
) -> Mixture:
    """Read all sources; rows past the first `KEPT_IN_MEMORY` of them are laid aside in `folder`.

    Args:
        train: the sources to learn from.
        dev: the sources to score on.
        seed: of the choice of rows where a source has more than its limit.
        folder: for many rows; by default the system's for passing files.
        workers: read many rows; without them this process does.

    Raises DataError with every bad row of every file, or when the disk is full.
    """
    workers = workers or Workers(1)
    problems: list[Problem] = []
    messages: list[str] = []
    left_out: list[str] = []

    def read(sources: Sequence[SourceRows]) -> tuple[Sequence[Record], list[float]]:
        keeper = RowKeeper(folder or Path(tempfile.gettempdir()))
        used = array("I")
        weights: list[float] = []
        for source in sources:
            start = len(keeper)
            try:
                count = keep_rows(source.path, keeper, options=source.options, workers=workers)
            except DataError as error:
                messages.append(str(error).splitlines()[0])
                problems.extend(error.problems)
                continue
            chosen: Sequence[int] = range(count)
            if source.limit is not None and count > source.limit:
                left_out.append(f"{source.path}: {source.limit:,} of its {count:,} rows are used, chosen by the seed.")
                chosen = choose_rows(count, source.limit, seed=seed, path=source.path)
            used.extend(start + place for place in chosen)
            weights += [source.weight] * len(chosen)
        return ((), []) if messages else (select_rows(keeper.rows(), used), weights)

    train_rows, weights = read(train)
    dev_rows, _ = read(dev)
    if messages:
        raise DataError("\n".join(messages), problems)
    return Mixture(train=train_rows, weights=tuple(weights), dev=dev_rows, left_out=tuple(left_out))


def choose_rows(count: int, limit: int, *, seed: int, path: str) -> list[int]:
    """Which `limit` of the `count` rows of the source at `path` are used: their places, in order."""
    return sorted(random.Random(f"limit/{seed}/{path}").sample(range(count), min(limit, count)))


def choose_share(strata: Sequence[str], *, share: float, seed: int) -> list[int]:
    """The places of about `share` of the rows, in order, the same share of every stratum; at least one row.

    Systematic sampling: the rows of a stratum, shuffled, stand evenly spread between 0 and 1 with a start drawn by
    chance, and the lowest of all rows are taken. So a smaller share lies within a larger one of the same seed.

    Args:
        strata: for each row, the kind it belongs to: its task and label.
        share: between 0 and 1.
        seed: of the choice.
    """
    rng = random.Random(f"share/{seed}")
    members: dict[str, list[int]] = {}
    for place, kind in enumerate(strata):
        members.setdefault(kind, []).append(place)
    height: dict[int, float] = {}
    for places in members.values():
        start = rng.random()
        rng.shuffle(places)
        height.update({place: (number + start) / len(places) for number, place in enumerate(places)})
    lowest = sorted(height, key=lambda place: (height[place], place))
    return sorted(lowest[: max(1, round(share * len(strata)))])


def hold_out(records: Sequence[Record], strata: Sequence[str], *, share: float, seed: int) -> frozenset[int]:
    """The places of about `share` of `records`, the same share of every stratum; never all of one with several rows.

    Rows with the same input, or nearly the same, are chosen together or not at all.

    Args:
        records: the rows to choose from.
        strata: for each row, the kind it belongs to: its task and label.
        share: between 0 and 1.
        seed: of the choice.
    """
    if share <= 0:
        return frozenset()
    wanted = _wanted(Counter(strata), share)
    rng = random.Random(f"held out/{seed}")
    units = _group_alike(records)
    rng.shuffle(units)
    held: Counter[str] = Counter()
    chosen: list[int] = []
    for unit in units:
        taken = Counter(strata[place] for place in unit)
        if all(held[kind] + count <= wanted[kind] for kind, count in taken.items()):
            held += taken
            chosen += unit
    return frozenset(chosen)


def _wanted(sizes: Counter[str], share: float) -> Counter[str]:
    """Rows to hold out of each stratum: together `share` of all, shared out by largest remainder, never all of one.

    {"a": 10, "b": 7, "c": 2}, 0.2  →  {"a": 2, "b": 2, "c": 0}    4 of 19; of equal remainders the larger stratum
    """
    rows = sum(sizes.values())
    most = sum(count - 1 for count in sizes.values())
    total = min(most, max(1, round(share * rows)))
    wanted = Counter({kind: min(count - 1, int(share * count)) for kind, count in sizes.items()})
    by_remainder = sorted(sizes, key=lambda kind: (wanted[kind] - share * sizes[kind], -sizes[kind]))
    while sum(wanted.values()) < total:
        for kind in by_remainder:
            if wanted[kind] < sizes[kind] - 1 and sum(wanted.values()) < total:
                wanted[kind] += 1
    return wanted


def _group_alike(records: Sequence[Record]) -> list[list[int]]:
    """The places of `records` in groups with the same input, or nearly the same text."""
    same = SameRows()
    near = NearIndex()
    for record in records:
        same.add(record, dev=False)
        near.add(record.text or record.prompt)
    found = same.pairs()
    pairs = [Pair(first, row, 1.0) for row, first in (*found.repeats, *found.contradictions)]
    most = max(2.0, LARGEST_NEAR_GROUP * len(records))
    alike = near.pairs(NEAR)
    large = {place for members in group(alike) if len(members) > most for place in members}
    tied = group([*pairs, *(pair for pair in alike if pair.first not in large)])
    grouped = {place for members in tied for place in members}
    return [*tied, *([place] for place in range(len(records)) if place not in grouped)]
