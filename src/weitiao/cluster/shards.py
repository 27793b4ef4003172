"""A file of rows cut into shards, each answered by itself: every row stands in the answers exactly once.

OUT.parts/
├── lock                    held by the process that fills this folder
├── ray.txt                 what Ray had to say
├── rows-00012.jsonl        the rows of shard 12, as they were read
├── shard-00012.jsonl       their answers, in the rows' order
└── shard-00012.json        what `Manifest` says; with it, and only with it, the shard is finished

Every file is written under a temporary name, flushed and renamed, the manifest after the answers. Whoever does a shard
again, because a worker died or because two were asked, writes the same names with the same content; so a shard counts
once, however often it was done. A shard belongs to its rows and to what answers them (`Shard.key`): when either
changes, it is done again. Knows no model and no Ray.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..data.placeholders import may_hold_placeholders
from ..data.raw_rows import RawRow, RowCount
from ..data.reading import LikeReader
from ..data.record import Record
from ..data.record_store import encode_row
from ..data.records import digested_line, refuse_problems
from ..errors import DataError, Problem, RunError
from ..runs import clear_leftovers, replacing, write_bytes, write_text, writing
from ..tasks.base import Task, assign_task

MAX_SHARD_ROWS = 4096
"""More would not be made ready together, see `evaluate.predict.CHUNK_ROWS`."""

RAY_SAID = "ray.txt"

_NAMED = 5
"""Rows named at most where some are missing or stand twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Some rows that follow each other."""

    number: int
    first_row: int
    """The place of its first row among all, from 0."""
    rows: int
    key: str
    """Identifies its rows and what answers them: SHA-256, hexadecimal."""

    def __str__(self) -> str:
        return f"rows {self.first_row + 1} to {self.first_row + self.rows}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a finished shard's answers are."""

    key: str
    rows: int
    sha256: str
    """Of the file of answers."""
    valid: int
    """Answers in the labelled form."""
    for_people: int
    """Answers that go to a person; 0 where none were to."""
    notes: tuple[str, ...] = ()
    """What was said of the rows, such as that texts were shortened."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The folder of a file's shards."""

    folder: Path

    def rows_file(self, number: int) -> Path:
        return self.folder / f"rows-{number:05}.jsonl"

    def answers_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.jsonl"

    def manifest_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made if need be, held by this process alone. Raises RunError when another one holds it."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RunError(
                    f"{self.folder} is being filled by another process, so a second one would do its work again. Wait "
                    f"for it, or write to another file."
                ) from None
        try:
            clear_leftovers(self.folder)
            yield
        finally:
            lock.release()

    def finished(self, shard: Shard) -> Manifest | None:
        """What was written for `shard`; None where that is nothing, or was made of other rows or by something else."""
        try:
            told = json.loads(self.manifest_file(shard.number).read_text(encoding="utf-8"))
            manifest = Manifest(**{**told, "notes": tuple(told["notes"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return manifest if manifest.key == shard.key and self.answers_file(shard.number).exists() else None

    def finish(self, shard: Shard, lines: Sequence[dict[str, Any]], *, notes: Sequence[str] = ()) -> Manifest:
        """Write the answers to `shard`, then that they are all there."""
        assert len(lines) == shard.rows, f"{shard} have {len(lines)} answers"
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        data = text.encode("utf-8", "backslashreplace")
        manifest = Manifest(
            key=shard.key,
            rows=len(lines),
            sha256=hashlib.sha256(data).hexdigest(),
            valid=sum(line["valid"] for line in lines),
            for_people=sum(line.get("route") == "person" for line in lines),
            notes=tuple(notes),
        )
        with writing(self.folder):
            self.manifest_file(shard.number).unlink(missing_ok=True)  # of older answers, which are replaced now
        write_bytes(self.answers_file(shard.number), data)
        write_text(self.manifest_file(shard.number), json.dumps(asdict(manifest), ensure_ascii=False) + "\n")
        return manifest

    def read_rows(self, shard: Shard, reader: LikeReader, key: str) -> Sequence[Record]:
        """The records of `shard`, as `lay_aside` read them.

        Raises RunError when the file is not the one that was written: then this machine sees another folder.
        """
        path = self.rows_file(shard.number)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise RunError(_other_folder(path)) from None
        records = []
        digest = _Digest(key, shard.first_row)
        for line in data.splitlines():
            record = _record_of(line, reader)
            digest.add(line, record)
            records.append(record)
        if digest.key() != shard.key:
            raise RunError(_other_folder(path))
        return records

    def remove_beyond(self, shards: int) -> int:
        """Remove what belongs to shards from number `shards` on, of an earlier and longer file; returns how many."""
        count = 0
        for kind, counted in (("shard-*.json", False), ("shard-*.jsonl", True), ("rows-*.jsonl", False)):
            for path in self.folder.glob(kind):
                if int(path.stem.partition("-")[2]) >= shards:
                    path.unlink()
                    count += counted
        return count

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder)

    def remove_unused(self) -> None:
        """Remove the folder unless it holds a finished shard."""
        if not any(self.folder.glob("shard-*.json")):
            self.remove()

    def remove_rows(self) -> None:
        """Keep the answers and their manifests alone."""
        for path in (*self.folder.glob("rows-*.jsonl"), self.folder / "lock", self.folder / RAY_SAID):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaidAside:
    """Rows that were read, checked and cut into shards."""

    shards: Sequence[Shard]
    rows: int
    keys: frozenset[str]
    """All keys that rows have."""


def lay_aside(
    reader: LikeReader, parts: Parts, tasks: Sequence[Task], *, name: str, key: str, rows_per_shard: int
) -> LaidAside:
    """Read the source `name` once, check every row, and write the rows of each shard that is not finished.

    Holds the rows of one shard in memory.

    Args:
        reader: reads the source.
        parts: where shards lie.
        tasks: every row must fit one of these.
        name: the source, for errors.
        key: identifies what will answer the rows.
        rows_per_shard: how many rows a shard has; the last one may have fewer.

    Raises:
        DataError: with every problem of every row.
    """
    assert 0 < rows_per_shard <= MAX_SHARD_ROWS
    shards: list[Shard] = []
    problems: list[Problem] = []
    keys: set[str] = set()
    count = RowCount()
    waiting: list[bytes] = []
    digest = _Digest(key, 0)

    def close() -> None:
        nonlocal digest
        first_row = len(shards) * rows_per_shard
        shard = Shard(number=len(shards), first_row=first_row, rows=len(waiting), key=digest.key())
        if parts.finished(shard) is None or not parts.rows_file(shard.number).exists():
            write_bytes(parts.rows_file(shard.number), b"".join(waiting))
        shards.append(shard)
        waiting.clear()
        digest = _Digest(key, first_row + shard.rows)

    for row in reader.rows(count):
        record = reader.convert(row)
        if not isinstance(record, Record):
            count.rejected += 1
            problems += record
            continue
        count.accepted += 1
        task = assign_task(record, tasks)
        if isinstance(task, Problem):
            problems.append(task)
            continue
        keys |= record.raw.keys()
        if not problems:  # else nothing is answered, and the rows are read only to find all that is wrong
            line = encode_row(RawRow(source=record.source, value=record.raw))
            digest.add(line, record)
            waiting.append(line + b"\n")
            if len(waiting) == rows_per_shard:
                close()
    count.check()
    if count.rejected:
        refuse_problems(name, count, problems)
    if problems:
        raise DataError(f"{len(problems)} of {count.read} rows fit none of the tasks.", problems)
    if waiting:
        close()
    return LaidAside(shards=shards, rows=count.accepted, keys=frozenset(keys))


def find_damage(parts: Parts, shards: Sequence[Shard]) -> dict[int, str]:
    """By the number of the shard, what is wrong with its answers; empty when each row has exactly one.

    Every row's answer is looked for: a line each, in the order of the rows, with the row's own source.
    """
    return {shard.number: wrong for shard in shards if (wrong := _damage_of(parts, shard))}


def join(parts: Parts, shards: Sequence[Shard], out: Path) -> None:
    """Put the answers of all `shards`, none of them damaged, into the file `out`, in order."""
    with replacing(out) as stream:
        for shard in shards:
            stream.write(parts.answers_file(shard.number).read_bytes())


def _damage_of(parts: Parts, shard: Shard) -> str:
    manifest = parts.finished(shard)
    if manifest is None:
        return "it is not finished"
    data = parts.answers_file(shard.number).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        return "it is not what was written"
    rows = [json.loads(line)[0] for line in parts.rows_file(shard.number).read_bytes().splitlines()]
    return _compare(rows, [json.loads(line)["source"] for line in data.splitlines()])


def _compare(rows: Sequence[str], answers: Sequence[str]) -> str:
    """In words, where `answers` are not those of `rows`, one each and in order; "" where they are."""
    if rows == answers:
        return ""
    missing = [row for row in rows if row not in answers]
    twice = [row for row in dict.fromkeys(answers) if answers.count(row) > 1]
    said = [
        f"{len(found)} rows {what}: {', '.join(found[:_NAMED])}{' and others' if len(found) > _NAMED else ''}"
        for found, what in ((missing, "have no answer"), (twice, "have several"))
        if found
    ]
    return "; ".join(said) or "its answers stand in another order than the rows"


class _Digest:
    """Builds the key of a shard while its rows are read."""

    def __init__(self, key: str, first_row: int) -> None:
        self._digest = hashlib.sha256(json.dumps([key, first_row]).encode())

    def add(self, line: bytes, record: Record) -> None:
        self._digest.update(line.rstrip(b"\n") + b"\n" + digested_line(record))

    def key(self) -> str:
        return self._digest.hexdigest()


def _record_of(line: bytes, reader: LikeReader) -> Record:
    text = line.decode("utf-8", "surrogatepass")
    source, value = json.loads(text)
    record = reader.convert(RawRow(source=source, value=value, marked=may_hold_placeholders(text)))
    assert isinstance(record, Record), f"{source} was a record when it was read and is none now: {record}"
    return record


def _other_folder(path: Path) -> str:
    return (
        f"{path} is not on {platform.node()} what it is where the rows were read. Workers on several machines need the "
        f"rows' folder, the run and the answers on storage that all of them see under the same path."
    )
