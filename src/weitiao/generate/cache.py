"""The engine's key/value cache: one block of memory per layer, in which a row's token at position p lies in column p.

Where the model has learnt keys and values that stand before every row (P-Tuning v2), they lie in the first P columns of
all rows, those not in use included, and the token at position p in column P + p.

Knows tensors and transformers' cache interface; knows nothing of prompts or of how tokens are chosen.

Shapes: T new tokens of all rows, end to end; L layers, K key/value heads, D head size, P learnt columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..models.learnt_prefix import learnt_prefix_of
from ..models.own_weights import computing_dtype

SPARE_COLUMNS = 64
"""Columns added whenever the cache is full: one copy of the cache in 64 steps instead of one in each."""


@dataclass(kw_only=True)
class Slots:
    """Where the new tokens of one call of the model belong: the same for all layers."""

    rows: Tensor | None = None
    """``[T]``, the row of each."""
    columns: Tensor | None = None
    """``[T]``, the column of each."""


class SlabLayer(CacheLayerMixin):
    """One layer's keys and values ``[rows, K, columns, D]``, written in place.

    Every layer keeps all columns: a sliding window is the attention's business.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: Slots, shape: tuple[int, int], past: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots
        self.shape = shape
        self.past = past
        """Learnt keys and values ``[K, P, D]`` of this layer."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set aside zeros for keys and values such as these, ``[…, K, …, D]``, behind the learnt ones."""
        # Zeros: a masked column still enters the sum, as 0 times its value, and a stray NaN in fresh memory would too.
        self.keys, self.values = (
            x.new_zeros(self.shape[0], x.shape[1], self.shape[1], x.shape[3]) for x in (key_states, value_states)
        )
        if self.past is not None:
            for states, learnt in zip((self.keys, self.values), self.past, strict=True):
                states[:, :, : learnt.shape[1]] = learnt
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write ``[1, K, T, D]`` to its slots; returns the whole slabs ``[rows, K, columns, D]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[self.slots.rows, :, self.slots.columns] = key_states[0].transpose(0, 1)
        self.values[self.slots.rows, :, self.slots.columns] = value_states[0].transpose(0, 1)
        return self.keys, self.values

    def resize(self, shape: tuple[int, int]) -> None:
        """Take new memory of `shape` (rows, columns), in which all tokens that fit keep their place."""
        self.shape = shape
        if not self.is_initialized:
            return
        keys, values = self.keys, self.values
        self.lazy_initialization(keys, values)
        rows, columns = min(shape[0], len(keys)), min(shape[1], keys.shape[2])
        self.keys[:rows, :, :columns] = keys[:rows, :, :columns]
        self.values[:rows, :, :columns] = values[:rows, :, :columns]

    def release(self) -> None:
        """Give all memory back."""
        if self.is_initialized:
            del self.keys, self.values
            self.is_initialized = False

    def get_seq_length(self) -> int:
        """0: what a row has seen is told by its positions, not by the width of the memory."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked for by transformers although the engine's attention needs no mask."""
        return query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


class SlabCache(Cache):
    """The cache of all layers; each row keeps its place until it is moved."""

    slabs: list[SlabLayer]

    def __init__(self, num_layers: int, past_states: tuple[Tensor, Tensor] | None = None) -> None:
        """
        Args:
            num_layers: L.
            past_states: learnt keys and values, both ``[L, K, P, D]``, that stand before every row.
        """
        self.slots = Slots()
        self.shape = (0, 0)
        """Rows and columns set aside."""
        self.num_past = 0 if past_states is None else past_states[0].shape[2]
        """P."""
        pasts = [None] * num_layers if past_states is None else zip(*past_states, strict=True)
        self.slabs = [SlabLayer(self.slots, self.shape, past) for past in pasts]
        super().__init__(layers=list(self.slabs))

    def reserve(self, *, num_rows: int, num_tokens: int) -> None:
        """Make room for `num_rows` rows of `num_tokens` tokens."""
        rows, columns = self.shape
        num_columns = self.num_past + num_tokens
        if num_rows <= rows and num_columns <= columns:
            return
        self.shape = (max(num_rows, rows), columns if num_columns <= columns else num_columns + SPARE_COLUMNS)
        for layer in self.slabs:
            layer.resize(self.shape)

    def shrink(self, *, num_rows: int, num_tokens: int) -> None:
        """Give memory back where rows and tokens need less than half of either: so a long row leaves nothing behind."""
        rows, columns = self.shape
        num_columns = self.num_past + num_tokens + SPARE_COLUMNS
        if num_rows == 0:
            self.shape = (0, 0)
            for layer in self.slabs:
                layer.shape = self.shape
                layer.release()
        elif 2 * num_rows <= rows or 2 * num_columns <= columns:
            self.shape = (min(rows, num_rows), min(columns, num_columns))
            for layer in self.slabs:
                layer.resize(self.shape)

    @property
    def num_bytes(self) -> int:
        """The memory that is set aside."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.slabs if layer.is_initialized)

    def read_row(self, row: int, start: int, end: int) -> Tensor | None:
        """A copy ``[L, 2, K, end - start, D]`` of a row's tokens; None where layers differ in size."""
        first = self.slabs[0].keys
        if any(states.shape != first.shape for layer in self.slabs for states in (layer.keys, layer.values)):
            return None
        columns = slice(self.num_past + start, self.num_past + end)
        return torch.stack([torch.stack([s[row, :, columns] for s in (x.keys, x.values)]) for x in self.slabs])

    def write_row(self, row: int, start: int, states: Tensor) -> None:
        """Put ``[L, 2, K, n, D]`` in the place of a row's tokens from `start` on; there is room for them."""
        columns = slice(self.num_past + start, self.num_past + start + states.shape[3])
        for layer, (keys, values) in zip(self.slabs, states, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[row, :, columns] = keys
            layer.values[row, :, columns] = values

    def move_row(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of row `source` over row `target`."""
        num_columns = self.num_past + num_tokens
        for layer in self.slabs:
            for states in (layer.keys, layer.values):
                states[target, :, :num_columns] = states[source, :, :num_columns]


def cache_bytes(
    model: PreTrainedModel, *, longest_prompt: int, max_new_tokens: int, num_rows: int, max_cache_tokens: int = 65536
) -> int:
    """The memory that generation sets aside for keys and values at most, when `num_rows` rows run together."""
    config = model.config.get_text_config()
    encoder = learnt_prefix_of(model)
    num_past = 0 if encoder is None else encoder.num_virtual_tokens
    columns = num_past + longest_prompt + max_new_tokens
    rows = max(1, min(num_rows, max_cache_tokens // columns))
    num_heads = config.num_attention_heads
    num_kv = getattr(config, "num_key_value_heads", None) or num_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    numbers = 2 * config.num_hidden_layers * num_kv * size * rows * (columns + SPARE_COLUMNS)
    return int(numbers * computing_dtype(model).itemsize)
