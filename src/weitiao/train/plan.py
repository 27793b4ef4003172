"""What a training run will do, before it does it: steps, tokens, memory, time."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..data.order import num_steps
from ..models.own_weights import changed_weights_of
from ..recipe import Train
from ..render.base import Example
from ..render.example_store import lengths_of, supervised_of
from ..tuning.low_rank import layer_number
from ..tuning.methods import count_parameters
from .memory_needs import later_bytes, needed_bytes
from .model import can_compile
from .progress import format_seconds

_EAGER_EFFICIENCY = 0.35
"""Share of the machine's matrix peak that an uncompiled step reaches: 0.3 to 0.4 on 2 CPU cores, Gemma 3 270M."""

COMPILE_REPAYS_SECONDS = 240.0
"""Compiling costs 40 to 60 s on 2 CPU cores and makes the steps about 1.5 times as fast."""

COMPILE_SECONDS, COMPILED_SPEEDUP = 50.0, 1.4
"""What is foretold of compiling where it was not tried: the middle of what was seen on 2 CPU cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The size of a run."""

    steps: int
    rows: int
    tokens_per_epoch: int
    supervised_per_epoch: int
    longest: int
    trainable: int
    parameters: int
    memory_bytes: int
    """Estimated peak."""
    seconds: float
    """Estimated without compiling; the first steps give a better figure."""
    processes: int = 1
    """How many share the rows of each step; the memory is that of one of them."""

    def describe(self) -> str:
        """Three lines for people."""
        share = self.supervised_per_epoch / max(1, self.tokens_per_epoch)
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.rows} rows, {self.tokens_per_epoch:,} tokens an epoch ({share:.0%} of them learnt), longest row "
            f"{self.longest} tokens\n"
            f"{self.steps} optimiser steps; {self.trainable:,} of {self.parameters:,} parameters learn\n"
            f"about {self.memory_bytes / 2**30:.1f} GB of memory{each} and {format_seconds(self.seconds)} (h:)min:s"
        )


def make_plan(
    model: PreTrainedModel,
    examples: Sequence[Example],
    weights: Sequence[float],
    settings: Train,
    *,
    scoring_bytes: int = 0,
    processes: int = 1,
) -> Plan:
    """Estimate the run of `model` (adapter in place) over `examples`, by `processes` that share the rows of each step.

    `scoring_bytes` is the memory that scoring adds.
    """
    lengths, learnt = lengths_of(examples).tolist(), supervised_of(examples).tolist()
    tokens = round(sum(length * weight for length, weight in zip(lengths, weights, strict=True)))
    supervised = round(sum(count * weight for count, weight in zip(learnt, weights, strict=True)))
    trainable, parameters = count_parameters(model)
    head = model.get_output_embeddings().weight
    body = parameters - head.numel()
    # forward and input gradient: 2 · 2 FLOP per weight and token; the head likewise at supervised positions. Below the
    # first layer that learns there is no gradient; a weight that learns itself has one of its own.
    flops = 2 * (1 + _backward_share(model)) * body * tokens + 4 * head.numel() * supervised
    if changed_weights_of(model) is not None:
        of_head = head.numel() if head.requires_grad else 0
        flops += 2 * (trainable - of_head) * tokens + 2 * of_head * supervised
    if settings.gradient_checkpointing:
        flops += 2 * body * tokens * (0.5 if settings.gradient_checkpointing == "selective" else 1)
    longest, most = max(lengths), sum(heapq.nlargest(-(-settings.batch_size // processes), lengths))
    per_pass = max(longest, min(settings.tokens_per_pass, most)) if settings.packing else longest
    peak = processes * _matrix_peak(head.dtype, head.device)
    seconds = flops * settings.epochs / (_EAGER_EFFICIENCY * peak)
    memory = needed_bytes(model, settings, tokens=per_pass)
    steps = num_steps(weights, batch_size=settings.batch_size, seed=settings.seed, epochs=settings.epochs)
    return Plan(
        steps=steps,
        rows=len(examples),
        tokens_per_epoch=tokens,
        supervised_per_epoch=supervised,
        longest=longest,
        trainable=trainable,
        parameters=parameters,
        memory_bytes=memory + scoring_bytes + later_bytes(head.device, steps=steps),
        seconds=seconds,
        processes=processes,
    )


def will_compile(settings: Train, seconds: float) -> bool:
    """Whether a run that is estimated to take `seconds` will have its layers compiled."""
    return settings.compile == "always" or (
        settings.compile == "auto" and can_compile() and seconds > COMPILE_REPAYS_SECONDS
    )


def may_compile(settings: Train) -> bool:
    """Whether the recipe leaves it to the length of the run, or to its user, that layers are compiled."""
    return settings.compile != "never" and can_compile()


def _backward_share(model: PreTrainedModel) -> float:
    """The share of the decoder layers that gradients pass through: from the first one that learns upwards."""
    numbers = [layer_number(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = [number for number in numbers if number is not None]
    first = 0 if len(found) < len(numbers) else min(found, default=0)
    return 1 - first / int(model.config.get_text_config().num_hidden_layers)


def _matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """This machine's matrix-product speed in FLOP/s, measured in a fifth of a second."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    out = torch.mm(a, a)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.2:
        torch.mm(a, a, out=out)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2 * 1024**3 * count / (time.perf_counter() - started)
