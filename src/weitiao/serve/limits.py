"""What the worker takes on at a time, and what it can never take on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .requests import Request, UnfitError


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the worker takes on at a time."""

    max_rows: int = 32
    """Most requests that run together, over all adapters."""
    max_queue: int = 256
    """Most requests that wait; one more is `BusyError`."""
    max_cache_tokens: int = 65536
    """Most positions of keys and values, counted as if every row reached its limit and were as long as the longest."""
    prefill_tokens: int = 512
    """Most tokens of a step, as long as prompts are being computed: bounds how long the others wait for one."""
    max_prefilling: int = 4
    """Most prompts that are computed at a time; they share `prefill_tokens`."""
    kept_bytes: int = 256 << 20
    """Most memory for beginnings of prompts that are kept for later requests; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_queue", "max_cache_tokens", "prefill_tokens", "max_prefilling"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.kept_bytes < 0:
            raise ValueError(f"kept_bytes is {self.kept_bytes}; it must be 0 (keep none) or more.")


def require_fitting(request: Request, *, adapters: Sequence[str], max_positions: int, vocab_size: int) -> None:
    """Raise UnfitError where a model of these sizes and `adapters` can never run `request`."""
    if request.adapter is not None and request.adapter not in adapters:
        raise UnfitError(f"There is no adapter {request.adapter!r}. There are: {', '.join(adapters) or 'none'}.")
    if not request.prompt_ids or request.limit < 1:
        raise UnfitError(
            f"The prompt has {len(request.prompt_ids)} tokens and the answer may have {request.limit}. Give at least "
            "one of each."
        )
    if request.num_positions > max_positions:
        raise UnfitError(
            f"{len(request.prompt_ids)} tokens + {request.limit} new ones = {request.num_positions} positions of "
            f"{max_positions}. Shorten the prompt or ask for fewer new tokens."
        )
    strange = [i for i in (*request.prompt_ids, *request.steering.logit_bias) if not 0 <= i < vocab_size]
    if strange:
        raise UnfitError(f"There is no token {strange[0]}: the model has {vocab_size}.")
