"""Data sets of the Hugging Face hub and of ModelScope, by id.

    hf:OWNER/NAME            the split train, through the `datasets` package, row by row
    hf:OWNER/NAME:SPLIT
    modelscope:OWNER/NAME    the files of the data set, through the `modelscope` package, of the split if one is named

The packages are imported here and nowhere else, when an id asks for them. No code of a data set is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from weitiao.data.raw_rows import RawRow, RowCount, row_of_values
from weitiao.errors import DataError

MODELSCOPE = "modelscope:"
_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?")


def iter_hugging_face_rows(name: str, count: RowCount) -> Iterator[RawRow]:
    """Each row of ``hf:OWNER/NAME[:SPLIT]``; its place is ``hf:OWNER/NAME:SPLIT:row N``."""
    owner_and_name, split = _read_id(name, "hf:")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} needs the package datasets: pip install 'weitiao[hub]'") from None
    split = split or "train"
    number = 0
    rows: Iterator[dict[str, object]] | None = None
    while True:
        try:
            if rows is None:
                rows = iter(datasets.load_dataset(owner_and_name, split=split, streaming=True))
            row = next(rows, None)
        except Exception as error:  # noqa: BLE001 - hub, network and file readers raise dozens of unrelated types
            raise DataError(
                f"{name} cannot be read from the Hugging Face hub at row {number + 1} "
                f"({type(error).__name__}: {_first_line(error)}). Check the id, the split {split} and the network."
            ) from None
        if row is None:
            break
        number += 1
        count.read += 1
        yield row_of_values(row, f"hf:{owner_and_name}:{split}:row {number}")
    if number == 0:
        raise DataError(f"{name} holds no rows. Name another split: hf:{owner_and_name}:SPLIT")


def modelscope_files(name: str, endings: Sequence[str]) -> list[str]:
    """The files of rows of ``modelscope:OWNER/NAME[:SPLIT]``, fetched, by name.

    With a split only those whose path names it (``train.jsonl``, ``data/train-00000.parquet``).
    """
    owner_and_name, split = _read_id(name, MODELSCOPE)
    try:
        from modelscope import dataset_snapshot_download
    except ImportError:
        raise DataError(f"{name} needs ModelScope's client: pip install 'weitiao[modelscope]'") from None
    try:
        folder = Path(dataset_snapshot_download(owner_and_name))
    except Exception as error:  # noqa: BLE001 - as above
        raise DataError(
            f"{name} could not be fetched from ModelScope ({type(error).__name__}: {_first_line(error)}). "
            f"Check the spelling and the network."
        ) from None
    found = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.lower().endswith(tuple(endings))
    ]
    inside = {path: path.relative_to(folder) for path in found}
    visible = [path for path, place in inside.items() if not any(part.startswith(".") for part in place.parts)]
    ours = [
        path for path in visible if path.name not in ("dataset_infos.json", "configuration.json", "dataset_info.json")
    ]
    chosen = [path for path in ours if split is None or split in re.split(r"[^A-Za-z0-9]+", str(inside[path]))]
    if not chosen:
        listed = ", ".join(str(inside[path]) for path in ours[:8]) or "none"
        raise DataError(
            f"{name} holds no file of rows{f' for the split {split}' if split else ''}. Its files: {listed}."
        )
    return [os.fspath(path) for path in chosen]


def _read_id(name: str, prefix: str) -> tuple[str, str | None]:
    found = _ID.fullmatch(name.removeprefix(prefix))
    if found is None:
        raise DataError(f"{name} is no id of a data set. Write {prefix}OWNER/NAME or {prefix}OWNER/NAME:SPLIT.")
    return found["name"], found["split"]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next(filter(None, lines), type(error).__name__).rstrip(".:")[:200]
