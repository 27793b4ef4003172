"""Keys and values that were learnt and stand before every row, in every layer, whatever they are learnt by.

P-Tuning v2 learns them themselves (ptuning.py); prompt tuning and P-Tuning learn tokens, of which the model makes them
(prompt_tuning.py). They take no positions of a row, whose first token stays at 0, and every token sees all of them, in
layers with a sliding window too.

Attention over packed rows and over the engine's cache takes them from `prefix_states`. Everything else calls the
model as any transformers model: hooks then put them before each layer's own keys and values, and before its mask.

Shapes: P learnt tokens, L layers, K key/value heads, D head size, b rows, s new tokens, c columns of keys.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from ..errors import ModelError

_GIVEN = "prefix_given"
"""The keyword by which a prefix travels from the decoder to its attention layers."""

_PACKED_KEYWORDS = ("row_starts", "chunks")
"""What tells a call of packed or row-wise attention, which see to the prefix themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixShape:
    """The sizes of a model that a prefix must fit."""

    num_layers: int
    num_heads: int
    """Key/value heads."""
    head_size: int
    hidden_size: int

    @property
    def num_numbers(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_size


@dataclass(kw_only=True, slots=True)
class _Given:
    """The prefix of one call of the decoder."""

    states: tuple[Tensor, Tensor]
    """Keys and values, both ``[L, K, P, D]``."""
    layers: set[int] = field(default_factory=set)
    """Those that have taken it."""


class _CacheBehindPrefix:
    """What an attention layer takes for its cache: the real one, if any, which never holds the prefix."""

    def __init__(self, cache: Cache | None, given: _Given, num_seen: int | None) -> None:
        """
        Args:
            cache: the real one.
            given: the prefix.
            num_seen: how many columns the layer's mask is made for; None: for all.
        """
        self.cache = cache
        self.given = given
        self.num_seen = num_seen

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[b, K, P + c, D]`` of the prefix, of what is cached and of the new tokens."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        longer = []
        for states, own in zip(self.given.states, (keys, values), strict=True):
            prefix = states[layer_idx].expand(len(own), -1, -1, -1).to(own)
            longer.append(torch.cat([prefix, own[..., : self.num_seen, :]], dim=-2))
        return longer[0], longer[1]


class LearntPrefix(nn.Module, ABC):
    """What learns the keys and values before every row; its parameters are float32 always."""

    def __init__(self, shape: PrefixShape) -> None:
        """`shape`: the model's sizes."""
        super().__init__()
        self.shape = shape
        self.on = True
        """Whether the model has its prefix at the moment, see `without_prefix`."""
        self.hooks: list[RemovableHandle] = []

    @property
    @abstractmethod
    def num_virtual_tokens(self) -> int:
        """P."""

    @abstractmethod
    def states(self, decoder: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Keys and values, both ``[L, K, P, D]``, of the model whose layers `decoder` holds; with gradients."""

    def before_decoder(
        self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Hook: give the call of the decoder its prefix."""
        if not self.on or any(kwargs.get(name) is not None for name in _PACKED_KEYWORDS):
            return None
        implementation = cast(PreTrainedModel, decoder).config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ModelError(
                f"A learnt prefix is computed with sdpa or eager attention, but the model is set to "
                f"{implementation!r}. Load it with attn_implementation='sdpa'."
            )
        return args, {**kwargs, _GIVEN: _Given(states=self.states(cast(PreTrainedModel, decoder)))}

    def after_decoder(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Hook: a model that goes another way must not lose its prefix unnoticed."""
        given: _Given | None = kwargs.get(_GIVEN)
        if given is not None and len(given.layers) != self.shape.num_layers:
            raise ModelError(
                f"{len(given.layers)} of {self.shape.num_layers} layers of {type(decoder).__name__} took the prefix, "
                f"so P-Tuning cannot be used with this model. Use LoRA."
            )

    def before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Hook: put the prefix before the keys, values and mask of one layer."""
        given: _Given | None = kwargs.get(_GIVEN)
        if given is None:
            return None
        named = dict(zip(inspect.signature(attention.forward).parameters, args)) | kwargs
        del named[_GIVEN]
        layer: Any = attention
        given.layers.add(layer.layer_idx)
        mask, length = named.get("attention_mask"), named["hidden_states"].shape[1]
        num_seen = None
        if mask is None and length > 1 and layer.config._attn_implementation == "sdpa":
            # No mask means to sdpa that the new tokens are the first, and that each sees those before it. A cache of a
            # fixed size has more columns than that, all of them empty.
            num_seen = length
            mask = torch.ones(length, length, dtype=torch.bool, device=named["hidden_states"].device).tril()[None, None]
        named["attention_mask"] = None if mask is None else _lengthened(mask, self.num_virtual_tokens)
        named["past_key_values"] = _CacheBehindPrefix(named.get("past_key_values"), given, num_seen)
        return (), named


def _lengthened(mask: Tensor, num_virtual_tokens: int) -> Tensor:
    """The mask of a layer with columns before it that every token sees.

    Args:
        mask: ``[b, 1, s, c]``, boolean (True is seen) or scores to be added.
        num_virtual_tokens: how many columns.
    """
    if mask.ndim != 4:
        raise ModelError(f"The prefix cannot be put before an attention mask of shape {list(mask.shape)}.")
    return nn.functional.pad(mask, (num_virtual_tokens, 0), value=True if mask.dtype == torch.bool else 0.0)


def unit_of(spread: Tensor) -> Tensor:
    """The powers of two next to `spread`, by which multiplying and dividing is exact; 1 where it is 0 or not finite."""
    usable = spread.isfinite() & (spread > 0)
    return torch.where(usable, spread, 1.0).log2().round().exp2()


def put_prefix(model: PreTrainedModel, encoder: LearntPrefix) -> None:
    """Make `encoder` the prefix of `model`; of the model's own device and mode, whatever its dtype float32.

    Raises:
        ModelError: the model's layers cannot take a prefix.
    """
    layers = _attention_layers(model)
    previous = learnt_prefix_of(model)
    for hook in previous.hooks if previous is not None else []:
        hook.remove()
    model.add_module("prefix_encoder", encoder.to(model.device, torch.float32).train(model.training))
    decoder = model.get_decoder()
    encoder.hooks = [
        decoder.register_forward_pre_hook(encoder.before_decoder, with_kwargs=True),
        decoder.register_forward_hook(encoder.after_decoder, with_kwargs=True),
        *(layer.register_forward_pre_hook(encoder.before_attention, with_kwargs=True) for layer in layers),
    ]


def prefix_shape(model: PreTrainedModel) -> PrefixShape:
    """The sizes that a prefix of `model` must have. Raises ModelError where it has no attention."""
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None)
    if num_heads is None:
        raise ModelError(f"{type(model).__name__} has no attention, which P-Tuning needs in every layer. Use LoRA.")
    return PrefixShape(
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        hidden_size=config.hidden_size,
    )


def _attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of every layer. Raises ModelError where there is not one of the model's head size in each."""
    shape = prefix_shape(model)
    found: dict[int, nn.Module] = {}
    for module in model.get_decoder().modules():
        layer: Any = module
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int):
            found[layer.layer_idx] = module
    alike = all(getattr(module, "head_dim", None) == shape.head_size for module in found.values())
    if sorted(found) != list(range(shape.num_layers)) or not alike:
        raise ModelError(
            f"P-Tuning needs a model with one attention of {shape.head_size} features a head in each of its "
            f"{shape.num_layers} layers; {type(model).__name__} has {len(found)}, or of other sizes. Use LoRA."
        )
    return [found[place] for place in sorted(found)]


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def learnt_prefix_of(model: PreTrainedModel | PeftModel) -> LearntPrefix | None:
    """What `model` has learnt before its rows, switched on or off; None where it has nothing."""
    found = getattr(_plain(model), "prefix_encoder", None)
    return found if isinstance(found, LearntPrefix) else None


def prefix_states(model: PreTrainedModel | PeftModel) -> tuple[Tensor, Tensor] | None:
    """Keys and values of the prefix, both ``[L, K, P, D]`` in the model's dtype, with a way back for gradients.

    None where the model has no prefix, or where it is switched off. In training mode every call drops out anew.
    """
    encoder = learnt_prefix_of(model)
    if encoder is None or not encoder.on:
        return None
    base = _plain(model)
    keys, values = encoder.states(base.get_decoder())
    dtype = base.dtype
    return keys.to(dtype), values.to(dtype)


@contextmanager
def without_prefix(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within this `model` computes without its prefix, as it did before it was tuned."""
    encoder = learnt_prefix_of(model)
    before = encoder is not None and encoder.on
    try:
        if encoder is not None:
            encoder.on = False
        yield
    finally:
        if encoder is not None:
            encoder.on = before
