"""A training made to fit into the memory there is: by smaller passes, then by computing layers once more.

Neither changes what is learnt. What it takes is measured in short passes of the model as it is (`footprint.py`), and
only where arithmetic says that memory may become scarce.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedModel

from ..data.order import share_rows, step_rows
from ..models.adapters import base_model
from ..recipe import Train
from ..render.base import Example
from ..render.example_store import lengths_of
from .activations import checkpoint_layers
from .batches import ROUND_TOKENS, share_beginnings
from .footprint import Footprint, measure_footprint
from .halving import cures, stricter, strictness
from .memory import limit_bytes, resident_bytes
from .memory_needs import HEAD_BYTES, gradient_bytes, later_bytes, state_bytes
from .plan import Plan
from .prompt_trees import num_tokens
from .ranks import Ranks
from .sharding import is_spread
from .shared_prompts import groups_of, may_share
from .step import Setup, pass_sizes

_PLENTY = 2.0
"""Where arithmetic says that so many times the memory is there, nothing is measured: it was never that wrong."""

_STEPS_LOOKED_AT = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a training takes at its peak, by the tokens of its largest pass."""

    besides: int
    """Bytes of all that no pass holds: model, program, optimiser, scoring, and what is kept of later steps."""
    footprint: Footprint

    def bytes_of(self, tokens: int) -> int:
        """The peak where the largest pass has so many `tokens`."""
        return self.besides + self.footprint.bytes_of(tokens)

    def tokens_in(self, room: int) -> int:
        """The most tokens of a pass with which the peak is no more than `room`."""
        return self.footprint.tokens_in(room - self.besides)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A recipe's `train` part as it fits into memory, or as nearly as it can."""

    settings: Train
    bytes: int
    """The peak foretold of these settings."""
    as_written: int
    """That of the recipe's own."""
    room: int
    """The memory that is to be had."""

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.bytes <= self.room

    def changes(self, written: Train) -> list[str]:
        """What is not as `written`, as ``train.tokens_per_pass=512``."""
        keys = ("tokens_per_pass", "gradient_checkpointing")
        return [
            f"train.{key}={str(value).lower()}"
            for key in keys
            if (value := getattr(self.settings, key)) != getattr(written, key)
        ]


def measure_need(setup: Setup, examples: Sequence[Example], settings: Train, *, steps: int, extra: int = 0) -> Need:
    """What training takes as `setup` has the model now; `extra` bytes are taken beside it, by scoring."""
    base, device = base_model(setup.trained.model), setup.trained.model.device
    footprint = measure_footprint(setup.trained, examples, keeping=setup.offloading)
    all_gradients = gradient_bytes(base, settings.model_copy(update={"update_in_backward": False}))
    freed = all_gradients - gradient_bytes(base, settings)
    besides = resident_bytes(device) + state_bytes(base, settings) + HEAD_BYTES + later_bytes(device, steps=steps)
    return Need(besides=besides + extra - freed, footprint=footprint)


def largest_pass(setup: Setup, examples: Sequence[Example], weights: Sequence[float], settings: Train) -> int:
    """The tokens of the largest pass: of the longest row, or of the first few hundred steps.

    Beginnings that rows share count once where they are computed once.
    """
    lengths = lengths_of(examples).tolist()
    largest = max(pass_sizes([max(lengths)], settings))
    share = may_share(setup.trained, settings)
    order = step_rows(
        weights,
        batch_size=settings.batch_size,
        seed=settings.seed,
        first_step=0,
        groups=groups_of(examples, settings),
    )
    for epoch, rows in islice(order, _STEPS_LOOKED_AT):
        if epoch:
            break
        step_lengths = [lengths[row] for row in rows]
        for part in share_rows(step_lengths, parts=setup.ranks.size):
            passes = None
            if share and part:
                passes = share_beginnings([examples[row] for row in rows], part, settings.tokens_per_pass)
            sizes = pass_sizes([step_lengths[place] for place in part], settings)
            if passes is not None:
                sizes = [num_tokens(one) + -num_tokens(one) % ROUND_TOKENS for one in passes]
            largest = max(largest, *sizes, 0)
    return largest


def try_settings(
    setup: Setup,
    examples: Sequence[Example],
    weights: Sequence[float],
    settings: Train,
    *,
    room: int,
    steps: int,
    extra: int = 0,
) -> list[Fit]:
    """What was tried so that `settings` fit into `room` bytes, by the time it costs; the last one fits, or none does.

    Smaller passes cost little, so they are tried before layers are computed once more, down to the longest row. The
    model is left as the last one has it.
    """
    base, longest = base_model(setup.trained.model), max(pass_sizes([int(lengths_of(examples).max())], settings))
    largest = largest_pass(setup, examples, weights, settings)
    tried: list[Fit] = []
    for now in stricter(settings) if base.supports_gradient_checkpointing else [settings]:
        set_checkpointing(base, now)
        need = measure_need(setup, examples, now, steps=steps, extra=extra)
        as_written = tried[0].as_written if tried else need.bytes_of(largest)
        tokens = largest
        if settings.packing and need.bytes_of(largest) > room:
            tokens = max(longest, need.tokens_in(room) // ROUND_TOKENS * ROUND_TOKENS)
        if tokens < min(largest, settings.tokens_per_pass):
            now = now.model_copy(update={"tokens_per_pass": tokens})
        tried.append(Fit(settings=now, bytes=need.bytes_of(min(tokens, largest)), as_written=as_written, room=room))
        if tried[-1].fits:
            break
    return tried


def set_checkpointing(base: PreTrainedModel, settings: Train) -> None:
    """Have the layers of `base` computed once more as `settings` say, whatever was said before."""
    if base.supports_gradient_checkpointing:
        base.activation_checkpointing_disable()
    checkpoint_layers(base, settings)


def fit_to_memory(
    setup: Setup,
    examples: Sequence[Example],
    weights: Sequence[float],
    settings: Train,
    plan: Plan,
    *,
    say: Callable[[str], None],
    extra: int = 0,
) -> Train:
    """`settings` as a training that begins here takes them: as written where they fit; what is changed is said.

    All processes take the same, those that the one with the least memory can.
    """
    ranks, device = setup.ranks, setup.trained.model.device
    if settings.fit_memory == "never" or is_spread(setup.trained) or setup.divided is not None:
        return settings
    room = _room(ranks, setup)
    if _PLENTY * plan.memory_bytes <= room:
        return settings
    fit = try_settings(setup, examples, weights, settings, room=room, steps=plan.steps, extra=extra)[-1]
    fit = max(ranks.gather(fit), key=lambda one: (strictness(one.settings), -one.settings.tokens_per_pass))
    set_checkpointing(base_model(setup.trained.model), fit.settings)
    if changes := fit.changes(settings):
        say(describe_fit(fit, changes, str(device)))
    elif not fit.fits:
        say(f"The training takes about {_gb(fit.bytes)}, and {_gb(fit.room)} are to be had. {cures(settings)}")
    return fit.settings


def describe_fit(fit: Fit, changes: Sequence[str], device: str) -> str:
    """Which settings are changed and why, as sentences with figures."""
    slower = "; layers are computed once more, which is slower" if "checkpointing" in " ".join(changes) else ""
    told = (
        f"As written, the training would take about {_gb(fit.as_written)} ({device}), and {_gb(fit.room)} are to be "
        f"had. So it takes {' and '.join(changes)}: about {_gb(fit.bytes)}{slower}. What is learnt stays the same."
    )
    return told if fit.fits else f"{told} That is still too much: the system may end it. {cures(fit.settings)}"


def _room(ranks: Ranks, setup: Setup) -> int:
    """What the process with the least memory may come to take."""
    device = setup.trained.model.device
    nodes = ranks.gather(platform.node())
    return min(ranks.gather(limit_bytes(device, sharing=nodes.count(platform.node()))))


def _gb(count: int) -> str:
    return f"{count / 2**30:.1f} GB"
