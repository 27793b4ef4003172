"""The labelled rows nearest to a text: a search index in memory that needs no server, no model and no torch.

    index = NeighbourIndex.build(train_records, groups=[task.name for task in train_tasks])
    index.nearest("苹果很甜，孩子爱吃", 4, group="topics")     → up to four Neighbours, the nearest first
    load_index(index.to_bytes(), where="neighbours.jsonl")    → the same index, its rows included

Knows records and texts; what the groups mean, and how a neighbour is shown to a model, is for others to say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import DataError
from .near import NUM_GRAM, SHORTEST, THRESHOLD
from .postings import MOST_TEXTS, Postings
from .record import Record
from .stored_rows import StoredRows, pack_record
from .texts import plain_text

_LAYOUT = 1
"""Of the file and of the search: the same rows under another number may have other neighbours."""
_SPARE = 8
"""Rows looked at beyond those that are asked for, before the rest is sorted too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A row that is near to a text."""

    place: int
    """Its place among the rows of the index."""
    score: float
    """Its BM25 score, above 0; it orders the neighbours of one text and says nothing across texts."""
    record: Record


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """The rows that may be neighbours of each other."""

    places: Sequence[int]
    postings: Postings


class NeighbourIndex:
    """Rows by what their texts are made of. `build` makes one of records, `load_index` one of bytes."""

    def __init__(self, records: Sequence[Record], groups: Sequence[str]) -> None:
        self._records = records
        self._group_names = groups
        places: dict[str, list[int]] = {}
        for place, name in enumerate(groups):
            places.setdefault(name, []).append(place)
        self._groups = {
            name: _Group(places=mine, postings=Postings.build(searched_text(records[place]) for place in mine))
            for name, mine in places.items()
        }

    @classmethod
    def build(cls, records: Sequence[Record], *, groups: Sequence[str] | None = None) -> NeighbourIndex:
        """An index over `records`, which are referred to, not copied.

        Args:
            records: labelled rows, in memory or on the disk.
            groups: for each row the name of what it may be a neighbour in, as a rule its task; None: one group, "".

        Raises:
            DataError: there are no rows, or more than sixteen million.
        """
        if not records or len(records) > MOST_TEXTS:
            raise DataError(
                f"Neighbours are looked for among 1 to {MOST_TEXTS:,} labelled rows, but there are {len(records):,}."
            )
        names = groups if groups is not None else [""] * len(records)
        if len(names) != len(records):
            raise ValueError(f"{len(names)} groups for {len(records)} rows; there must be one for each.")
        return cls(records, tuple(names))

    def __len__(self) -> int:
        return len(self._records)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the rows, their groups and the kind of search; the same when saved and read back."""
        return _digest(self._body())

    def nearest(
        self, text: str, k: int, *, group: str = "", exclude: Collection[int] = (), exclude_alike: bool = False
    ) -> list[Neighbour]:
        """Up to `k` rows of `group` that share pieces with `text`, the nearest first; of equals the earlier row.

        Args:
            text: what to look for, as `searched_text` gives it for a record.
            k: how many at most.
            group: the group that neighbours come from.
            exclude: places of rows that must not be neighbours.
            exclude_alike: leave out rows with the same text or nearly the same (`texts_alike`), as is due where
                `text` belongs to a row of the index: its label would be handed to whoever asks for it.
        """
        mine = self._groups.get(group)
        found: list[Neighbour] = []
        if mine is None or k < 1:
            return found
        for number, score in mine.postings.best_first(text, wanted=k + len(exclude) + _SPARE):
            place = mine.places[number]
            if place in exclude:
                continue
            record = self._records[place]
            if exclude_alike and texts_alike(text, searched_text(record)):
                continue
            found.append(Neighbour(place=place, score=score, record=record))
            if len(found) == k:
                break
        return found

    def to_bytes(self) -> bytes:
        """The index as JSON lines, a head and then its rows, as `load_index` reads it back.

        Write it with `runs.write_bytes`. The rows are the user's own: whoever has the file has them.
        """
        body = self._body()
        head = {"layout": _LAYOUT, "rows": len(self), "fingerprint": _digest(body)}
        return json.dumps(head).encode() + b"\n" + body

    def _body(self) -> bytes:
        """One line for each row: its group and the record."""
        rows = zip(self._group_names, self._records, strict=True)
        return b"".join(_written(name) + b"\t" + pack_record(record) + b"\n" for name, record in rows)


def load_index(data: bytes, *, where: str) -> NeighbourIndex:
    """The index that `NeighbourIndex.to_bytes` wrote; its postings are made anew.

    Raises DataError, which names the file `where`, when it is something else, cut or changed.
    """
    first, _, body = data.partition(b"\n")
    head = _read_head(first)
    again = "Restore it, or train the run again."
    if head is None:
        raise DataError(f"{where} holds no rows to look for neighbours in: its first line is {first[:40]!r}. {again}")
    if head.get("layout") != _LAYOUT:
        raise DataError(f"{where} has layout {head.get('layout')}, but this weitiao reads {_LAYOUT}. {again}")
    if _digest(body) != head.get("fingerprint"):
        raise DataError(f"{where} was changed or cut since it was written: its fingerprint does not fit. {again}")
    lines = [line.partition(b"\t") for line in body.removesuffix(b"\n").split(b"\n")]
    groups = [json.loads(name.decode("utf-8", "surrogatepass")) for name, _, _ in lines]
    return NeighbourIndex(StoredRows([row for _, _, row in lines]), groups)


def _read_head(line: bytes) -> dict[str, Any] | None:
    try:
        head = json.loads(line)
    except ValueError:
        return None
    return head if isinstance(head, dict) and "layout" in head else None


def searched_text(record: Record) -> str:
    """What a row is found by: its input text proper, or everything that was said where there were several turns."""
    turns = [message.text for message in record.messages if message.role != "system"]
    return record.text if len(turns) == 1 and record.text else "\n".join(turns)


def texts_alike(one: str, other: str) -> bool:
    """Whether two texts are the same or nearly so, by the measure that `check` calls rows near repeats.

    >>> texts_alike("苹果 很甜", "苹果很甜"), texts_alike("苹果很甜", "梨子很甜")
    (True, False)
    """
    first, second = plain_text(one), plain_text(other)
    if first == second:
        return True
    if min(len(first), len(second)) < SHORTEST:
        return False
    a, b = ({text[at : at + NUM_GRAM] for at in range(len(text) - NUM_GRAM + 1)} for text in (first, second))
    return len(a & b) >= THRESHOLD * len(a | b)


def _digest(body: bytes) -> str:
    return hashlib.sha256(f"layout {_LAYOUT}\n".encode() + body).hexdigest()


def _written(name: str) -> bytes:
    return json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass")
