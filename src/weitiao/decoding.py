"""The recipe's part on generation as the engine takes it: how tokens are chosen, and how many an answer may have."""

from __future__ import annotations

from collections.abc import Mapping

from .generate.engine import Sampling
from .recipe import Generate

LEAST_LIMIT = 32
"""Tokens that every answer may have."""


def answer_limit(settings: Generate, longest_label: int) -> int:
    """The most tokens of a task's answers: what the recipe says, or half more than the task's longest label has."""
    return max(LEAST_LIMIT, 3 * longest_label // 2) if settings.max_new_tokens == "auto" else settings.max_new_tokens


def sampling_of(settings: Generate, limits: Mapping[str, int]) -> Sampling:
    """How tokens are chosen; at most as many as the longest answer of any task may have (`limits`, by task)."""
    return Sampling(
        max_new_tokens=max(limits.values()),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
    )
