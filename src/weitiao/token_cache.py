"""Rows tokenised once: the examples of many rows are kept on the disk, under the fingerprint of all they depend on.

    fitted, note = fit_side(recipe.data, dataset, "train", renderer, model=folder)

Rows, their forms, tokenizer, chat template, length policy and the versions of what tokenises make the key; another of
any of them is another folder. A folder appears whole, under its name, or not at all: it is filled under another name,
flushed to the disk and renamed. Of several processes that start at once, one tokenises and the others wait and read.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow
from filelock import FileLock, Timeout

from .cache import cache_folder
from .data.record_store import keeping, pack_rows, select_rows
from .data.records import Record
from .dataset import Dataset
from .errors import Problem
from .recipe import Data
from .render.base import Renderer
from .render.example_store import ExampleStore, ExampleWriter
from .render.fitting import CHUNK_ROWS, FittedChunk, FittedRows, Fitting, fit_chunk, fit_rows, refuse_problems
from .render.spelling import spelling_note
from .runs import sync
from .tasks.base import Task

Side = Literal["train", "dev"]

MOST_SETS = 6
"""Sets of examples that are kept; the one that was longest not used goes when a new one comes."""

KEPT_FROM = 5_000
"""Fewer rows are tokenised anew each time, within a second, and kept in memory."""

_EXAMPLES, _INDEX = "examples.arrow", "index.json"
_LAYOUT = 2
"""Of the files; another one makes other keys."""
_ROOM = "They need four bytes a token; everything in that folder may be deleted."
_THREADS = 2
"""While one chunk is tokenised, which takes no Python, the next is read and rendered. What takes Python is half of the
work and can be done by one thread at a time, so that more threads would only wait."""

_LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedRows:
    """Examples in the cache."""

    fitted: FittedRows
    found: bool
    """Whether they were there already."""
    folder: Path


def fit_side(
    data: Data, dataset: Dataset, side: Side, renderer: Renderer, *, model: Path, folder: Path | None = None
) -> tuple[FittedRows, str]:
    """The examples of the dataset's train or dev rows, and what there is to say of them, a line each.

    That is a note on answers which the tokenizer spells otherwise, and a sentence on the cache where it was used.

    Args:
        data: the recipe's part that sets the length policy.
        dataset: the rows.
        side: which of them.
        renderer: the model's chat format.
        model: the model's folder, for its tokenizer's fingerprint.
        folder: of the cache; by default ``tokens`` in `cache_folder`.

    Raises DataError as `fit_rows`, or when the disk is full.
    """
    records, tasks = (dataset.train, dataset.train_tasks) if side == "train" else (dataset.dev, dataset.dev_tasks)
    note = spelling_note(records, tasks, renderer)
    how = Fitting(
        renderer=renderer,
        max_length=data.max_length,
        overlong=data.overlong,
        turns=data.turns,
        masks=data.loss_mask,
    )
    if len(records) < KEPT_FROM:
        fitted = fit_rows(
            records,
            tasks,
            renderer,
            max_length=how.max_length,
            overlong=how.overlong,
            turns=how.turns,
            masks=how.masks,
        )
        return fitted, note
    key = token_key(
        rows=f"{side} of {dataset.fingerprint}",
        tasks=dataset.tasks,
        row_tasks=tasks,
        how=how,
        tokenizer=fingerprint_tokenizer(model),
        reading=[[source.format, source.prompt, source.system] for source in (*data.train, *data.dev)],
    )
    started = time.monotonic()
    as_written = dataset.train_as_written if side == "train" else dataset.dev_as_written
    place = folder or cache_folder() / "tokens"
    made = fit_or_open(records, tasks, how, folder=place, key=key, as_written=as_written)
    many = f"{len(made.fitted.examples):,} {side} examples"
    if made.found:
        said = f"{many}: tokenised rows from the cache, {made.folder}"
    else:
        said = f"{many} tokenised in {time.monotonic() - started:.0f} s and kept in {made.folder}"
    return made.fitted, f"{note}\n{said}" if note else said


def token_key(
    *, rows: str, tasks: Sequence[Task], row_tasks: Sequence[Task], how: Fitting, tokenizer: str, reading: object = None
) -> str:
    """The key of a set of examples: a SHA-256 that is another one when anything the examples depend on is another.

    Args:
        rows: fingerprint of the rows, in order.
        tasks: all tasks, their forms among them.
        row_tasks: for each row its task.
        how: chat format and length policy.
        tokenizer: fingerprint of the tokenizer's files.
        reading: what else of the recipe decides where a row's text stands; JSON.
    """
    number = {id(task): place.to_bytes(2, "little") for place, task in enumerate(tasks)}
    digest = hashlib.sha256(b"".join([number[id(task)] for task in row_tasks]))
    parts = {
        "layout": _LAYOUT,
        "rows": rows,
        "tasks": [task.to_json() for task in tasks],
        "row tasks": digest.hexdigest(),
        "tokenizer": tokenizer,
        "template": how.renderer.template,
        "stop ids": list(how.renderer.stop_ids),
        "length": [how.max_length, how.overlong, how.turns, how.masks],
        "reading": reading,
        "versions": [version(name) for name in ("weitiao", "transformers", "tokenizers")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_tokenizer(folder: Path) -> str:
    """SHA-256 over a model folder's small files: tokenizer, vocabulary, chat template, configuration."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".tiktoken", ".txt") and not file.name.endswith(".index.json"):
            digest.update(f"{file.name}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def fit_or_open(
    records: Sequence[Record],
    tasks: Sequence[Task],
    how: Fitting,
    *,
    folder: Path,
    key: str,
    as_written: Sequence[int] = (),
) -> TokenisedRows:
    """The examples of `records` from the cache in `folder`; made first, on all cores, where they are not there.

    `as_written` as `fit_chunk` takes it.

    Raises:
        DataError: rows too long for the policy, all of them named, and then nothing is kept; or a full disk.
    """
    place = folder / key[:32]
    with keeping("Tokenised rows could not be kept", folder, room=_ROOM):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{place.name}.lock"):
            found = _open(place, records)
            if found is None:
                _make(place, fit_in_threads(records, tasks, how, as_written=as_written), len(records), how.max_length)
            else:
                os.utime(place)
    if found is None:
        opened = _open(place, records)
        assert opened is not None, f"{place} was just written and cannot be read"
        _forget_oldest(folder, but=place)
        return TokenisedRows(fitted=opened, found=False, folder=place)
    return TokenisedRows(fitted=found, found=True, folder=place)


def fit_in_threads(
    records: Sequence[Record],
    tasks: Sequence[Task],
    how: Fitting,
    *,
    chunk_rows: int = CHUNK_ROWS,
    as_written: Sequence[int] = (),
) -> Iterator[FittedChunk]:
    """What `fit_chunk` makes of each part of `records`, in order; at most a few parts are held at a time."""

    def fit(start: int) -> FittedChunk:
        end = min(start + chunk_rows, len(records))
        rows = pack_rows(records, range(start, end))
        return fit_chunk(start, rows, tasks[start:end], how, as_written=as_written[start:end])

    waiting: deque[Future[FittedChunk]] = deque()
    pool = ThreadPoolExecutor(max_workers=_THREADS)
    collecting, said = gc.isenabled(), os.environ.get(_LIBRARY_THREADS)
    gc.disable()  # nothing here refers to itself, and looking for what does took a fifth of the time
    os.environ[_LIBRARY_THREADS] = (
        "false"  # each of our threads keeps a core busy: threads within them cost a fifth more
    )
    try:
        for start in range(0, len(records), chunk_rows):
            waiting.append(pool.submit(fit, start))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if collecting:
            gc.enable()
        if said is None:
            del os.environ[_LIBRARY_THREADS]
        else:
            os.environ[_LIBRARY_THREADS] = said


# ---- on the disk ------------------------------------------------------------------------------------------------


def _make(place: Path, chunks: Iterator[FittedChunk], num_rows: int, max_length: int) -> None:
    """Fill the folder `place` under another name, then rename it. The caller holds its lock."""
    _clear_leftovers(place)
    shutil.rmtree(place, ignore_errors=True)  # what is there could not be opened
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".tmp-{place.name}-"))
    try:
        index = _write_examples(temporary / _EXAMPLES, chunks, num_rows, max_length)
        sync(temporary / _EXAMPLES)
        (temporary / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        sync(temporary / _INDEX)
        sync(temporary)
        temporary.rename(place)
        sync(place.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_examples(path: Path, chunks: Iterator[FittedChunk], num_rows: int, max_length: int) -> dict[str, Any]:
    """Write all examples to `path`; returns what the index says of them."""
    problems: list[Problem] = []
    dropped: list[int] = []
    shortened: list[tuple[int, int]] = []
    with ExampleWriter(path) as writer:
        for chunk in chunks:
            writer.add(chunk.examples, chunk.rows)
            problems += chunk.problems
            dropped += chunk.dropped
            shortened += [(place, len(record.text)) for place, record in chunk.shortened.items()]
        refuse_problems(problems, num_rows, max_length)
    size = path.stat().st_size
    return {"rows": num_rows, "bytes": size, "dropped": dropped, "shortened": shortened}


def _open(place: Path, records: Sequence[Record]) -> FittedRows | None:
    """The examples in the folder `place`; None when they are not there, or not as they were written."""
    try:
        index = json.loads((place / _INDEX).read_text(encoding="utf-8"))
        whole = index["bytes"] == (place / _EXAMPLES).stat().st_size and index["rows"] == len(records)
        examples = ExampleStore(place / _EXAMPLES) if whole else None
        dropped = set(index["dropped"])
        texts = dict(index["shortened"])
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException):
        return None
    if examples is None:
        return None
    kept: Sequence[int] = range(len(records))
    if dropped:
        kept = [row for row in kept if row not in dropped]
    return FittedRows(
        examples=examples,
        rows=examples.rows,  # type: ignore[arg-type]  # an array of numbers is all that is asked of it
        records=_ShortenedRows(records, kept, texts) if texts else select_rows(records, kept),
        kept=kept,
        dropped=tuple(records[row].source for row in sorted(dropped)),
        shortened=tuple(records[row].source for row in texts),
    )


class _ShortenedRows(Sequence[Record]):
    """Rows of which some have lost the end of their text."""

    def __init__(self, rows: Sequence[Record], kept: Sequence[int], texts: Mapping[int, int]) -> None:
        self._rows, self._kept, self._texts = rows, kept, texts

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return _ShortenedRows(self._rows, self._kept[place], self._texts)
        row = self._kept[place]
        record = self._rows[row]
        return record.with_text(record.text[: self._texts[row]]) if row in self._texts else record


def _clear_leftovers(place: Path) -> None:
    """Remove what killed processes left half-written beside `place`, whose lock the caller holds."""
    for leftover in place.parent.glob(".tmp-*"):
        key = leftover.name.split("-")[1]
        if key == place.name:
            shutil.rmtree(leftover)
            continue
        with suppress(Timeout), FileLock(place.parent / f"{key}.lock", timeout=0):  # else its writer is at work
            shutil.rmtree(leftover)


def _forget_oldest(folder: Path, *, but: Path) -> None:
    """Remove the sets that were longest not used, past `MOST_SETS`. Whoever reads one still has its file mapped."""
    sets = [each for each in folder.iterdir() if each != but and (each / _INDEX).exists()]
    sets.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    for old in sets[MOST_SETS - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
