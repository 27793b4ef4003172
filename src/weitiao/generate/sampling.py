"""How the next token is chosen from a row of scores. Knows tensors only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_NUCLEUS_TOKENS = 1024
"""Draws look at this many best tokens first: sorting a vocabulary of 262 144 costs many times as much."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and how many at most."""

    max_new_tokens: int = 512
    """Most tokens of an answer; forced ones and the stop token count."""
    temperature: float = 0.0
    """0 takes the most probable token; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw only from the fewest tokens that hold this probability together; 1 is off."""
    top_k: int = 0
    """Draw only from this many best tokens; 0 is off."""
    seed: int = 0
    """With a prompt's index, the seed of its own random numbers."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off).")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or a positive count.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A chosen token."""

    token: int
    logprob: float
    """Under the distribution that it was chosen from, at temperature 1 and before top-k and top-p; not finite where
    the scores were not (NaN, or none above -inf)."""


def choose_tokens(
    logits: Tensor, *, allowed: list[Tensor | None], sampling: Sampling, randoms: list[Random]
) -> list[Choice]:
    """One token for each row of `logits` ``[R, V]``.

    Args:
        logits: the scores of all tokens.
        allowed: for each row the ids of the tokens to choose from, in rising order; none: all.
        sampling: how to choose.
        randoms: for each row its random numbers.
    """
    tokens, logprobs = [], []
    for row, ids, random in zip(logits, allowed, randoms, strict=True):
        scores = (row if ids is None else row[ids]).float()
        total = scores.logsumexp(0)
        if sampling.temperature == 0:
            best, place = scores.max(0)  # argmax is slower
        else:
            drawn = _draw(scores / sampling.temperature, sampling, random.random()) if total.isfinite() else 0
            place = torch.tensor(drawn, device=row.device)
            best = scores[place]
        tokens.append(place if ids is None else ids[place])
        logprobs.append(best - total)
    # Read all at once: a GPU then has to be waited for once, not for every row.
    return [
        Choice(token=token, logprob=logprob)
        for token, logprob in zip(torch.stack(tokens).tolist(), torch.stack(logprobs).tolist(), strict=True)
    ]


def _draw(scaled: Tensor, sampling: Sampling, point: float) -> int:
    """The place at `point` in [0, 1) of the distribution that top-k and top-p leave, best token first.

    For probabilities 0.2, 0.5, 0.3 and top_p 0.7, places 1 and 2 are left: place 1 up to point 0.625, then place 2.
    """
    best, ids = scaled.topk(min(sampling.top_k or _NUCLEUS_TOKENS, len(scaled)))
    total = (best if sampling.top_k else scaled).logsumexp(0)
    upto = (best - total).double().exp().cumsum(0)
    if not sampling.top_k and upto[-1] < (sampling.top_p if sampling.top_p < 1 else point):
        best, ids = scaled.sort(descending=True)
        upto = (best - total).double().exp().cumsum(0)
    last = len(ids) - 1
    if sampling.top_p < 1:
        last = min(last, int(torch.searchsorted(upto, sampling.top_p)))
        point *= float(upto[last])
    return int(ids[min(last, int(torch.searchsorted(upto, point, right=True)))])
