"""What a server tells of itself: counters for Prometheus, and for each task how its answers do lately.

No prompt, no reply and no key is ever in a figure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATELY = 500
"""So many last answers of a task are looked back on."""

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(kw_only=True, slots=True)
class TaskFigures:
    """How the answers of one task do."""

    expected: float | None = None
    """The confidence that is to be expected: the share of dev answers that were right; None without a calibration."""
    asked: int = 0
    refused: int = 0
    """Without an answer in the form."""
    confidences: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATELY))
    thumbs: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0, "corrected": 0})

    def to_json(self) -> dict[str, Any]:
        """The figures; those of which nothing is known yet are null.

        ``confidence_drift`` is the mean confidence of the last answers less the expected one: well below zero, texts
        come in that are not like those that were labelled.
        """
        mean = sum(self.confidences) / len(self.confidences) if self.confidences else None
        ordered = sorted(self.seconds)
        return {
            "asked": self.asked,
            "refused": self.refused,
            "refused_share": self.refused / self.asked if self.asked else None,
            "mean_confidence": mean,
            "expected_confidence": self.expected,
            "confidence_drift": mean - self.expected if mean is not None and self.expected is not None else None,
            "latency_p50_seconds": _quantile(ordered, 0.5),
            "latency_p95_seconds": _quantile(ordered, 0.95),
            "looked_back_on": len(ordered),
            "feedback": dict(self.thumbs),
        }


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


class Figures:
    """Everything that is counted while a server runs. Used from one thread."""

    def __init__(self, expected: Mapping[tuple[str, str], float | None], worker: Callable[[], Mapping[str, float]]):
        """
        Args:
            expected: for each (model, task), the confidence to expect; None where that is not known.
            worker: gives the worker's own figures by name, at the moment they are asked for.
        """
        self.tasks = {key: TaskFigures(expected=confidence) for key, confidence in expected.items()}
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "weitiao_requests_total", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.tokens = Counter(
            "weitiao_tokens_total", "Tokens read and written.", ["model", "kind"], registry=self.registry
        )
        self.seconds = Histogram(
            "weitiao_request_seconds", "Seconds of whole requests.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "weitiao_first_token_seconds", "Seconds until the first token.", buckets=_SECONDS, registry=self.registry
        )
        self.answers = Counter(
            "weitiao_task_answers_total",
            "Answers of tasks, by whether they have the labelled form.",
            ["model", "task", "valid"],
            registry=self.registry,
        )
        self._worker = worker
        self._gauges: dict[str, Gauge] = {}

    def answered(self, model: str, task: str, *, valid: bool, confidence: float | None, seconds: float) -> None:
        """Count an answer of a task."""
        figures = self.tasks[model, task]
        figures.asked += 1
        figures.refused += not valid
        figures.seconds.append(seconds)
        if confidence is not None:
            figures.confidences.append(confidence)
        self.answers.labels(model, task, str(valid).lower()).inc()

    def rated(self, model: str, task: str | None, thumb: str, *, corrected: bool) -> None:
        """Count what a user thinks of an answer."""
        if task is not None:
            thumbs = self.tasks[model, task].thumbs
            thumbs[thumb] += 1
            thumbs["corrected"] += corrected

    def statistics(self) -> dict[str, Any]:
        """The figures of all tasks, by model and task."""
        models: dict[str, dict[str, Any]] = {}
        for (model, task), figures in self.tasks.items():
            models.setdefault(model, {})[task] = figures.to_json()
        return models

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        for name, value in self._worker().items():
            gauge = self._gauges.get(name)
            if gauge is None:
                gauge = self._gauges[name] = Gauge(
                    f"weitiao_worker_{name}", f"{name} of the worker.", registry=self.registry
                )
            gauge.set(value)
        return bytes(generate_latest(self.registry))
