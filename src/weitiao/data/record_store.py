"""Rows on the disk instead of in memory: each becomes a `Record` when it is asked for.

    keeper = RowKeeper(folder)
    keeper.add(record, converter)           for every row that was read
    rows = keeper.rows()                    a Sequence[Record]: a tuple of few rows, a RecordStore of many

The rows lie as JSON in a file without a name in `folder`, which the system removes when the process ends in whatever
way. A row costs eight bytes of memory, whatever its length; it is read and made a record anew each time it is asked
for, which takes about ten microseconds. `pack_parts` cuts rows into parts that another process can make records of.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import overload
from weakref import finalize

from weitiao.data.placeholders import may_hold_placeholders
from weitiao.data.raw_rows import RawRow
from weitiao.data.record import Record
from weitiao.data.records import RowConverter
from weitiao.errors import DataError

KEPT_IN_MEMORY = 20_000
"""Up to so many rows stay in memory, about 40 MB of them: reading them from the disk again would only cost time."""

_BLOCK_BYTES = 1 << 20
_ROOM = "They need about as much room there as the files have, unpacked."

PART_ROWS = 2_000
"""Rows that are packed together."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)
"""Made once: json.dumps would make one for every row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Some rows as they lie on the disk, and what makes records of them; the records come when it is iterated."""

    data: bytes
    lengths: array[int]
    """Of each row, in bytes."""
    converters: Sequence[RowConverter]
    """What makes the rows records: the first converter those up to its place in `ends`, and so on."""
    ends: Sequence[int]
    """For each converter, the place behind its last row."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Record]:
        start = place = 0
        for converter, last in zip(self.converters, self.ends, strict=True):
            for length in self.lengths[place:last]:
                yield decode_row(self.data[start : start + length], converter)
                start += length
            place = last


def encode_row(row: RawRow) -> bytes:
    """The row as it lies on the disk: its source and its value as JSON."""
    text = _ENCODER.encode(row.value) if row.text is None else row.text
    return f"[{_ENCODER.encode(row.source)}, {text}]".encode("utf-8", "surrogatepass")


def decode_row(data: bytes, converter: RowConverter) -> Record:
    """The record of a row that `encode_row` wrote, as `converter` made it before."""
    text = data.decode("utf-8", "surrogatepass")
    source, value = json.loads(text)
    record = converter.convert(RawRow(source=source, value=value, marked=may_hold_placeholders(text)))
    assert isinstance(record, Record), f"{source} was a record when it was read and is none now: {record}"
    return record


class RecordStore(Sequence[Record]):
    """Rows in a file without a name; rows are added first, then read, from any thread."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError when nothing can be written into `folder`, which is made if need be."""
        self._folder = folder
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._ends = array("Q", [0])
        self._converters: list[RowConverter] = []
        self._first_rows: list[int] = []
        with keeping("Rows could not be laid aside", folder, room=_ROOM):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                self._descriptor = os.dup(file.fileno())
        finalize(self, os.close, self._descriptor)

    def add(self, record: Record, converter: RowConverter) -> None:
        """Take in the next row, which `converter` made of ``record.raw``."""
        data = encode_row(RawRow(source=record.source, value=record.raw))
        self.add_encoded(data, (len(data),), converter)

    def add_encoded(self, data: bytes, lengths: Iterable[int], converter: RowConverter) -> None:
        """Take in the next rows, which `encode_row` wrote one after the other, each so many bytes long."""
        if not self._converters or self._converters[-1] is not converter:
            self._first_rows.append(len(self))
            self._converters.append(converter)
        self._ends.extend(islice(accumulate(lengths, initial=self._ends[-1]), 1, None))
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= _BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added; needed once before rows are read. Raises DataError when the disk is full."""
        data = memoryview(b"".join(self._waiting))
        with keeping("Rows could not be laid aside", self._folder, room=_ROOM):
            while data:
                data = data[os.write(self._descriptor, data) :]
        self._waiting, self._waiting_bytes = [], 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return select_rows(self, range(len(self))[place])
        place = range(len(self))[place]
        return decode_row(self._read(place, place + 1), self._converters[bisect_right(self._first_rows, place) - 1])

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(pack_parts(self))

    def pack(self, places: Sequence[int]) -> PackedRows:
        """The rows at `places`, in that order."""
        if isinstance(places, range) and places.step == 1:
            data = self._read(places.start, places.stop)
        else:
            data = b"".join([self._read(place, place + 1) for place in places])
        which = [bisect_right(self._first_rows, place) - 1 for place in places]
        groups = [(number, sum(1 for _ in rows)) for number, rows in groupby(which)]
        return PackedRows(
            data=data,
            lengths=array("Q", [self._ends[place + 1] - self._ends[place] for place in places]),
            converters=[self._converters[number] for number, _ in groups],
            ends=[*accumulate(count for _, count in groups)],
        )

    def _read(self, start: int, end: int) -> bytes:
        """The bytes of the rows from `start` up to `end`."""
        first = self._ends[start]
        return os.pread(self._descriptor, self._ends[end] - first, first)


class RecordView(Sequence[Record]):
    """Some rows of a store, in an order of its own."""

    def __init__(self, rows: Sequence[Record], places: Sequence[int]) -> None:
        self._rows = rows
        self._places = places if isinstance(places, range) else array("I", places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return RecordView(self._rows, self._places[place])
        return self._rows[self._places[place]]

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(pack_parts(self))

    def find(self, places: Sequence[int]) -> tuple[Sequence[Record], Sequence[int]]:
        """The rows that this is a view of, and where among them those at `places` stand."""
        if isinstance(places, range):
            return self._rows, self._places[places.start : places.stop : places.step]
        return self._rows, [self._places[place] for place in places]


def is_on_disk(rows: Sequence[Record]) -> bool:
    """Whether the rows are those of a store."""
    while isinstance(rows, RecordView):
        rows, _ = rows.find(())
    return isinstance(rows, RecordStore)


def pack_parts(rows: Sequence[Record]) -> Iterator[PackedRows | Sequence[Record]]:
    """All rows in order, `PART_ROWS` at a time: packed where they lie on the disk, else as they are."""
    for start in range(0, len(rows), PART_ROWS):
        yield pack_rows(rows, range(start, min(start + PART_ROWS, len(rows))))


def pack_rows(rows: Sequence[Record], places: Sequence[int]) -> PackedRows | Sequence[Record]:
    """The rows at `places`: packed where they lie on the disk, else as they are."""
    while isinstance(rows, RecordView):
        rows, places = rows.find(places)
    return rows.pack(places) if isinstance(rows, RecordStore) else [rows[place] for place in places]


def select_rows(rows: Sequence[Record], places: Sequence[int]) -> Sequence[Record]:
    """The rows at `places`: a tuple of a tuple, a view of a store; `rows` itself where it is all of them in order."""
    if places == range(len(rows)):
        return rows
    if len(places) == len(rows) and all(at == place for at, place in enumerate(places)):
        return rows
    if isinstance(rows, tuple):
        return tuple(rows[place] for place in places)
    return RecordView(rows, places)


class RowKeeper:
    """Keeps rows in memory as long as they are few, then in a store."""

    def __init__(self, folder: Path, *, most_in_memory: int | None = None) -> None:
        self._folder = folder
        self.most_in_memory = KEPT_IN_MEMORY if most_in_memory is None else most_in_memory
        """More rows are laid aside."""
        self._few: list[tuple[Record, RowConverter]] = []
        self._store: RecordStore | None = None

    def __len__(self) -> int:
        return len(self._few) if self._store is None else len(self._store)

    def add(self, record: Record, converter: RowConverter) -> None:
        """Take in the next row, which `converter` made of ``record.raw``. Raises DataError when the disk is full."""
        if self._store is not None:
            self._store.add(record, converter)
            return
        self._few.append((record, converter))
        if len(self._few) > self.most_in_memory:
            self._lay_aside()

    @property
    def has_many(self) -> bool:
        """Whether there are too many for the memory."""
        return self._store is not None

    def add_encoded(self, data: bytes, lengths: Sequence[int], converter: RowConverter) -> None:
        """Take in the next rows, which `encode_row` wrote. Raises DataError when the disk is full."""
        if lengths:
            self._lay_aside().add_encoded(data, lengths, converter)

    def _lay_aside(self) -> RecordStore:
        """The store, with all rows so far in it."""
        if self._store is None:
            self._store = RecordStore(self._folder)
            for kept, its_converter in self._few:
                self._store.add(kept, its_converter)
            self._few = []
        return self._store

    def rows(self) -> Sequence[Record]:
        """The rows in the order they were added."""
        if self._store is None:
            return tuple(record for record, _ in self._few)
        self._store.flush()
        return self._store


@contextmanager
def keeping(what: str, folder: Path, *, room: str) -> Iterator[None]:
    """Turn the system's refusal to write `what` into `folder` into a DataError; `room` says how much they need."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"{error.strerror or error}"
        raise DataError(
            f"{what} in {folder}: {reason}. {room} Free some space, or set WEITIAO_CACHE to a folder on another disk."
        ) from None
