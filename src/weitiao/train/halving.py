"""Memory that runs out in a step: the step is taken again with passes of half the size, and nothing of it is lost.

What a step learns does not depend on how its rows are cut into passes, so a training goes on as if it had had the small
passes all along. They are kept to its end, and by its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..errors import RunError
from ..models.out_of_memory import give_memory_back, ran_out_of_memory
from ..models.sources import first_line
from ..recipe import Train
from .batches import Batch
from .memory import limit_bytes, peak_bytes
from .ranks import ALONE, Ranks

T = TypeVar("T")

_STRICTNESS: tuple[bool | str, ...] = (False, "selective", True)
"""Values of `train.gradient_checkpointing`, by the memory that they save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSizes:
    """How large the passes of a step are in one process."""

    largest: int
    """Tokens that are computed in the largest."""
    most_rows: int
    """Of the pass with the most rows."""

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> PassSizes:
        """Those of `batches`; none at all in a process that has no rows."""
        return cls(
            largest=max((batch.token_ids.shape[1] for batch in batches), default=0),
            most_rows=max((len(batch.owners.unique()) for batch in batches), default=0),
        )


class PassesTooLargeError(MemoryError):
    """Memory ran out in a step's passes, here or in another process; all of them raise it, and nothing was learnt."""

    def __init__(self, why: str, sizes: PassSizes) -> None:
        """
        Args:
            why: what was said of it.
            sizes: those of this process's passes.
        """
        self.sizes = sizes
        super().__init__(why)


class Halving:
    """Takes a training's steps, with smaller passes from the step on in which memory runs out."""

    def __init__(
        self, settings: Train, device: torch.device, *, say: Callable[[str], None], ranks: Ranks = ALONE
    ) -> None:
        """
        Args:
            settings: the recipe's `train` part, as far as a plan has not changed it.
            device: where the model is.
            say: is told of every change.
            ranks: the processes that take the steps together.
        """
        self.settings = settings
        """The recipe's `train` part with the passes that there is memory for."""
        self._device, self._say, self._ranks = device, say, ranks

    def take(self, step: int, attempt: Callable[[Train], T]) -> T:
        """What `attempt` makes of the settings: step number `step`, taken.

        Raises:
            RunError: memory runs out with the smallest passes too, or where the recipe wants none but its own.
        """
        before = _random_states(self._device)
        while True:
            try:
                return attempt(self.settings)
            except PassesTooLargeError as error:
                why, sizes = str(error), error.sizes
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                raise RunError(
                    f"Step {step}: memory ran out while the weights were updated ({first_line(error)}). "
                    f"{cures(self.settings)}"
                ) from None
            give_memory_back()
            _restore(before, self._device)  # dropout falls as it would have
            self._halve(step, why, sizes)

    def _halve(self, step: int, why: str, own: PassSizes) -> None:
        all_sizes = self._ranks.gather(own)
        largest, most_rows = max(one.largest for one in all_sizes), max(one.most_rows for one in all_sizes)
        there = f"{peak_bytes(self._device) / 2**30:.1f} GB were taken at the peak, and about "
        there += f"{limit_bytes(self._device) / 2**30:.1f} GB are to be had"
        what = f"Step {step}: memory ran out in a pass of up to {largest:,} tokens ({why}; {there})."
        if self.settings.fit_memory == "never":
            raise RunError(f"{what} train.fit_memory=never keeps the passes as they are. {cures(self.settings)}")
        if most_rows <= 1:
            raise RunError(f"{what} No pass of the step has more than one row, so none can be halved. "
                           f"{cures(self.settings)}")  # fmt: skip
        was = self.settings.tokens_per_pass
        self.settings = self.settings.model_copy(update={"tokens_per_pass": max(1, min(was, largest) // 2)})
        self._say(
            f"{what} The step is taken again, and from here on a pass has at most {self.settings.tokens_per_pass:,} "
            f"tokens instead of {was:,} (train.tokens_per_pass): slower, and nothing else changes."
        )


def cures(settings: Train) -> str:
    """What there is to do where memory does not suffice, as sentences."""
    found = []
    if settings.gradient_checkpointing is not True:
        found.append("train.gradient_checkpointing=true computes layers once more instead of keeping them")
    if settings.fit_memory == "never":
        found.append("train.tokens_per_pass, lowered, makes passes smaller")
    found.append("data.max_length with data.overlong=shorten_input makes rows shorter")
    found.append("model.quantize=int8 or int4 makes the base model smaller")
    return f"What helps: {'; '.join(found)}. weitiao check RECIPE --plan tells what fits. Then go on with --resume."


def with_fitted(settings: Train, fitted: Mapping[str, Any]) -> Train:
    """`settings` that take no more memory than `fitted`, what a run's checkpoint has of them."""
    changed: dict[str, Any] = {}
    if "tokens_per_pass" in fitted:
        changed["tokens_per_pass"] = min(settings.tokens_per_pass, int(fitted["tokens_per_pass"]))
    if "gradient_checkpointing" in fitted:
        both = (settings.gradient_checkpointing, fitted["gradient_checkpointing"])
        changed["gradient_checkpointing"] = max(both, key=_STRICTNESS.index)
    return settings.model_copy(update=changed)


def fitted_of(recipe: Train, settings: Train) -> dict[str, Any]:
    """What of `settings` is not as the recipe's `train` part has it, for `with_fitted`."""
    keys = ("tokens_per_pass", "gradient_checkpointing")
    return {key: getattr(settings, key) for key in keys if getattr(settings, key) != getattr(recipe, key)}


def strictness(settings: Train) -> int:
    """How much memory `settings` save by computing layers once more, as a number to compare."""
    return _STRICTNESS.index(settings.gradient_checkpointing)


def stricter(settings: Train) -> list[Train]:
    """`settings`, and those that save more memory by computing layers once more, the least first."""
    modes = _STRICTNESS[strictness(settings) :]
    return [settings.model_copy(update={"gradient_checkpointing": mode}) for mode in modes]


def _random_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(states: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
