"""Several optimisers as one, each of some of the parameters; and one for each, applied in the backward pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn


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

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What the parts keep of each parameter."""
        return defaultdict(dict, {one: kept for part in self.parts for one, kept in part.state.items()})

    @state.setter
    def state(self, _: Any) -> None:
        """Nothing: torch begins with an empty one, and here the parts have it."""

    def state_dict(self) -> dict[str, Any]:
        """Those of the parts as one, in torch's form: parameters are numbered through all of them."""
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part, first in zip(self.parts, self._firsts(), strict=True):
            own = part.state_dict()
            states.update({number + first: kept for number, kept in own["state"].items()})
            groups += [{**group, "params": [number + first for number in group["params"]]}
                       for group in own["param_groups"]]  # fmt: skip
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put every part into the state that `state_dict`, of the same parts, has for it."""
        groups = iter(state_dict["param_groups"])
        for part, first in zip(self.parts, self._firsts(), strict=True):
            own = [next(groups) for _ in part.param_groups]
            numbers = [number for group in own for number in group["params"]]
            states = {
                number - first: state_dict["state"][number] for number in numbers if number in state_dict["state"]
            }
            own = [{**group, "params": [number - first for number in group["params"]]} for group in own]
            part.load_state_dict({"state": states, "param_groups": own})
        self._take_groups()

    def _firsts(self) -> list[int]:
        """The number of each part's first parameter."""
        counts = [sum(len(group["params"]) for group in part.param_groups) for part in self.parts]
        return [0, *accumulate(counts[:-1])]

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
