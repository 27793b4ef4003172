"""Which rows make up each optimiser step, how many steps there are, and which rows share a pass: arithmetic alone.

The order is a pure function of seed and epoch, so a resumed run sees what it would have seen, and a check foretells
without torch what training will do. Knows rows by their places and lengths only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence


def epoch_order(weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """The rows of one epoch in random order: a row of weight 2 twice, of weight 0.5 in every other epoch.

    A fractional row's epochs are evenly spaced from a random first one, so a few epochs cannot miss it by chance.

    Args:
        weights: for each row, how often it is seen per epoch.
        seed: the run's seed.
        epoch: number of the epoch, from 0.
    """
    phases = random.Random(f"{seed}/phases")
    order = [row for row, weight in enumerate(weights) for _ in range(_times(weight, epoch, phases.random()))]
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def bring_together(order: Sequence[int], groups: Sequence[int], *, most: int) -> list[int]:
    """The rows of `order` with those of one group one after another, at most so many of them in one place.

    They stand where their first one stood: ``[4, 0, 5, 1, 2]`` with 0, 1 and 2 in a group → ``[4, 0, 1, 5, 2]`` when
    at most two stand together.

    Args:
        order: rows.
        groups: for each row the number of its group; below 0 for none.
        most: how many rows of a group stand together, from 1.
    """
    pieces: list[list[int]] = []
    latest: dict[int, list[int]] = {}
    for row in order:
        piece = latest.get(groups[row]) if groups[row] >= 0 else None
        if piece is None or len(piece) == most:
            piece = latest[groups[row]] = []
            pieces.append(piece)
        piece.append(row)
    return [row for piece in pieces for row in piece]


def epoch_sizes(weights: Sequence[float], *, seed: int, epochs: int) -> list[int]:
    """For each of the first `epochs` epochs, how many rows `epoch_order` gives it, without drawing the order."""
    sizes = [sum(map(int, weights))] * epochs
    if any(weight % 1 for weight in weights):
        phases = random.Random(f"{seed}/phases")
        for weight in weights:
            phase = phases.random()
            for epoch in range(epochs) if weight % 1 else ():
                sizes[epoch] += _times(weight, epoch, phase) - int(weight)
    return sizes


def _times(weight: float, epoch: int, phase: float) -> int:
    """How often a row is seen in `epoch`: over any epochs in a row, their number times `weight`, rounded."""
    share = weight % 1
    return int(weight) + math.floor((epoch + 1) * share + phase) - math.floor(epoch * share + phase)


def step_rows(
    weights: Sequence[float], *, batch_size: int, seed: int, first_step: int, groups: Sequence[int] | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Endless ``(epoch, rows)`` of the optimiser steps, from step number `first_step` on. No row is ever left over.

    With `groups`, a number for each row or -1, those of one group are brought together, see `bring_together`.
    """
    step, epoch = 0, 0
    while True:
        order = epoch_order(weights, seed=seed, epoch=epoch)
        if groups is not None:
            order = bring_together(order, groups, most=batch_size)
        for start in range(0, len(order), batch_size):
            if step >= first_step:
                yield epoch, order[start : start + batch_size]
            step += 1
        epoch += 1


def num_steps(weights: Sequence[float], *, batch_size: int, seed: int, epochs: float) -> int:
    """Optimiser steps in `epochs` epochs, the last one perhaps a part."""
    whole = int(epochs)
    sizes = epoch_sizes(weights, seed=seed, epochs=whole + (epochs > whole))
    per_epoch = [-(-size // batch_size) for size in sizes]
    return max(1, sum(per_epoch[:whole]) + round((epochs - whole) * (per_epoch[-1] if epochs > whole else 0)))


def share_rows(lengths: Sequence[int], *, parts: int) -> list[list[int]]:
    """The places of a step's rows in `parts` shares of about as many tokens; some are empty where rows are few.

    Longest first, each to the share that has least: ``[900, 300, 700, 400]`` in two → ``[[0, 1], [2, 3]]``.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        least = sums.index(min(sums))
        shares[least].append(place)
        sums[least] += lengths[place]
    return [sorted(share) for share in shares]


def share_passes(lengths: Sequence[int], *, tokens_per_pass: int) -> list[list[int]]:
    """The places of a step's rows in as few passes as fit `tokens_per_pass`; a longer row gets a pass of its own.

    First fit, longest first: ``[900, 300, 700]`` with room for 1,200 → ``[[0, 1], [2]]``.
    """
    passes: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        fitting = next((number for number, free in enumerate(room) if free >= lengths[place]), None)
        if fitting is None:
            passes.append([place])
            room.append(tokens_per_pass - lengths[place])
        else:
            passes[fitting].append(place)
            room[fitting] -= lengths[place]
    return passes
