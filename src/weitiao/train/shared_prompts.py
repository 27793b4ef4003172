"""Whether the rows of a step share what they begin with alike, and the proof that this changes nothing.

Many rows on one document, or with one long instruction, make a model compute the same beginning again and again. Laid
out as trees (`prompt_trees.py`) it is computed once. The loss and the gradient are the same but for rounding; where a
model does something that makes them differ, the first step shows it, and the rows are laid out one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.own_weights import computing_dtype
from ..recipe import Train
from ..render.base import Example
from .batches import Batch, share_beginnings
from .model import TrainedModel
from .prompt_trees import prompt_groups

_TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-4, 1e-3)}
_HALF_TOLERANCES = (0.02, 0.1)
"""Of the loss and of the gradient's norm. Rounding in bfloat16 makes less than 0.002 and 0.03 of them; rows that see
each other, or do not see their beginning, several tenths."""

_SAMPLES = 8
"""How many of the learnt tensors have their gradients compared."""


def groups_of(examples: Sequence[Example], settings: Train) -> list[int] | None:
    """Which rows are to meet in a step, for `step_rows`; None where that is left to chance."""
    if not settings.group_prompts:
        return None
    return prompt_groups([array("i", example.token_ids) for example in examples], batch_size=settings.batch_size)


class MakePasses(Protocol):
    """Makes the passes of a step."""

    def __call__(self, *, share: bool) -> list[Batch]:
        """The passes, told whether rows may share their beginnings."""
        ...


class PromptSharing:
    """Lays out the steps of one training, sharing beginnings where that is wanted, possible, proven and worth it."""

    def __init__(
        self, trained: TrainedModel, settings: Train, say: Callable[[str], None], *, obstacle: str = ""
    ) -> None:
        """
        Args:
            trained: the model, not wrapped.
            settings: the recipe's `train` part.
            say: is told once what is done, or why nothing is.
            obstacle: why the training cannot share, beside what the model says; "" when it can.
        """
        self.trained = trained
        self.tokens_per_pass = settings.tokens_per_pass
        self.say = say
        self.wanted = settings.shared_prompts == "auto"
        self.obstacle = obstacle or why_not_shared(trained)
        self.proven = False

    def lay_out(self, rows: Sequence[Example], make: MakePasses) -> list[Batch]:
        """The passes of a step over `rows`, as `make` makes them."""
        if not self.wanted:
            return make(share=False)
        if self.obstacle:
            self.wanted = False  # it is told for the first step, once
            if share_beginnings(rows, range(len(rows)), self.tokens_per_pass) is not None:
                self.say(f"Rows begin alike, but each is computed whole: {self.obstacle}.")
            return make(share=False)
        batches = make(share=True)
        if self.proven or all(batch.row_parents is None for batch in batches):
            return batches
        plain = make(share=False)
        self.obstacle = compare_layouts(self.trained, plain, batches)
        if self.obstacle:
            self.wanted = False
            self.say(f"Rows begin alike, but each is computed whole: {self.obstacle}.")
            return plain
        self.proven = True
        computed, whole = (sum(batch.token_ids.shape[1] for batch in one) for one in (batches, plain))
        self.say(
            f"Rows begin alike: what they share is computed once, in this step {computed} tokens instead of {whole}. "
            f"Its loss and gradient are the same."
        )
        return batches


def may_share(trained: TrainedModel, settings: Train) -> bool:
    """Whether steps are laid out with shared beginnings as far as can be said before the proof."""
    return settings.shared_prompts == "auto" and not why_not_shared(trained)


def why_not_shared(trained: TrainedModel) -> str:
    """Why rows of this model cannot share their beginnings, as a part of a sentence; "" when they can."""
    if not trained.packing:
        return "with train.packing=false rows are taken one at a time"
    if trained.wants_contexts:
        return (
            "every token of a context sees all of it in this model, so a part of a context is another one in each row"
        )
    if any(isinstance(parameter, DTensor) for parameter in trained.parameters()):
        return "with weights spread over processes, all of them would have to share alike"
    dropping = [one.p for one in trained.modules() if isinstance(one, nn.Dropout) and one.p > 0]
    dropping += [p for one in trained.modules() if isinstance(p := getattr(one, "dropout", None), float) and p > 0]
    if dropping:
        return f"with a dropout of {dropping[0]:g} each row drops other numbers"
    return ""


def compare_layouts(trained: TrainedModel, plain: Sequence[Batch], shared: Sequence[Batch]) -> str:
    """Why a step's loss or gradient differs between two layouts, as a part of a sentence; "" when they agree.

    The gradient is compared in a few of the learnt tensors. Layers are not compiled for it.
    """
    parameters = _sample([parameter for parameter in trained.parameters() if parameter.requires_grad])
    loss, gradient = _loss_and_gradient(trained, plain, parameters)
    other_loss, other_gradient = _loss_and_gradient(trained, shared, parameters)
    most_loss, most_gradient = _TOLERANCES.get(computing_dtype(trained.model), _HALF_TOLERANCES)
    if not abs(other_loss - loss) <= most_loss * abs(loss):
        return f"the loss would be {other_loss:.5f} instead of {loss:.5f}"
    norm = float(gradient.norm())
    difference = float((other_gradient - gradient).norm())
    if not difference <= most_gradient * norm:
        return f"the gradient would differ by {difference / norm:.1%}" if norm else "the gradient would not be zero"
    return ""


def _sample(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Pairs of neighbours, evenly spaced: of LoRA's two matrices, one has no gradient in the first step."""
    pairs = range(0, len(parameters) - 1, max(2, 2 * len(parameters) // _SAMPLES))
    places = sorted({place for first in pairs for place in (first, first + 1)} | {len(parameters) - 1})
    return [parameters[place] for place in places]


def _loss_and_gradient(
    trained: TrainedModel, batches: Sequence[Batch], parameters: Sequence[nn.Parameter]
) -> tuple[float, Tensor]:
    """The loss of a step and its gradient in `parameters`, one after the other in float32 ``[n]``."""
    total = 0.0
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            loss = trained(batch)
            for whole, part in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if part is not None:
                    whole += part
            total += float(loss.detach())
    return total, torch.cat([whole.flatten() for whole in sums])
