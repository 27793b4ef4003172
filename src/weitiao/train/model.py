"""The model as training sees it: one module from a packed batch to its share of the step's loss."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError, RunError
from ..models.attention import PACKED
from ..models.own_weights import casting_once
from ..models.prefix_lm import RowPrefix, row_prefix
from ..models.ptuning import prefix_states
from ..recipe import Train
from .batches import Batch
from .loss import head_of, supervised_loss
from .sharding import ends_together, is_spread


class TrainedModel(nn.Module):
    """Wraps a causal model so that ``forward(batch)`` is its loss, the head seeing supervised positions only.

    A module of its own (rather than a function) so that data-parallel wrappers see one forward call.
    """

    def __init__(self, model: PreTrainedModel, *, packing: bool) -> None:
        """
        Args:
            model: the causal model; its adapter layers, if any, are inside it.
            packing: rows end to end in one sequence; otherwise every batch must hold a single row.
        """
        super().__init__()
        self.model = model
        self.body = model.get_decoder()
        self.packing = packing
        self.wants_contexts = hasattr(model, "row_prefix")
        self.generation_attention = model.config._attn_implementation
        if packing:
            model.set_attn_implementation(PACKED)

    def forward(self, batch: Batch, token_losses: Tensor | None = None) -> Tensor:
        """The batch's share of the step's loss, a float32 scalar.

        `token_losses` ``[N]`` float32, where given, takes the loss of every learnt token, without gradient.
        """
        output = self.body(
            input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False, **self.rows_of(batch)
        )
        hidden = output.last_hidden_state[0].index_select(0, batch.predictors)
        return supervised_loss(hidden, batch.targets, batch.weights, head_of(self.model), out=token_losses)

    def rows_of(self, batch: Batch) -> dict[str, object]:
        """What packed attention must know of the rows; nothing of a single row, which the model attends to itself."""
        assert batch.row_prefixes is not None or not self.wants_contexts, "make_batches was not given row_prefix"
        if not self.packing:
            return {}
        known: dict[str, object] = {"row_starts": batch.row_starts}
        if batch.row_prefixes is not None:
            known["row_prefixes"] = batch.row_prefixes
        if batch.row_parents is not None:
            known["row_parents"] = batch.row_parents
        past = prefix_states(self.model)
        if past is not None:
            # layer by layer, so that a backward pass fills the gradient of the whole once and not in every layer
            layers = tuple(tuple(layer.contiguous() for layer in states.unbind()) for states in past)
            for layer in chain(*layers):
                torch._dynamo.mark_static(layer)  # compiled layers need not ask for sizes that never change
            known["past_states"] = layers
        return known

    def row_prefix(self, token_ids: Sequence[int]) -> RowPrefix | None:
        """The context of a row, which its batch must be made with; None for a model that reads from left to right."""
        return row_prefix(self.model, token_ids)

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The inner model, ready to generate: its own attention, eval mode, not compiled; restored afterwards."""
        if self.packing:
            self.model.set_attn_implementation(self.generation_attention)
        self.model.eval()
        try:
            # what was cast once would be the whole model, where its weights are spread over processes
            casting = nullcontext() if is_spread(self) else casting_once()
            with torch.compiler.set_stance("force_eager"), casting, ends_together(self):
                yield self.model
        finally:
            self.model.train()
            if self.packing:
                self.model.set_attn_implementation(PACKED)

    def compile_layers(self) -> int:
        """Compile every decoder layer with `torch.compile`; returns how many. Shapes stay dynamic."""
        names = set(self.model._no_split_modules or ())
        layers = [module for module in self.body.modules() if type(module).__name__ in names]
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(layers) + 8)
        for layer in layers:
            layer.compile(dynamic=True)
        return len(layers)


def can_compile() -> bool:
    """Whether this machine has what `torch.compile` needs: a C++ compiler, or a GPU."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def require_compiler(settings: Train) -> None:
    """Raise RunError when `settings` ask for `torch.compile` and this machine cannot: before anything is written."""
    if settings.compile == "always" and settings.shard != "none":
        raise RunError(
            "train.compile=always is not for weights spread over processes (train.shard=fsdp), whose layers are put "
            "together between what a compiler could join. Set train.compile=never, or train.shard=none."
        )
    if settings.compile == "always" and not can_compile():
        raise RunError(
            "train.compile=always needs a C++ compiler (g++ or clang++). Install one, or set train.compile=never."
        )


def check_head(trained: TrainedModel, batch: Batch) -> None:
    """Prove on one batch of one row that our head gives the loss that the model's own logits give.

    Raises:
        ModelError: the model does something to its logits that `head_of` does not know.
    """
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        ours = trained(batch)
        with ends_together(trained):
            logits = trained.model(
                input_ids=batch.token_ids,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=batch.predictors,
                **trained.rows_of(batch),
            ).logits[0]
        losses = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        theirs = (losses * batch.weights).sum()
    if not torch.isclose(ours, theirs, rtol=2e-2, atol=1e-3):
        raise ModelError(
            f"The model's own logits give a loss of {theirs:.5f} where the training step computes {ours:.5f}: its "
            f"output layer does something weitiao does not know. Please report the model's config.json."
        )
