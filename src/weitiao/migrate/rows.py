"""The rows of an original: where they lie, how many they are, and what follows from their number.

An original counts optimiser steps where weitiao counts passes over the rows, so that some settings need the rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from ..data.files import iter_raw_rows
from ..data.options import ReadOptions
from ..data.raw_rows import RowCount
from ..data.records import iter_records_or_problems
from ..errors import DataError, RecipeError
from .ledger import Ledger, Wishes

_HUBS = ("hf:", "modelscope:")


def _located(path: str, folder: Path) -> str:
    """`path` as it can be used from here: itself where something lies there, else beside the file that names it."""
    if lies_here(path):
        return path
    beside = os.path.normpath(folder / path)
    return beside if lies_here(beside) else path


def lies_here(path: str) -> bool:
    """Whether a file or folder is there; of an entry of ``dataset_info.json#NAME``, the list."""
    return os.path.exists(path.partition("#")[0])


def carry_rows(
    ledger: Ledger,
    wishes: Wishes,
    *,
    train: tuple[str, ...],
    train_paths: Sequence[str],
    dev: tuple[str, ...] = (),
    dev_paths: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> None:
    """``data.train`` and ``data.dev``: the original's own files, or those of the user's wishes instead.

    Args:
        ledger: where it is written down.
        wishes: what the user says.
        train: the settings that name the train rows.
        train_paths: what they name.
        dev: the settings that name the dev rows.
        dev_paths: what they name.
        options: further keys of every source, such as its prompt.
    """
    # a folder given instead of files holds the files that the original names
    folder = wishes.data[0] if len(wishes.data) == 1 and os.path.isdir(wishes.data[0]) and train_paths else None
    named = [_located(path, ledger.folder) for path in train_paths]
    chosen = wishes.data if wishes.data and folder is None else tuple(named)
    dev_named = tuple(_located(path, ledger.folder) for path in dev_paths)
    scored = wishes.dev or (dev_named if not wishes.data or folder is not None else ())
    if folder is not None:
        chosen = tuple(os.path.join(folder, os.path.basename(path)) for path in chosen)
        scored = wishes.dev or tuple(os.path.join(folder, os.path.basename(path)) for path in scored)
    if not chosen:
        ledger.ask("The file does not say which rows are learnt. Say it: --data FILE (and --dev FILE).")
        return
    instead = "in the folder of --data" if folder is not None else "--data instead" if wishes.data else ""
    ledger.carry(train, "data.train", [{"path": path, **(options or {})} for path in chosen], instead)
    if scored:
        said = "--dev instead" if wishes.dev else instead if folder is not None else ""
        ledger.carry(dev, "data.dev", [{"path": path, **(options or {})} for path in scored], said)
    else:
        for key in dev:
            ledger.leave(key, "other rows were given with --data, and no --dev with them")
    for path in (*chosen, *scored):
        if not path.startswith(_HUBS) and not lies_here(path):
            ledger.note(f"{path} does not lie here. Change the path in the recipe before training.")


def count_rows(ledger: Ledger, wishes: Wishes) -> int | None:
    """How many rows are learnt per pass, those held out aside; None where it is not known."""
    sources = ledger.lines.get("data.train")
    if wishes.rows is not None:
        count = wishes.rows
    elif sources is None:
        return None
    else:
        count = 0
        for source in sources.value:
            rows = _count(str(source["path"]))
            if rows is None:
                return None
            count += min(rows, source.get("limit", rows))
    held = ledger.lines.get("data.held_out")
    share = 0.0 if "data.dev" in ledger.lines or held is None else float(held.value)
    return count - round(count * share)


def _count(path: str) -> int | None:
    if path.startswith(_HUBS):
        return None
    count = RowCount()
    # entries of a list are read as records, which takes longer: nothing below knows their columns
    rows = iter_records_or_problems(path, count=count) if "#" in path else iter_raw_rows(path, ReadOptions(), count)
    try:
        deque(rows, maxlen=0)
    except (DataError, OSError):
        return None
    return count.read


def carry_steps(ledger: Ledger, wishes: Wishes, key: str, steps: int) -> None:
    """``train.epochs`` for a number of optimiser steps, so that weitiao takes exactly as many."""
    rows = count_rows(ledger, wishes)
    if not rows:
        ledger.ask(
            f"{ledger.spelled(key)} counts steps, weitiao counts passes over the rows, and the rows do not lie here. "
            f"Say where they are (--data FILE), or how many (--rows N)."
        )
        return
    batch = ledger.lines["train.batch_size"].value
    per_pass = ceil(rows / batch)
    whole, rest = divmod(steps, per_pass)
    epochs = whole + round(rest / per_pass, 6) if rest else whole
    ledger.carry(key, "train.epochs", epochs, f"{rows:,} rows in steps of {batch} make {per_pass:,} steps a pass")
    if whole >= 20:
        ledger.note(
            f"{ledger.spelled(key)} makes {epochs:.0f} passes over {rows:,} rows: few rows need so many, and a model "
            f"forgets by it. weitiao check RECIPE --plan tells the time it takes."
        )


def carry_warmup(ledger: Ledger, wishes: Wishes, key: str, steps: int) -> None:
    """``train.warmup`` for a number of warm-up steps."""
    epochs, batch = ledger.lines.get("train.epochs"), ledger.lines["train.batch_size"].value
    rows = count_rows(ledger, wishes)
    if epochs is None or not rows:
        ledger.ask(
            f"{ledger.spelled(key)} counts steps, weitiao takes a share of all steps, and the rows do not lie here. "
            f"Say where they are (--data FILE), or how many (--rows N)."
        )
        return
    total = max(1, round(epochs.value * ceil(rows / batch)))
    if steps >= total:
        raise RecipeError(f"{ledger.spelled(key)} is no part of the {total} steps of the training. Lower it.")
    ledger.carry(key, "train.warmup", round(steps / total, 6), f"of {total:,} steps")
