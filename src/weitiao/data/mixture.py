"""Several files of rows → rows to learn from and rows to score on, split by seed.

Knows records only. The order within an epoch is drawn from the weights in `train/batches.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError, Problem
from .checks import input_key
from .options import ReadOptions
from .records import Record, read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Rows to learn from with their weights, and rows to score on."""

    train: tuple[Record, ...]
    weights: tuple[float, ...]
    """For each train row, how often it is seen per epoch."""
    dev: tuple[Record, ...]


def read_split(
    sources: Sequence[tuple[str, float, ReadOptions]],
    dev_sources: Sequence[tuple[str, ReadOptions]],
    *,
    heldout: float,
    seed: int,
) -> Split:
    """Read all files and set dev rows apart.

    Args:
        sources: ``(path, weight, options)`` of the train files.
        dev_sources: ``(path, options)`` of the dev files; when empty, `heldout` of the train rows are set apart.
        heldout: share of the train rows for scoring, taken evenly from every kind of question.
        seed: of the choice. Rows with the same input always fall on the same side.

    Raises:
        DataError: with every bad row of every file.
    """
    problems: list[Problem] = []
    messages: list[str] = []

    def read(path: str, options: ReadOptions) -> list[Record]:
        try:
            return read_records(path, options=options)
        except DataError as error:
            messages.append(str(error).splitlines()[0])
            problems.extend(error.problems)
            return []

    read_train = [(record, weight) for path, weight, options in sources for record in read(path, options)]
    dev = [record for path, options in dev_sources for record in read(path, options)]
    if messages:
        raise DataError("\n".join(messages), problems)
    if not dev_sources and heldout > 0:
        apart = choose_heldout([record for record, _ in read_train], share=heldout, seed=seed)
        dev = [record for record, _ in read_train if input_key(record) in apart]
        read_train = [(record, weight) for record, weight in read_train if input_key(record) not in apart]
    return Split(
        train=tuple(record for record, _ in read_train),
        weights=tuple(weight for _, weight in read_train),
        dev=tuple(dev),
    )


def choose_heldout(records: Sequence[Record], *, share: float, seed: int) -> set[tuple[tuple[str, str], ...]]:
    """The `input_key`s of about `share` of `records`, the same share of every question wording with several rows."""
    strata: defaultdict[str, list[tuple[tuple[str, str], ...]]] = defaultdict(list)
    for record in records:
        strata[record.task or record.question or record.instruction].append(input_key(record))
    rare = [name for name, keys in strata.items() if len(keys) * share < 1]
    pooled = [key for name in rare for key in strata.pop(name)]
    rng = random.Random(f"heldout/{seed}")
    chosen: set[tuple[tuple[str, str], ...]] = set()
    for keys in [*strata.values(), *([pooled] if pooled else [])]:
        distinct = list(dict.fromkeys(keys))
        wanted = min(len(distinct) - 1, max(1, round(share * len(distinct)))) if len(distinct) > 1 else 0
        chosen.update(rng.sample(distinct, wanted))
    return chosen
