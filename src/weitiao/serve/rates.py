"""What the worker measures of itself: counts, tokens a second, latencies, and how long a full queue lasts."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

LATELY_S = 30.0
"""So far back rates are measured."""
_LATENCIES = 512
"""So many last requests give the latencies."""
_LONGEST_WAIT_S = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """The worker at one moment."""

    alive: bool
    """Whether the worker's thread runs."""
    closing: bool
    queued: int
    running: int
    """Requests that have a row."""
    accepted: int
    """Requests since the start, like the next five."""
    finished: int
    refused_busy: int
    """Turned away because the queue was full."""
    cancelled: int
    failed: int
    """Without an answer because of an error, or because the worker closed."""
    errors: int
    """Steps that the model could not do."""
    steps: int
    prompt_tokens: int
    """Tokens of prompts since the start, copied ones included."""
    cached_tokens: int
    """Those that were copied from another's beginning."""
    completion_tokens: int
    prefix_hits: int
    """Requests whose beginning was copied."""
    unshareable: int
    """Requests to models whose contexts cannot be shared (prefix language models)."""
    tokens_per_second: float
    """Tokens of answers in the last 30 seconds."""
    requests_per_second: float
    """Finished in the last 30 seconds."""
    first_token_p50_s: float
    """From submission; over the last 512 requests, like the next three. 0 before the first."""
    first_token_p95_s: float
    latency_p50_s: float
    latency_p95_s: float
    cache_bytes: int
    """Memory set aside for the rows' keys and values."""
    kept_bytes: int
    """Memory of beginnings that are kept for later requests."""
    adapter_switches: int


class Rates:
    """Counts over the last half minute. Not safe for threads by itself."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._tokens: deque[tuple[float, int]] = deque()
        self._finished: deque[float] = deque()
        self.first_tokens: deque[float] = deque(maxlen=_LATENCIES)
        self.latencies: deque[float] = deque(maxlen=_LATENCIES)

    def wrote(self, count: int) -> None:
        """Count tokens of answers."""
        self._tokens.append((time.monotonic(), count))
        self._forget()

    def finished(self, *, first_token_s: float, latency_s: float) -> None:
        """Count a request."""
        self._finished.append(time.monotonic())
        self.first_tokens.append(first_token_s)
        self.latencies.append(latency_s)

    @property
    def tokens_per_second(self) -> float:
        """Of late."""
        self._forget()
        return sum(count for _, count in self._tokens) / self._span()

    @property
    def requests_per_second(self) -> float:
        """Of late."""
        self._forget()
        return len(self._finished) / self._span()

    def wait_s(self, waiting: int) -> int:
        """After how many seconds `waiting` requests will probably have had their turn, 1 to 120."""
        rate = self.requests_per_second
        return max(1, min(_LONGEST_WAIT_S, math.ceil(waiting / rate))) if rate else 5

    def _span(self) -> float:
        return max(0.1, min(LATELY_S, time.monotonic() - self._started))

    def _forget(self) -> None:
        oldest = time.monotonic() - LATELY_S
        while self._tokens and self._tokens[0][0] < oldest:
            self._tokens.popleft()
        while self._finished and self._finished[0] < oldest:
            self._finished.popleft()


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` are not above; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
