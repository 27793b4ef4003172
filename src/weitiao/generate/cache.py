"""The engine's key/value cache: one block of memory per layer, in which a row's token at position p lies in column p.

Knows tensors and transformers' cache interface; knows nothing of prompts or of how tokens are chosen.

Shapes: T new tokens of all rows, end to end; K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

SPARE_COLUMNS = 64
"""Columns added whenever the cache is full: one copy of the cache in 64 steps instead of one in each."""


@dataclass(kw_only=True)
class Slots:
    """Where the new tokens of one call of the model belong: the same for all layers."""

    rows: Tensor | None = None
    """``[T]``, the row of each."""
    columns: Tensor | None = None
    """``[T]``, the position of each in its row."""


class SlabLayer(CacheLayerMixin):
    """One layer's keys and values ``[rows, K, columns, D]``, written in place.

    Every layer keeps all columns: a sliding window is the attention's business.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: Slots, shape: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots
        self.shape = shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set aside zeros for keys and values such as these, ``[…, K, …, D]``."""
        # Zeros: a masked column still enters the sum, as 0 times its value, and a stray NaN in fresh memory would too.
        self.keys, self.values = (
            x.new_zeros(self.shape[0], x.shape[1], self.shape[1], x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write ``[1, K, T, D]`` to its slots; returns the whole slabs ``[rows, K, columns, D]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[self.slots.rows, :, self.slots.columns] = key_states[0].transpose(0, 1)
        self.values[self.slots.rows, :, self.slots.columns] = value_states[0].transpose(0, 1)
        return self.keys, self.values

    def resize(self, shape: tuple[int, int]) -> None:
        """Take new memory of `shape` (rows, columns), in which all tokens keep their place."""
        self.shape = shape
        if not self.is_initialized:
            return
        keys, values = self.keys, self.values
        self.lazy_initialization(keys, values)
        self.keys[: len(keys), :, : keys.shape[2]] = keys
        self.values[: len(values), :, : values.shape[2]] = values

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

    def __init__(self, num_layers: int) -> None:
        self.slots = Slots()
        self.shape = (0, 0)
        """Rows and columns set aside."""
        self.slabs = [SlabLayer(self.slots, self.shape) for _ in range(num_layers)]
        super().__init__(layers=list(self.slabs))

    def reserve(self, *, num_rows: int, num_columns: int) -> None:
        """Make room for `num_rows` rows of `num_columns` tokens."""
        rows, columns = self.shape
        if num_rows <= rows and num_columns <= columns:
            return
        self.shape = (max(num_rows, rows), columns if num_columns <= columns else num_columns + SPARE_COLUMNS)
        for layer in self.slabs:
            layer.resize(self.shape)

    def move_row(self, source: int, target: int, num_columns: int) -> None:
        """Copy the first `num_columns` tokens of row `source` over row `target`."""
        for layer in self.slabs:
            for states in (layer.keys, layer.values):
                states[target, :, :num_columns] = states[source, :, :num_columns]
