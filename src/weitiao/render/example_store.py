"""Tokenised examples in an Arrow file that is mapped into memory: any number of processes read it without a copy.

    with ExampleWriter(path) as writer:
        writer.add(examples, rows)              in order, as they come
    examples = ExampleStore(path)               a Sequence[Example]

An example takes four bytes a token on the disk. In memory a store keeps four numbers an example; its tokens are read
when it is asked for, wherever it stands.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .base import Example

BATCH_EXAMPLES = 1024
"""Every record batch of the file but the last holds so many, so that an example is found by division."""

_SCHEMA = pa.schema([
    ("token_ids", pa.list_(pa.int32())),
    ("learnt", pa.list_(pa.int32())),  # start and end of each stretch that is learnt: [7, 9, 14, 16]
    ("num_tokens", pa.int32()),
    ("num_supervised", pa.int32()),
    ("num_answer", pa.int32()),
    ("row", pa.int32()),
])  # fmt: skip


class ExampleWriter:
    """Writes examples to a file, a batch at a time. The file can be read once the writer is closed."""

    def __init__(self, path: Path) -> None:
        self._writer: Any = pa.ipc.new_file(str(path), _SCHEMA)
        self._examples: list[Example] = []
        self._rows: list[int] = []

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._write(len(self._examples))
        self._writer.close()

    def add(self, examples: Sequence[Example], rows: Sequence[int]) -> None:
        """Append `examples`; `rows` are the places of the rows they were made of. Raises OSError on a full disk."""
        self._examples += examples
        self._rows += rows
        while len(self._examples) >= BATCH_EXAMPLES:
            self._write(BATCH_EXAMPLES)

    def _write(self, count: int) -> None:
        examples, rows = self._examples[:count], self._rows[:count]
        self._examples, self._rows = self._examples[count:], self._rows[count:]
        if not examples:
            return
        flags = [bytes(example.loss_mask) for example in examples]
        columns = [
            _lists([example.token_ids for example in examples]),
            _lists([_stretches(each) for each in flags]),
            pa.array(array("i", map(len, flags)), pa.int32()),
            pa.array(array("i", [each.count(1) for each in flags]), pa.int32()),
            pa.array(array("i", [len(each) - 1 - each.rfind(0) for each in flags]), pa.int32()),
            pa.array(array("i", rows), pa.int32()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))


class ExampleStore(Sequence[Example]):
    """The examples of a file that an `ExampleWriter` wrote."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or pyarrow.ArrowInvalid when the file is not there or not whole."""
        self._path = path
        self._file: Any = pa.ipc.open_file(pa.memory_map(str(path)))
        numbers = _read_numbers(path)
        self.lengths = numbers["num_tokens"]
        """Tokens of each example."""
        self.num_supervised = numbers["num_supervised"]
        """Those of them that are learnt."""
        self.num_answer = numbers["num_answer"]
        """Those of the last reply, its end token included."""
        self.rows = numbers["row"]
        """For each example, the place of the row it was made of."""

    def __reduce__(self) -> tuple[type[ExampleStore], tuple[Path]]:
        return ExampleStore, (self._path,)  # another process maps the file itself

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        return _example(self._file.get_batch(place // BATCH_EXAMPLES), place % BATCH_EXAMPLES)

    def __iter__(self) -> Iterator[Example]:
        for number in range(self._file.num_record_batches):
            batch = self._file.get_batch(number)
            yield from (_example(batch, place) for place in range(batch.num_rows))


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """The tokens of each example; from a store without reading the examples."""
    return examples.lengths if isinstance(examples, ExampleStore) else _count(len(one) for one in examples)


def supervised_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """The learnt tokens of each example; from a store without reading the examples."""
    if isinstance(examples, ExampleStore):
        return examples.num_supervised
    return _count(one.num_supervised for one in examples)


def answers_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """The tokens of each example's last reply; from a store without reading the examples."""
    return examples.num_answer if isinstance(examples, ExampleStore) else _count(one.num_answer for one in examples)


def _count(values: Iterator[int]) -> NDArray[np.int32]:
    return np.fromiter(values, dtype=np.int32)


def _example(batch: Any, place: int) -> Example:
    token_ids = tuple(batch.column(0)[place].values.to_numpy().tolist())
    stretches = batch.column(1)[place].values.to_numpy().tolist()
    mask: list[bool] = []
    for start, end in zip(stretches[::2], stretches[1::2], strict=True):
        mask += [False] * (start - len(mask)) + [True] * (end - start)
    return Example(token_ids=token_ids, loss_mask=(*mask, *[False] * (len(token_ids) - len(mask))))


def _stretches(flags: bytes) -> list[int]:
    """Where the learnt stretches start and end: b"\\0\\1\\1\\0\\1" → [1, 3, 4, 5]."""
    found = []
    start = flags.find(1)
    while start >= 0:
        end = flags.find(0, start)
        end = len(flags) if end < 0 else end
        found += [start, end]
        start = flags.find(1, end)
    return found


def _lists(values: Sequence[Sequence[int]]) -> Any:
    """An Arrow column of lists of numbers; a tenth of the time that pyarrow takes to find out what they are."""
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.fromiter(chain.from_iterable(values), dtype=np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _read_numbers(path: Path) -> dict[str, NDArray[np.int32]]:
    """The columns of numbers, read and not mapped: the system would map the tokens around each of them as well."""
    names = _SCHEMA.names[2:]
    options = pa.ipc.IpcReadOptions(included_fields=[_SCHEMA.get_field_index(name) for name in names])
    parts: dict[str, list[NDArray[np.int32]]] = {name: [np.zeros(0, dtype=np.int32)] for name in names}
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file, options=options)
        for number in range(reader.num_record_batches):  # read_all would hold the tokens of all batches at once
            batch = reader.get_batch(number)
            for name in names:
                parts[name].append(batch.column(name).to_numpy().copy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
