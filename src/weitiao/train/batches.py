"""How the rows of an optimiser step are laid out in memory; which rows they are is `data/order.py`'s business.

They are laid end to end (packed): no padding, no mask, and the result does not depend on how they were cut into passes.
What several rows begin with alike may be laid out once (`prompt_trees.py`): neither does the result depend on that.

Shapes: T tokens of one forward pass, R rows or segments of rows in it, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..data.order import share_passes
from ..errors import ModelError
from ..models.prefix_lm import RowPrefix
from ..render.base import Example
from ..render.example_store import lengths_of
from .prompt_trees import Segment, num_tokens, plain_rows, share_trees

ROUND_TOKENS = 128
"""Passes of few different lengths: oneDNN compiles a kernel for every new shape and keeps it. On 2 AMX cores this made
steps a tenth faster and took 0.3 GB less memory after ten of them."""

LEAST_SAVED = 0.25
"""Beginnings are shared where that saves this share of a step's tokens. Short instructions save less, in some steps and
not in others: too little for smaller products in attention, and for compiling layers once more."""

TellPrefix = Callable[[Sequence[int]], RowPrefix | None]
"""The context of a row of tokens, as the model has it; None for models that read from left to right."""

_NO_CONTEXT = RowPrefix(num_tokens=0, mask_position=0)
"""That of the row which fills up a pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One forward pass: rows end to end, and the positions that count.

    Two rows ``[2, 7, 5]`` (last token learnt) and ``[2, 9, 8, 1]`` (last two learnt):
    ``token_ids [[2, 7, 5, 2, 9, 8, 1]]``, ``positions [[0, 1, 2, 0, 1, 2, 3]]``, ``row_starts [0, 3, 7]``,
    ``predictors [1, 4, 5]``, ``targets [5, 8, 1]``. For a prefix language model that sees two tokens of the first and
    three of the second as their contexts, and has its mask token at their ends: ``positions [[[0, 1, 1, 0, 1, 2, 2],
    [0, 0, 1, 0, 0, 0, 1]]]``, ``row_prefixes [2, 3]``.
    """

    num_tokens: int
    """Tokens of its rows, each counted whole. `token_ids` holds a few more where the pass is filled up to a round
    number, and fewer where rows share their beginnings."""
    token_ids: Tensor
    """``[1, T]``."""
    positions: Tensor
    """``[1, T]``, from 0 in every row; ``[1, 2, T]`` for prefix language models."""
    row_starts: Tensor
    """``[R + 1]`` offsets of the rows, or of the segments that they share; stays on the CPU."""
    predictors: Tensor
    """``[N]`` places in ``T`` whose hidden state predicts a learnt token."""
    targets: Tensor
    """``[N]`` the learnt tokens."""
    weights: Tensor
    """``[N]`` float32 shares of the step's loss; over a whole step they sum to 1."""
    owners: Tensor
    """``[N]`` for each learnt token, the place of its row among the step's rows; stays on the CPU."""
    row_prefixes: Tensor | None = None
    """``[R]``, how many tokens of each row are its context; stays on the CPU. None where rows have none."""
    row_parents: Tensor | None = None
    """``[R]``, the segment that each goes on from, -1 for none; stays on the CPU. None where rows share nothing."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device` (`row_starts`, `owners`, `row_prefixes` and `row_parents` excepted)."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
        )


def make_batches(
    rows: Sequence[Example],
    *,
    tokens_per_pass: int,
    row_balance: float = 0.0,
    row_weights: Sequence[float] | None = None,
    round_to: int = 1,
    row_prefix: TellPrefix | None = None,
    places: Sequence[int] | None = None,
    share: bool = False,
) -> list[Batch]:
    """The passes of one optimiser step: as few as fit `tokens_per_pass` (a longer row gets a pass of its own).

    Args:
        rows: the step's examples.
        tokens_per_pass: most tokens in one pass.
        row_balance: 0: every learnt token has the same weight. 1: every row has. Between, a token's weight is
            ``length of its row's answer ** -row_balance``, scaled so that the step's weights sum to 1.
        row_weights: for each row, a factor on the weight of its tokens; 1 when not given.
        round_to: fill every pass up to a multiple of so many tokens with a row of its own that is not learnt.
        row_prefix: tells the context of a row; none: rows are read from left to right.
        places: those of the rows that this process computes, in passes of their own; by default all. Their weights are
            their shares of the whole step.
        share: lay out once what rows begin with alike, where enough tokens are saved; not for rows with contexts.

    Raises:
        ModelError: a row has no context where the model needs one.
    """
    factors = row_weights if row_weights is not None else [1.0] * len(rows)
    answer_weights = [
        factor * max(1, row.num_supervised) ** -row_balance for row, factor in zip(rows, factors, strict=True)
    ]
    total = sum(weight * row.num_supervised for weight, row in zip(answer_weights, rows, strict=True))
    own = range(len(rows)) if places is None else places
    shares = [weight / total for weight in answer_weights]
    passes = share_beginnings(rows, own, tokens_per_pass) if share and own else None
    if passes is None:
        placed = share_passes([len(rows[place]) for place in own], tokens_per_pass=tokens_per_pass)
        tokens = [row.token_ids for row in rows]
        passes = [plain_rows(tokens, [own[number] for number in one]) for one in placed]
    return [_pack(rows, segments, shares, round_to, row_prefix) for segments in passes]


def share_beginnings(
    rows: Sequence[Example], places: Sequence[int], tokens_per_pass: int
) -> list[list[Segment]] | None:
    """The passes of the rows at `places` when they share their beginnings; None where that would save too little."""
    passes = share_trees([row.token_ids for row in rows], places, tokens_per_pass=tokens_per_pass)
    computed = sum(map(num_tokens, passes))
    return passes if computed <= (1 - LEAST_SAVED) * sum(len(rows[place]) for place in places) else None


def make_probe(rows: Sequence[Example], *, num_targets: int = 16, row_prefix: TellPrefix | None = None) -> Batch:
    """A small batch for checks: the shortest row with at most `num_targets` of its learnt tokens."""
    batch = make_batches([rows[int(lengths_of(rows).argmin())]], tokens_per_pass=1, row_prefix=row_prefix)[0]
    return replace(
        batch,
        predictors=batch.predictors[:num_targets],
        targets=batch.targets[:num_targets],
        weights=batch.weights[:num_targets],
        owners=batch.owners[:num_targets],
    )


def _pack(
    rows: Sequence[Example],
    segments: Sequence[Segment],
    weights: Sequence[float],
    round_to: int,
    row_prefix: TellPrefix | None,
) -> Batch:
    """The rows of `segments` end to end; `weights` are those of a learnt token of each row."""
    token_ids: list[int] = []
    starts, predictors, targets, shares, owners = [0], [], [], [], []
    before: dict[int, int] = {}  # for each row, the place of its token before the segment
    for segment in segments:
        first = rows[segment.rows[0]].token_ids[segment.start : segment.stop]
        for place in segment.rows:
            row = rows[place]
            for position in range(segment.start, segment.stop):
                if row.loss_mask[position] and position > 0:
                    here = len(token_ids) + position - segment.start - 1
                    predictors.append(here if position > segment.start else before[place])
                    targets.append(row.token_ids[position])
                    shares.append(weights[place])
                    owners.append(place)
            before[place] = len(token_ids) + len(segment) - 1
        token_ids += first
        starts.append(len(token_ids))
    parents = [segment.parent for segment in segments]
    positions = [position for segment in segments for position in range(segment.start, segment.stop)]
    prefixes = None if row_prefix is None else prefixes_of([rows[segment.rows[0]] for segment in segments], row_prefix)
    if prefixes is not None and max(parents) >= 0:
        raise ModelError("Rows with contexts that are read in both directions cannot share their beginnings.")
    if filling := -len(token_ids) % round_to:
        token_ids += [0] * filling
        starts.append(len(token_ids))
        parents.append(-1)
        positions += range(filling)
        prefixes = None if prefixes is None else [*prefixes, _NO_CONTEXT]
    lengths = [b - a for a, b in pairwise(starts)]
    return Batch(
        num_tokens=sum(len(rows[place]) for place in before),
        token_ids=torch.tensor([token_ids]),
        positions=torch.tensor([positions]) if prefixes is None else positions_of(lengths, prefixes),
        row_starts=torch.tensor(starts),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(shares, dtype=torch.float32),
        owners=torch.tensor(owners, dtype=torch.long),
        row_prefixes=None if prefixes is None else torch.tensor([prefix.num_tokens for prefix in prefixes]),
        row_parents=torch.tensor(parents) if max(parents) >= 0 else None,
    )


def prefixes_of(rows: Sequence[Example], row_prefix: TellPrefix) -> list[RowPrefix] | None:
    """The contexts of `rows`; None for a model that reads from left to right."""
    found = [row_prefix(row.token_ids) for row in rows]
    prefixes = [prefix for prefix in found if prefix is not None]
    if prefixes and len(prefixes) < len(found):
        raise ModelError(
            f"{len(found) - len(prefixes)} of {len(found)} rows have no context, which the model needs in every row."
        )
    return prefixes or None


def positions_of(lengths: Sequence[int], prefixes: Sequence[RowPrefix] | None) -> Tensor:
    """The positions of the tokens of rows end to end, ``[1, T]``; with contexts ``[1, 2, T]``."""
    if prefixes is None:
        return torch.tensor([[position for length in lengths for position in range(length)]])
    rows = [prefix.positions(0, length) for prefix, length in zip(prefixes, lengths, strict=True)]
    return torch.tensor([[[position for row in rows for position in row[channel]] for channel in (0, 1)]])
