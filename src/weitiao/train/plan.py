"""What a training run will do, before it does it: steps, tokens, memory, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..data.order import num_steps
from ..recipe import Train
from ..render.base import Example
from ..tuning.methods import count_parameters
from .model import can_compile
from .progress import format_seconds

_EAGER_EFFICIENCY = 0.35
"""Share of the machine's matrix peak that an uncompiled step reaches: 0.3 to 0.4 on 2 CPU cores, Gemma 3 270M."""

COMPILE_REPAYS_SECONDS = 240.0
"""Compiling costs 40 to 60 s on 2 CPU cores and makes the steps about 1.5 times as fast."""


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

    def describe(self) -> str:
        """Three lines for people."""
        share = self.supervised_per_epoch / max(1, self.tokens_per_epoch)
        return (
            f"{self.rows} rows, {self.tokens_per_epoch:,} tokens an epoch ({share:.0%} of them learnt), longest row "
            f"{self.longest} tokens\n"
            f"{self.steps} optimiser steps; {self.trainable:,} of {self.parameters:,} parameters learn\n"
            f"about {self.memory_bytes / 2**30:.1f} GB of memory and {format_seconds(self.seconds)} (h:)min:s"
        )


def make_plan(model: PreTrainedModel, examples: Sequence[Example], weights: Sequence[float], settings: Train) -> Plan:
    """Estimate the run of `model` (adapter in place) over `examples`."""
    tokens = round(sum(len(example) * weight for example, weight in zip(examples, weights, strict=True)))
    supervised = round(sum(e.num_supervised * weight for e, weight in zip(examples, weights, strict=True)))
    trainable, parameters = count_parameters(model)
    head = model.get_output_embeddings().weight
    body = parameters - head.numel()
    # forward and input gradient: 2 · 2 FLOP per weight and token; the head likewise at supervised positions
    flops = 4 * body * tokens + 4 * head.numel() * supervised
    if settings.gradient_checkpointing:
        flops += 2 * body * tokens
    per_pass = min(settings.tokens_per_pass, max(1, tokens))
    return Plan(
        steps=num_steps(weights, batch_size=settings.batch_size, seed=settings.seed, epochs=settings.epochs),
        rows=len(examples),
        tokens_per_epoch=tokens,
        supervised_per_epoch=supervised,
        longest=max(len(example) for example in examples),
        trainable=trainable,
        parameters=parameters,
        memory_bytes=_memory(model, per_pass, trainable, checkpointing=settings.gradient_checkpointing),
        seconds=flops * settings.epochs / (_EAGER_EFFICIENCY * _matrix_peak(head.dtype, head.device)),
    )


def will_compile(settings: Train, seconds: float) -> bool:
    """Whether a run that is estimated to take `seconds` will have its layers compiled."""
    return settings.compile == "always" or (
        settings.compile == "auto" and can_compile() and seconds > COMPILE_REPAYS_SECONDS
    )


def _memory(model: PreTrainedModel, tokens: int, trainable: int, *, checkpointing: bool) -> int:
    """Weights, adapter with its optimiser, activations of one pass and the head's buffers, in bytes."""
    config = model.config
    item = model.get_output_embeddings().weight.element_size()
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    per_token_layer = (
        24 * config.hidden_size + 6 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    ) * item
    layers = 2 if checkpointing else config.num_hidden_layers
    return int(weights + 12 * trainable + tokens * layers * per_token_layer + (1 << 28) + (400 << 20))


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
