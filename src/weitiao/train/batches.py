"""How the rows of an optimiser step are laid out in memory; which rows they are is `data/order.py`'s business.

They are laid end to end (packed): no padding, no mask, and the result does not depend on how they were cut into passes.

Shapes: T tokens of one forward pass, R rows in it, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data.order import share_passes
from ..render.base import Example
from ..render.example_store import lengths_of

ROUND_TOKENS = 128
"""Passes of few different lengths: oneDNN compiles a kernel for every new shape and keeps it. On 2 AMX cores this made
steps a tenth faster and took 0.3 GB less memory after ten of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One forward pass: rows end to end, and the positions that count.

    Two rows ``[2, 7, 5]`` (last token learnt) and ``[2, 9, 8, 1]`` (last two learnt):
    ``token_ids [[2, 7, 5, 2, 9, 8, 1]]``, ``positions [[0, 1, 2, 0, 1, 2, 3]]``, ``row_starts [0, 3, 7]``,
    ``predictors [1, 4, 5]``, ``targets [5, 8, 1]``.
    """

    num_tokens: int
    """Tokens of rows; `token_ids` may hold a few more, which fill the pass up to a round number."""
    token_ids: Tensor
    """``[1, T]``."""
    positions: Tensor
    """``[1, T]``, from 0 in every row."""
    row_starts: Tensor
    """``[R + 1]`` offsets; stays on the CPU."""
    predictors: Tensor
    """``[N]`` places in ``T`` whose hidden state predicts a learnt token."""
    targets: Tensor
    """``[N]`` the learnt tokens."""
    weights: Tensor
    """``[N]`` float32 shares of the step's loss; over a whole step they sum to 1."""
    owners: Tensor
    """``[N]`` for each learnt token, the place of its row among the step's rows; stays on the CPU."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device` (`row_starts` and `owners` excepted)."""
        return Batch(
            num_tokens=self.num_tokens,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            row_starts=self.row_starts,
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            owners=self.owners,
        )


def make_batches(
    rows: Sequence[Example],
    *,
    tokens_per_pass: int,
    row_balance: float = 0.0,
    row_weights: Sequence[float] | None = None,
    round_to: int = 1,
) -> list[Batch]:
    """The passes of one optimiser step: as few as fit `tokens_per_pass` (a longer row gets a pass of its own).

    Args:
        rows: the step's examples.
        tokens_per_pass: most tokens in one pass.
        row_balance: 0: every learnt token has the same weight. 1: every row has. Between, a token's weight is
            ``length of its row's answer ** -row_balance``, scaled so that the step's weights sum to 1.
        row_weights: for each row, a factor on the weight of its tokens; 1 when not given.
        round_to: fill every pass up to a multiple of so many tokens with a row of its own that is not learnt.
    """
    factors = row_weights if row_weights is not None else [1.0] * len(rows)
    answer_weights = [
        factor * max(1, row.num_supervised) ** -row_balance for row, factor in zip(rows, factors, strict=True)
    ]
    total = sum(weight * row.num_supervised for weight, row in zip(answer_weights, rows, strict=True))
    passes = share_passes([len(row) for row in rows], tokens_per_pass=tokens_per_pass)
    shares = [weight / total for weight in answer_weights]
    return [_pack(rows, places, shares, round_to) for places in passes]


def make_probe(rows: Sequence[Example], *, num_targets: int = 16) -> Batch:
    """A small batch for checks: the shortest row with at most `num_targets` of its learnt tokens."""
    batch = make_batches([rows[int(lengths_of(rows).argmin())]], tokens_per_pass=1)[0]
    return replace(
        batch,
        predictors=batch.predictors[:num_targets],
        targets=batch.targets[:num_targets],
        weights=batch.weights[:num_targets],
        owners=batch.owners[:num_targets],
    )


def _pack(rows: Sequence[Example], places: Sequence[int], weights: Sequence[float], round_to: int) -> Batch:
    """The rows at `places` end to end; `weights` are those of a learnt token of each row."""
    token_ids: list[int] = []
    positions: list[int] = []
    starts, predictors, targets, shares, owners = [0], [], [], [], []
    for place in places:
        row = rows[place]
        for position, (token, learnt) in enumerate(zip(row.token_ids, row.loss_mask, strict=True)):
            if learnt and position > 0:
                predictors.append(len(token_ids) - 1)
                targets.append(token)
                shares.append(weights[place])
                owners.append(place)
            token_ids.append(token)
            positions.append(position)
        starts.append(len(token_ids))
    num_tokens = len(token_ids)
    if filling := -num_tokens % round_to:
        token_ids += [0] * filling
        positions += range(filling)
        starts.append(len(token_ids))
    return Batch(
        num_tokens=num_tokens,
        token_ids=torch.tensor([token_ids]),
        positions=torch.tensor([positions]),
        row_starts=torch.tensor(starts),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(shares, dtype=torch.float32),
        owners=torch.tensor(owners, dtype=torch.long),
    )
