"""Rows on the disk instead of in memory: each becomes a `Record` when it is asked for.

    keeper = RowKeeper(folder)
    keeper.add(record, converter)           for every row that was read
    rows = keeper.rows()                    a Sequence[Record]: a tuple of few rows, a RecordStore of many

The rows lie as JSON in a file without a name in `folder`, which the system removes when the process ends in whatever
way. A row costs eight bytes of memory, whatever its length; it is read and made a record anew each time it is asked
for, which takes about ten microseconds.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

_ENCODER = json.JSONEncoder(ensure_ascii=False)
"""Made once: json.dumps would make one for every row."""


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
        if not self._converters or self._converters[-1] is not converter:
            self._first_rows.append(len(self))
            self._converters.append(converter)
        data = _ENCODER.encode([record.source, record.raw]).encode("utf-8", "surrogatepass")
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._ends.append(self._ends[-1] + len(data))
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
        start, end = self._ends[place], self._ends[place + 1]
        text = os.pread(self._descriptor, end - start, start).decode("utf-8", "surrogatepass")
        source, value = json.loads(text)
        converter = self._converters[bisect_right(self._first_rows, place) - 1]
        record = converter.convert(RawRow(source=source, value=value, marked=may_hold_placeholders(text)))
        assert isinstance(record, Record), f"{source} was a record when it was read and is none now: {record}"
        return record

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))


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
        return map(self._rows.__getitem__, self._places)


def select_rows(rows: Sequence[Record], places: Sequence[int]) -> Sequence[Record]:
    """The rows at `places`: a tuple of a tuple, a view of a store; `rows` itself where it is all of them in order."""
    if len(places) == len(rows) and all(at == place for at, place in enumerate(places)):
        return rows
    if isinstance(rows, tuple):
        return tuple(rows[place] for place in places)
    return RecordView(rows, places)


class RowKeeper:
    """Keeps rows in memory as long as they are few, then in a store."""

    def __init__(self, folder: Path, *, most_in_memory: int | None = None) -> None:
        self._folder = folder
        self._most = KEPT_IN_MEMORY if most_in_memory is None else most_in_memory
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
        if len(self._few) > self._most:
            self._store = RecordStore(self._folder)
            for kept, its_converter in self._few:
                self._store.add(kept, its_converter)
            self._few = []

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
