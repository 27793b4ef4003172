"""What all trainings of a search share: rows read once where they can be, a log in each one's folder, the memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from ..dataset import Dataset, load_dataset
from ..errors import RunError
from ..recipe import Recipe
from ..runs import RunFolder, clear_leftovers, writing

_NOT_OF_ROWS = ("max_length", "overlong", "turns", "loss_mask", "retrieve")
"""Settings of the recipe's part on data that read rows do not depend on."""


def open_folder(folder: Path, what: str, *, sign: str, resume: bool) -> Path:
    """The folder of several trainings, made when it is new.

    Args:
        folder: where it is or will be.
        what: what it holds, such as ``search``.
        sign: the file in it that says that one was begun.
        resume: whether one goes on.

    Raises:
        RunError: one was begun and is not to go on, there is none to go on, or it cannot be written.
    """
    begun = (folder / sign).exists()
    if begun and not resume:
        raise RunError(
            f"{folder} already holds a {what}. Go on with --resume, give another name with name=OTHER, or delete it."
        )
    if resume and not begun:
        raise RunError(f"There is no {what} to resume in {folder}. Start it without --resume.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
    return folder


class TrialRows:
    """The rows of the trainings' recipes, read once for all whose settings on rows are the same."""

    def __init__(self, recipe: Recipe, dataset: Dataset | None) -> None:
        """`dataset` is what `load_dataset` made of `recipe`, where that was read already."""
        self._read = {} if dataset is None else {self._key(recipe): dataset}

    def of(self, recipe: Recipe) -> Dataset:
        """Raises DataError as `load_dataset`."""
        key = self._key(recipe)
        if key not in self._read:
            self._read[key] = load_dataset(recipe)
        return self._read[key]

    @staticmethod
    def _key(recipe: Recipe) -> str:
        plain = recipe.model_dump(mode="json")
        data = {key: value for key, value in plain["data"].items() if key not in _NOT_OF_ROWS}
        return json.dumps([data, plain["tasks"], recipe.train.seed, recipe.rows_seed], sort_keys=True)


def free_memory() -> None:
    """Give back what the last training held: models refer to themselves, and a GPU's memory is kept by torch."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def logging(run: RunFolder) -> Iterator[Console]:
    """A console that adds to ``training.log`` in the folder of `run`, which is made where it is not there."""
    with writing(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        stream = (run.path / "training.log").open("a", encoding="utf-8")
    with stream:
        yield Console(file=stream, width=120, markup=False, emoji=False, highlight=False)
