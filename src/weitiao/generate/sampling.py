"""How the next token is chosen from a row of scores. Knows tensors only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

_NUCLEUS_TOKENS = 1024
"""Draws look at this many best tokens first: sorting a vocabulary of 262 144 costs many times as much."""

MOST_TOP = 20
"""Most alternatives of a token that can be asked for."""


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
class Steering:
    """What one request may ask of the choice beyond `Sampling`, which is what a contract keeps.

    The scores z of all tokens become, before the temperature and under a constraint too,
    ``z[t] + logit_bias[t] - presence_penalty · [c[t] > 0] - frequency_penalty · c[t]``, where c[t] counts how often the
    answer, not the prompt, holds token t so far (the definition of OpenAI's API). Temperature 0 takes the best of them.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """By token, -100 to 100."""
    min_p: float = 0.0
    """Draw only tokens of at least this share of the best one's probability, at the temperature; 0 is off."""
    num_top: int = 0
    """How many of the most probable tokens are told at every place, 0 to 20."""

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from -2 to 2.")
        wrong = {token: bias for token, bias in self.logit_bias.items() if token < 0 or not -100 <= bias <= 100}
        if wrong:
            token, bias = next(iter(wrong.items()))
            raise ValueError(f"logit_bias of token {token} is {bias}; it must be from -100 to 100, of a known token.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 (off) to 1.")
        if not 0 <= self.num_top <= MOST_TOP:
            raise ValueError(f"num_top is {self.num_top}; it must be from 0 to {MOST_TOP}.")

    @property
    def moves_scores(self) -> bool:
        """Whether anything is added to the scores."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(kw_only=True, slots=True)
class Chooser:
    """How one row's tokens are chosen: its settings, its own random numbers, what it has written so far."""

    sampling: Sampling
    random: Random
    steering: Steering = field(default_factory=Steering)
    counts: Counter[int] = field(default_factory=Counter)
    """How often the answer holds each token."""

    def steer(self, scores: Tensor) -> Tensor:
        """`scores` ``[V]`` with what is asked for added to them; they themselves where nothing is."""
        steering = self.steering
        added = dict(steering.logit_bias)
        if steering.presence_penalty or steering.frequency_penalty:
            for token, count in self.counts.items():
                penalty = steering.presence_penalty + steering.frequency_penalty * count
                added[token] = added.get(token, 0.0) - penalty
        if not added:
            return scores
        places = torch.tensor(list(added), device=scores.device)
        amounts = torch.tensor(list(added.values()), dtype=scores.dtype, device=scores.device)
        return scores.index_add(0, places, amounts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A chosen token."""

    token: int
    logprob: float
    """Under the model's own distribution, at temperature 1 and before top-k, top-p and steering, renormalised over the
    tokens that were allowed; not finite where the scores were not (NaN, or none above -inf)."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens of that distribution, best first, each with its log-probability."""


def choose_tokens(logits: Tensor, *, allowed: Sequence[Tensor | None], choosers: Sequence[Chooser]) -> list[Choice]:
    """One token for each row of `logits` ``[R, V]``.

    Args:
        logits: the scores of all tokens.
        allowed: for each row the ids of the tokens to choose from, in rising order; none: all.
        choosers: for each row how to choose.
    """
    tokens, logprobs, tops = [], [], []
    for row, ids, chooser in zip(logits, allowed, choosers, strict=True):
        scores = (row if ids is None else row[ids]).float()
        total = scores.logsumexp(0)
        steered = scores
        if chooser.steering.moves_scores:
            steered = chooser.steer(row.float())
            steered = steered if ids is None else steered[ids]
        if chooser.sampling.temperature == 0:
            best, place = steered.max(0)  # argmax is slower
            if steered is not scores:
                best = scores[place]
        else:
            place = torch.tensor(_place(steered, chooser) if total.isfinite() else 0, device=row.device)
            best = scores[place]
        tokens.append(place if ids is None else ids[place])
        logprobs.append(best - total)
        tops.append(_top(scores, total, ids, chooser.steering.num_top))
    # Read all at once: a GPU then has to be waited for once, not for every row.
    return [
        Choice(token=token, logprob=logprob, top=top)
        for token, logprob, top in zip(torch.stack(tokens).tolist(), torch.stack(logprobs).tolist(), tops, strict=True)
    ]


def _top(scores: Tensor, total: Tensor, ids: Tensor | None, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` tokens of the best `scores`, each with its log-probability; fewer where there are fewer."""
    if not count:
        return ()
    best, places = scores.topk(min(count, len(scores)))
    tokens = places if ids is None else ids[places]
    return tuple(zip(tokens.tolist(), (best - total).tolist(), strict=True))


def _place(scores: Tensor, chooser: Chooser) -> int:
    """The place of the token drawn from `scores`."""
    sampling = chooser.sampling
    return _draw(scores / sampling.temperature, sampling, chooser.random.random(), min_p=chooser.steering.min_p)


def _draw(scaled: Tensor, sampling: Sampling, point: float, *, min_p: float = 0.0) -> int:
    """The place at `point` in [0, 1) of the distribution that top-k, top-p and min-p leave, best token first.

    For probabilities 0.2, 0.5, 0.3 and top_p 0.7, places 1 and 2 are left: place 1 up to point 0.625, then place 2.
    """
    best, ids = scaled.topk(min(sampling.top_k or _NUCLEUS_TOKENS, len(scaled)))
    total = (best if sampling.top_k else scaled).logsumexp(0)
    upto = (best - total).double().exp().cumsum(0)
    least = float(best[0]) + math.log(min_p) if min_p else -math.inf
    if min_p and (float(best[-1]) < least or sampling.top_p == 1):
        enough = float(best[-1]) < least
    else:
        enough = bool(upto[-1] >= (sampling.top_p if sampling.top_p < 1 else point))
    if not sampling.top_k and not enough:
        best, ids = scaled.sort(descending=True)
        upto = (best - total).double().exp().cumsum(0)
    last = len(ids) - 1
    if sampling.top_p < 1:
        last = min(last, int(torch.searchsorted(upto, sampling.top_p)))
    if min_p:
        last = min(last, int((best >= least).sum()) - 1)
    if sampling.top_p < 1 or min_p:
        point *= float(upto[last])
    return int(ids[min(last, int(torch.searchsorted(upto, point, right=True)))])
