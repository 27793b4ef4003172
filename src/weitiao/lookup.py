"""Rows that learn with their nearest neighbours before them: the train rows looked up for every row of a data set.

What `data.retrieve` asks for. The same index answers in training and in use, so it is kept with the run.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from .data.neighbours import NeighbourIndex
from .dataset import Dataset
from .prompting import labelled_limits
from .recipe import Recipe
from .render.base import Renderer
from .render.shots import add_neighbours


def look_up(recipe: Recipe, dataset: Dataset, renderer: Renderer) -> tuple[Dataset, NeighbourIndex, list[str]]:
    """`dataset` with the `data.retrieve` nearest train rows before each row, the index of these, and what to tell.

    A train row is never shown itself or a near repeat of it. The rows lie in memory, however many there are. The
    fingerprint is that of the rows as they are shown.
    """
    index = NeighbourIndex.build(dataset.train, groups=[task.name for task in dataset.train_tasks])
    limits = labelled_limits(
        [*dataset.train, *dataset.dev], [*dataset.train_tasks, *dataset.dev_tasks], renderer, recipe.generate
    )
    room = {name: recipe.data.max_length - limit for name, limit in limits.items()}
    k = recipe.data.retrieve
    train = add_neighbours(
        dataset.train, dataset.train_tasks, index, k, exclude_self=True, renderer=renderer, room=room
    )
    dev = add_neighbours(dataset.dev, dataset.dev_tasks, index, k, exclude_self=False, renderer=renderer, room=room)
    notes = [f"{side} rows: {note}" for side, shown in (("train", train), ("dev", dev)) for note in shown.notes()]
    print_of = hashlib.sha256(f"{dataset.fingerprint}/{k}/{index.fingerprint}".encode()).hexdigest()
    return replace(dataset, train=train.records, dev=dev.records, fingerprint=print_of), index, notes
