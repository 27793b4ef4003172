"""What makes two rows the same, and which rows of a set are: contradictions, repeats, dev rows that are trained on.

Knows records only; what to say of them is the business of repeats.py and dataset.py.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from .record import Record

InputKey = tuple[tuple[str, ...], ...]


def input_key(record: Record) -> InputKey:
    """What makes two rows the same question: every message, surrounding blanks aside, and the tools on offer."""
    turns = tuple(
        (message.role, message.text.strip(), *(_written([call.name, call.arguments]) for call in message.calls))
        for message in record.messages
    )
    return (*turns, ("tools", *map(_written, record.tools))) if record.tools else turns


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def target_key(record: Record) -> str:
    """What makes two answers the same, surrounding blanks aside."""
    return (
        json.dumps(record.target, ensure_ascii=False) if not isinstance(record.target, str) else record.target.strip()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamePairs:
    """Rows with one input, in pairs (row, an earlier row or the train row), in order of the rows."""

    contradictions: tuple[tuple[int, int], ...]
    """Another answer than the first row with this input on its side has."""
    repeats: tuple[tuple[int, int], ...]
    """Input and answer as in the row that is named."""
    leaks: tuple[tuple[int, int], ...]
    """A dev row and the first train row with its input."""


class SameRows:
    """Takes rows in with `add`; `pairs` then tells which have the same input. A row costs 17 bytes.

    Rows are told apart by 64-bit hashes: among a million different rows two are held to be the same by chance once in
    thirty-seven million such sets.
    """

    def __init__(self) -> None:
        self._inputs, self._targets, self._dev = array("Q"), array("Q"), array("B")

    def __len__(self) -> int:
        return len(self._inputs)

    def add(self, record: Record, *, dev: bool) -> None:
        """Take in the next row, from the dev or the train side."""
        self.extend(array("Q", [hash_input(record)]), array("Q", [hash_target(record)]), dev=dev)

    def extend(self, inputs: array[int], targets: array[int], *, dev: bool) -> None:
        """Take in the next rows of one side, of each of which `hash_input` and `hash_target` are given."""
        self._inputs.extend(inputs)
        self._targets.extend(targets)
        self._dev.frombytes(bytes([dev]) * len(inputs))

    def is_dev(self, row: int) -> bool:
        return bool(self._dev[row])

    def same_input(self, one: int, other: int) -> bool:
        return self._inputs[one] == self._inputs[other]

    def same_answer(self, one: int, other: int) -> bool:
        return self._targets[one] == self._targets[other]

    def pairs(self) -> SamePairs:
        """What was found among all rows added."""
        contradictions: list[tuple[int, int]] = []
        repeats: list[tuple[int, int]] = []
        leaks: list[tuple[int, int]] = []
        for rows in self._same_inputs():
            train, dev = [row for row in rows if not self._dev[row]], [row for row in rows if self._dev[row]]
            for side in (train, dev):
                known: dict[int, int] = {}
                for row in side:
                    before = known.get(self._targets[row])
                    if before is not None:
                        repeats.append((row, before))
                    elif known:
                        contradictions.append((row, side[0]))
                    known.setdefault(self._targets[row], row)
            leaks += [(row, train[0]) for row in dev if train]
        return SamePairs(
            contradictions=tuple(sorted(contradictions)), repeats=tuple(sorted(repeats)), leaks=tuple(sorted(leaks))
        )

    def _same_inputs(self) -> Iterator[list[int]]:
        """Rows with one input, each group in order."""
        import numpy as np  # here, because the workers that hash rows do without it

        hashes = np.array(self._inputs, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
        for at in np.flatnonzero(np.diff(starts) > 1):
            yield [int(row) for row in order[starts[at] : starts[at + 1]]]


def hash_input(record: Record) -> int:
    """64 bits that are the same for rows with one `input_key`."""
    return _hash(repr(input_key(record)))


def hash_target(record: Record) -> int:
    """64 bits that are the same for rows with one `target_key`."""
    return _hash(target_key(record))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little")
