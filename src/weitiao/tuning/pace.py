"""How fast a parameter learns beside the others: what a method knows of its parameters, and the optimiser must."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How one parameter learns."""

    multiple: float = 1.0
    """Of the learning rate."""
    decays: bool = True
    """Whether weight decay pulls it towards zero."""
    share: float = 1.0
    """How much of it learns; the rest stays what it is."""


def set_pace(parameter: nn.Parameter, pace: Pace) -> None:
    """Let `parameter` learn at `pace`."""
    parameter.learning_pace = pace  # type: ignore[attr-defined]


def pace_of(parameter: nn.Parameter) -> Pace:
    """The pace of `parameter`: as it was set, else that of the others; biases and norms do not decay."""
    pace = getattr(parameter, "learning_pace", None)
    return pace if isinstance(pace, Pace) else Pace(decays=parameter.ndim >= 2)
