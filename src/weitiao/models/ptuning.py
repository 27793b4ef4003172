"""P-Tuning v2: learnt keys and values that stand before every row, in every layer (Liu et al. 2021, arXiv:2110.07602).

They are learnt themselves, or through a small network, and are not rotated; how they reach attention, learnt_prefix.py
says. All other parameters are frozen. The parameters have the names and shapes of the ChatGLM releases' own prefix
encoders, so their checkpoints are read and written as they are (prefix_files.py).

Shapes: P tokens of prefix, L layers, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .learnt_prefix import (
    LearntPrefix,
    PrefixShape,
    learnt_prefix_of,
    prefix_shape,
    prefix_states,
    put_prefix,
    unit_of,
    without_prefix,
)
from .prompt_tuning import states_of_words

__all__ = [
    "PrefixEncoder",
    "PrefixShape",
    "attach_original_prefix",
    "attach_prefix",
    "prefix_encoder_of",
    "prefix_shape",
    "prefix_states",
    "put_prefix",
    "without_prefix",
]


class PrefixEncoder(LearntPrefix):
    """The prefix's parameters, always float32; a call gives keys and values, both ``[L, K, P, D]``.

    Directly: ``embedding`` ``[P, 2LKD]``. With a projection: ``embedding`` ``[P, E]``, ``trans.0`` ``[H, E]``, tanh,
    ``trans.2`` ``[2LKD, H]``, where H is the hidden size; E is H as in ChatGLM-6B, or 2LKD as in ChatGLM2 and ChatGLM3.
    Of the 2L parts of a token's numbers, part 2i holds the keys of layer i and part 2i + 1 its values.

    Numbers that are learnt directly are learnt in `units`, for each part a power of two: keys and values differ tenfold
    in size from layer to layer, and one learning rate is to suit them all.
    """

    units: Tensor
    """``[L, 2, 1, 1]``; 1 until `take_units`."""

    def __init__(
        self,
        shape: PrefixShape,
        *,
        num_virtual_tokens: int,
        projection: bool,
        embedding_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        """
        Args:
            shape: the model's sizes.
            num_virtual_tokens: P, the original configurations' ``pre_seq_len``.
            projection: learn the prefix through a network of two layers.
            embedding_size: E; H by default. Without a projection there is no choice.
            dropout: on the prefix while training, 0–1.
        """
        super().__init__(shape)
        self.projection = projection
        self.dropout = dropout
        size = (embedding_size or shape.hidden_size) if projection else shape.num_numbers
        self.embedding = nn.Embedding(num_virtual_tokens, size)
        if projection:
            self.trans = nn.Sequential(
                nn.Linear(size, shape.hidden_size), nn.Tanh(), nn.Linear(shape.hidden_size, shape.num_numbers)
            )
        self.register_buffer("units", torch.ones(shape.num_layers, 2, 1, 1), persistent=False)

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.embedding.num_embeddings

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, both ``[L, K, P, D]`` and float32; with dropout in training mode."""
        numbers = self.trans(self.embedding.weight) if self.projection else self.embedding.weight
        parts = self._parts(numbers) * self.units
        parts = nn.functional.dropout(parts, self.dropout, training=self.training)
        keys, values = parts.permute(2, 1, 3, 0, 4)
        return keys, values

    def _parts(self, numbers: Tensor) -> Tensor:
        """`numbers` ``[P, 2LKD]`` as ``[P, L, 2, K, D]``."""
        shape = self.shape
        return numbers.view(self.num_virtual_tokens, shape.num_layers, 2, shape.num_heads, shape.head_size)

    @torch.no_grad()
    def start_from(self, keys: Tensor, values: Tensor) -> None:
        """Let a prefix without projection hold these keys and values, both ``[L, K, P, D]``."""
        self._parts(self.embedding.weight).copy_(torch.stack([keys, values]).permute(3, 1, 0, 2, 4) / self.units)

    @torch.no_grad()
    def take_units(self) -> None:
        """Learn in units near the spread of what is held; that stays what it is. Nothing changes with a projection."""
        if self.projection:
            return
        parts = self._parts(self.embedding.weight)
        whole = parts * self.units
        self.units.copy_(unit_of(whole.transpose(0, 2).flatten(2).std(dim=-1)).t()[..., None, None])
        parts.copy_(whole / self.units)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What is learnt, by the originals' names and in their units."""
        held = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        if not self.projection:
            whole = self._parts(self.embedding.weight) * self.units
            held["embedding.weight"] = whole.reshape(self.num_virtual_tokens, -1)
        return held

    def states(self, decoder: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """The same, of any model of that shape."""
        keys, values = self()
        return keys, values


def attach_prefix(
    model: PreTrainedModel,
    *,
    num_virtual_tokens: int,
    projection: bool,
    dropout: float = 0.0,
    vocabulary: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """`model` itself with a fresh trainable prefix in its submodule ``prefix_encoder``; everything else is frozen.

    The prefix starts from `seed` alone, drawn as the originals draw it: the embedding from N(0, 1), the layers of the
    projection uniformly as `nn.Linear` does. A prefix that was there is replaced. With `vocabulary`, and where there is
    no projection, it starts from the keys and values of words drawn at random (Li & Liang 2021, arXiv:2101.00190,
    section 7.4): learnt prefixes of few rows come out better, and the model answers as before at the start.

    Raises:
        ModelError: the model's layers cannot take a prefix.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = PrefixEncoder(
            prefix_shape(model),
            num_virtual_tokens=num_virtual_tokens,
            projection=projection,
            embedding_size=_embedding_size(model),
            dropout=dropout,
        )
    if vocabulary and not projection:
        encoder.to(model.device).start_from(*states_of_words(model, num_words=num_virtual_tokens, seed=seed))
        encoder.take_units()
    model.requires_grad_(False)
    put_prefix(model, encoder)
    return model


def attach_original_prefix(
    model: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str = "the checkpoint"
) -> PreTrainedModel:
    """`model` itself with the prefix that `tensors` hold, frozen like everything else.

    Args:
        model: the model that the prefix was tuned on.
        config: what says how the prefix should be: ``pre_seq_len`` and ``prefix_projection``, as far as it holds them.
        tensors: the prefix encoder's, by their original names, with or without what stands before ``embedding`` or
            ``trans``; other names are refused.
        where: the file or folder they come from, for errors.

    Raises:
        ModelError: they are no prefix encoder, not the one that `config` tells of, or do not fit the model.
    """
    own = {name.rpartition("prefix_encoder.")[2]: tensor for name, tensor in tensors.items()}
    direct = own.keys() == {"embedding.weight"}
    projected = own.keys() == {"embedding.weight", *(f"trans.{n}.{kind}" for n in "02" for kind in ("weight", "bias"))}
    if not (direct or projected) or own["embedding.weight"].ndim != 2:
        raise ModelError(
            f"{where} holds no whole prefix encoder: embedding.weight is wanted, with or without the weights and "
            f"biases of trans.0 and trans.2, and there are {', '.join(sorted(own)) or 'none'}."
        )
    length, size = own["embedding.weight"].shape
    said_length, said_projection = config.get("pre_seq_len"), config.get("prefix_projection")
    if said_length not in (None, length):
        raise ModelError(
            f"The prefix in {where} has {length} tokens, but pre_seq_len is {said_length}. Set it to {length}, or give "
            f"the prefix of {said_length} tokens."
        )
    if said_projection is not None and bool(said_projection) != projected:
        raise ModelError(
            f"The prefix in {where} has {'a' if projected else 'no'} projection, but prefix_projection is "
            f"{str(bool(said_projection)).lower()}. Set it to {str(projected).lower()}, or give the other prefix."
        )
    shape = prefix_shape(model)
    encoder = PrefixEncoder(shape, num_virtual_tokens=length, projection=projected, embedding_size=size)
    wrong = [
        f"{name} is {list(own[name].shape)} where {list(wanted.shape)} is wanted"
        for name, wanted in encoder.state_dict().items()
        if own[name].shape != wanted.shape
    ]
    if wrong:
        raise ModelError(
            f"The prefix in {where} was tuned on another model: {'; '.join(wrong)}. This one has {shape.num_layers} "
            f"layers with {shape.num_heads} key heads of {shape.head_size} and a hidden size of {shape.hidden_size}."
        )
    encoder.load_state_dict(dict(own))
    put_prefix(model, encoder)
    model.requires_grad_(False)
    return model


def _embedding_size(model: PreTrainedModel) -> int | None:
    """E: what ChatGLM2 and ChatGLM3, which are transformers' Glm, have in their checkpoints; None: the hidden size."""
    return prefix_shape(model).num_numbers if model.config.model_type == "glm" else None


def prefix_encoder_of(model: PreTrainedModel | PeftModel) -> PrefixEncoder | None:
    """The P-Tuning v2 prefix of `model`, switched on or off; None where it has none."""
    found = learnt_prefix_of(model)
    return found if isinstance(found, PrefixEncoder) else None
