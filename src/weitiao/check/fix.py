"""`weitiao check --fix`: mended copies of the checked files and lists of what was done; the files stay as they are.

weitiao check rows.jsonl --fix mended.jsonl     mended.jsonl, mended.changes.log
weitiao check recipe.yaml --fix mended          mended/train.jsonl, mended/train.changes.log, mended/dev.jsonl, …

Joins the examination (check.py) and the mender (data/mend.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..data.mend import Change, mend_rows
from ..data.records import Record
from ..errors import RecipeError
from ..recipe import Data, Source
from ..runs import writing
from .checkup import Checkup
from .examine import Subject, read_source


@dataclass(frozen=True, kw_only=True, slots=True)
class Mended:
    """One mended copy."""

    original: str
    copy: Path
    list_of_changes: Path
    rows: int
    """Rows in the copy."""
    changes: tuple[Change, ...]


def mend_files(subject: Subject, checkup: Checkup, out: Path) -> list[Mended]:
    """Write a mended copy of each file of `subject`: to the file `out`, or into the folder `out` of several.

    Raises:
        RecipeError: a file to be written is there already; RunError: it cannot be written.
    """
    data = subject.recipe.data
    sources = [*data.train, *data.dev]
    copies = [out] if len(sources) == 1 and not out.is_dir() else _names_in(out, sources)
    for copy in copies:
        for file in (copy, _list_beside(copy)):
            if file.exists():
                raise RecipeError(f"{file} exists already. Choose another place for --fix: nothing is overwritten.")
    return [_mend_file(source, data, checkup, copy) for source, copy in zip(sources, copies, strict=True)]


def describe_changes(mended: Mended) -> str:
    """What was done to one file, in a sentence: ``2 rows dropped, 3 answers rewritten``."""
    words = {
        "dropped": ("row dropped", "rows dropped"),
        "answer": ("answer rewritten", "answers rewritten"),
        "text": ("piece of text replaced", "pieces of text replaced"),
        "not mended": ("answer that could not be found in its row", "answers that could not be found in their rows"),
    }
    counts = {what: sum(change.what == what for change in mended.changes) for what in words}
    told = [f"{count:,} {words[what][count != 1]}" for what, count in counts.items() if count]
    return ", ".join(told) or "nothing to mend"


def _mend_file(source: Source, data: Data, checkup: Checkup, copy: Path) -> Mended:
    beside = _list_beside(copy)
    with writing(copy), ExitStack() as stack:
        copy.parent.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context(_appearing(copy))
        num_rows, changes = mend_rows(_items(source, data), checkup.findings, lambda line: stream.write(line + "\n"))
        listed = stack.enter_context(_appearing(beside))
        for change in changes:
            listed.write(json.dumps(change.to_json(), ensure_ascii=False) + "\n")
    return Mended(original=source.path, copy=copy, list_of_changes=beside, rows=num_rows, changes=changes)


def _items(source: Source, data: Data) -> Iterator[Record | str]:
    """Each row once: its record, or its place where it cannot be read."""
    before = ""
    for item in read_source(source, data):
        if isinstance(item, Record):
            yield item
        elif item.source != before:  # a bad row may have several problems, which come one after the other
            yield item.source
        before = item.source


@contextmanager
def _appearing(path: Path) -> Iterator[IO[str]]:
    """A text stream into a file that appears under its name only when it is whole."""
    partial = path.with_name(f".tmp-{path.name}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _names_in(folder: Path, sources: list[Source]) -> list[Path]:
    """A name of its own for the copy of each source: its stem, numbered where several have the same."""
    names: list[str] = []
    for source in sources:
        stem = Path(source.path).name.partition(".")[0] or "rows"
        taken = sum(name.partition("-")[0] == stem for name in names)
        names.append(f"{stem}-{taken + 1}" if stem in names else stem)
    return [folder / f"{name}.jsonl" for name in names]


def _list_beside(copy: Path) -> Path:
    """The list's file: JSON lines, under an ending that keeps it from being read as rows."""
    return copy.with_name(f"{copy.stem}.changes.log")
