"""Several optimisers as one, each of some of the parameters; and one for each, applied in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


class SeveralOptimisers(torch.optim.Optimizer):
    """Takes the steps of `parts` together. A schedule finds the groups of all of them, a checkpoint their states."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """`parts` have no parameter in common."""
        self.parts = tuple(parts)
        super().__init__([group["params"][0] for part in parts for group in part.param_groups], {})
        self._take_groups()

    def _take_groups(self) -> None:
        """Hold the very groups of the parts, so that a learning rate written here is theirs."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step of each part that has a gradient; without `closure`, which no caller has."""
        assert closure is None
        for part in self.parts:
            if any(parameter.grad is not None for group in part.param_groups for parameter in group["params"]):
                part.step()

    def state_dict(self) -> dict[str, Any]:
        """Those of the parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put every part into the state that `state_dict`, of as many parts, has for it."""
        for part, its in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(its)
        self._take_groups()

    def train(self) -> None:
        """Put parts that average weights into the mode that they learn in."""
        for part in self.parts:
            part.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Put parts that average weights into the mode that they are used in."""
        for part in self.parts:
            part.eval()  # type: ignore[attr-defined]


class UpdatesInBackward:
    """Updates each parameter as soon as its gradient is whole, and frees the gradient.

    A gradient is whole in the last pass of a step; before it, gradients are summed as usual. What comes out is what
    `optimisers` would make of all gradients at the end: their steps do not see each other's parameters.
    """

    def __init__(self, optimisers: SeveralOptimisers) -> None:
        """`optimisers` has one for each parameter."""
        self.squares = 0.0
        self.live = False
        self._of = {parameter: part for part in optimisers.parts for parameter in part.param_groups[0]["params"]}
        for parameter, part in self._of.items():
            parameter.register_post_accumulate_grad_hook(partial(self._update, part))

    @contextmanager
    def in_last_pass(self) -> Iterator[None]:
        """Within this, a backward pass updates what it has the gradients of; at the end, what only earlier ones had."""
        self.squares, self.live = 0.0, True
        try:
            yield
        finally:
            self.live = False
        for parameter, part in self._of.items():
            if parameter.grad is not None:
                self._apply(part, parameter)

    @property
    def norm(self) -> float:
        """That of the last step's whole gradient. Where it is not finite, some of the parameters were not updated."""
        return math.sqrt(self.squares)

    def _update(self, part: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        if self.live:
            self._apply(part, parameter)

    def _apply(self, part: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad))
        self.squares += norm * norm
        if math.isfinite(norm):
            part.step()
            parameter.grad = None
