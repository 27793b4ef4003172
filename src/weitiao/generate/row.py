"""One prompt on its way to an answer: what is known of it, what its constraint forces, and how it ends.

Knows tokens and constraints; knows nothing of models, batches or text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..models.prefix_lm import RowPrefix
from .constraint import Constraint
from .sampling import Choice, Chooser

Finish = Literal["stop", "length", "refused"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt became."""

    index: int
    """Which prompt, counted from 0."""
    token_ids: tuple[int, ...]
    """The answer, without the stop token; of a refused one, what was written until then."""
    finish: Finish
    """`stop`: a stop token was chosen or forced; `length`: the limit was reached where the answer may end, or where it
    has no constraint; `refused`: there is no answer, see `reason`."""
    logprob: float
    """Sum of `token_logprobs` and `stop_logprob`."""
    reason: str = ""
    """Why it was refused, as a sentence."""
    token_logprobs: tuple[float, ...] = ()
    """For each of `token_ids` its log-probability at temperature 1, nothing cut off by top-k and top-p: under the
    model's own distribution, with a constraint renormalised over the allowed tokens. 0.0 where there was one only."""
    stop_logprob: float = 0.0
    """The stop token's; 0.0 where it was forced, or none was chosen."""
    num_steps: int = 0
    """Calls of the model that this row took part in after its prompt's."""


@dataclass(kw_only=True, eq=False)
class Row:
    """One prompt on its way. Whoever runs it calls `start` once, then `take` with every token chosen for it."""

    index: int
    prompt: tuple[int, ...]
    limit: int
    """Most tokens to choose."""
    stop_ids: frozenset[int]
    chooser: Chooser
    constraint: Constraint | None = None
    """Changed as the answer grows, so it must be the row's own."""
    prefix: RowPrefix | None = None
    """Its context, in a prefix language model."""
    pending: list[int] = field(init=False)
    """Tokens that are known and not yet cached: the prompt, later the chosen token and those forced behind it."""
    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    choices: list[Choice] = field(default_factory=list)
    """How each of `tokens` was chosen; forced ones have the log-probability 0 and no alternatives but themselves."""
    num_cached: int = 0
    num_shared: int = 0
    """How many of them were copied from another row's beginning, not computed."""
    num_steps: int = 0
    allowed: Tensor | None = None
    """With a constraint, the ids to choose the next token from, on the CPU."""

    def __post_init__(self) -> None:
        self.pending = list(self.prompt)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def in_prompt(self) -> bool:
        """Whether a part of the prompt is still to be computed."""
        return self.num_cached < self.num_prompt

    def known(self, end: int) -> tuple[int, ...]:
        """The first `end` tokens of prompt and answer."""
        return (*self.prompt[:end], *self.tokens[: max(0, end - self.num_prompt)])

    def start(self) -> Generation | None:
        """Write what the constraint forces at the beginning; the answer where that leaves nothing to ask for."""
        return None if self.constraint is None else self._follow()

    def take(self, choice: Choice) -> Generation | None:
        """Go on by a chosen token; the answer where it ends with that."""
        if not math.isfinite(choice.logprob):
            return self._end(
                "refused",
                "The model's scores are not numbers, or forbid every token. Its weights may be broken, or its dtype "
                "too narrow: try float32.",
            )
        ended = self._append(choice)
        return ended if ended is not None or self.constraint is None else self._follow()

    def _follow(self) -> Generation | None:
        """Append what the constraint forces, then see what it allows; the answer where it ends with that."""
        assert self.constraint is not None
        while True:
            forced = self.constraint.forced()
            if not forced:
                allowed = self.constraint.allowed()
                if not len(allowed):
                    return self._end("refused", f"No token can follow: {self.constraint.why()}.")
                if len(allowed) > 1:
                    self.allowed = torch.from_numpy(allowed)
                    return None
                forced = allowed.tolist()
            for token in forced:
                told = ((token, 0.0),) if self.chooser.steering.num_top else ()
                ended = self._append(Choice(token=token, logprob=0.0, top=told))
                if ended is not None:
                    return ended

    def _append(self, choice: Choice) -> Generation | None:
        """Write one token; the answer where that ends it."""
        if choice.token in self.stop_ids:
            return self._end("stop", stop_logprob=choice.logprob)
        self.tokens.append(choice.token)
        self.choices.append(choice)
        self.pending.append(choice.token)
        self.chooser.counts[choice.token] += 1
        if self.constraint is not None and not self.constraint.advance(choice.token):
            return self._end("refused", f"The answer cannot go on: {self.constraint.why()}.")
        if len(self.tokens) < self.limit:
            return None
        if self.constraint is None or self.constraint.accepting:
            return self._end("length")
        return self._end(
            "refused", f"The limit of {self.limit} tokens was reached inside the answer: {self.constraint.why()}."
        )

    def _end(self, finish: Finish, reason: str = "", *, stop_logprob: float = 0.0) -> Generation:
        logprobs = [choice.logprob for choice in self.choices]
        return Generation(
            index=self.index,
            token_ids=tuple(self.tokens),
            finish=finish,
            logprob=sum(logprobs) + stop_logprob,
            reason=reason,
            token_logprobs=tuple(logprobs),
            stop_logprob=stop_logprob,
            num_steps=self.num_steps,
        )
