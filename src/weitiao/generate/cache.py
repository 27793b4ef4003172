"""The engine's key/value cache: one block of memory per layer, written in place, rows ending at a common column.

Knows tensors and transformers' cache interface; knows nothing of prompts or of how tokens are chosen.

Shapes: R rows of this call, C columns in use, Q new columns, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

SPARE_COLUMNS = 64
"""Columns added whenever the cache is full: one copy of the cache in 64 steps instead of one in each."""


@dataclass(kw_only=True)
class Window:
    """The part of the cache that one call of the model works on: rows top..bottom, columns first..end."""

    top: int = 0
    bottom: int = 0
    first: int = 0
    end: int = 0


class SlabLayer(CacheLayerMixin):
    """One layer's keys and values ``[rows, K, columns, D]``, larger than what is in use, written in place.

    Every layer keeps all columns: a sliding window is the mask's business.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, window: Window, shape: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = window
        self.shape = shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set aside zeros for keys and values such as these, ``[R, K, Q, D]``."""
        # Zeros: a masked column still enters the sum, as 0 times its value, and a stray NaN in fresh memory would too.
        self.keys, self.values = (
            x.new_zeros(self.shape[0], x.shape[1], self.shape[1], x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write ``[R, K, Q, D]`` after the window; returns keys and values ``[R, K, C + Q, D]`` to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen, end = self.window, self.window.end + key_states.shape[2]
        keys, values = self.keys[seen.top : seen.bottom, :, :end], self.values[seen.top : seen.bottom, :, :end]
        keys[:, :, seen.end :] = key_states
        values[:, :, seen.end :] = value_states
        return keys[:, :, seen.first :], values[:, :, seen.first :]

    def resize(self, shape: tuple[int, int], *, source: slice, target: slice) -> None:
        """Take new memory of `shape` (rows, columns) and copy the columns `source` of all rows to `target`."""
        self.shape = shape
        if not self.is_initialized:
            return
        keys, values = self.keys, self.values
        self.lazy_initialization(keys, values)
        self.keys[: len(keys), :, target] = keys[:, :, source]
        self.values[: len(values), :, target] = values[:, :, source]

    def get_seq_length(self) -> int:
        """C, the columns that the window shows."""
        return self.window.end - self.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns attended to and the first of them, counted from the window's."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1


class SlabCache(Cache):
    """The cache of all layers; its rows end at a common column, and each row keeps its place until it is moved."""

    slabs: list[SlabLayer]

    def __init__(self, num_layers: int) -> None:
        self.window = Window()
        self.shape = (0, 0)
        """Rows and columns set aside."""
        self.slabs = [SlabLayer(self.window, self.shape) for _ in range(num_layers)]
        super().__init__(layers=list(self.slabs))

    def reserve(self, *, num_rows: int, width: int, num_new: int) -> None:
        """Make room for `num_rows` rows of `width` columns left of the common end and `num_new` right of it."""
        end = self.window.end
        rows, columns = self.shape
        if num_rows <= rows and width <= end and end + num_new <= columns:
            return
        self.shape = (max(num_rows, rows), width + num_new + SPARE_COLUMNS)
        kept = min(width, end)
        for layer in self.slabs:
            layer.resize(self.shape, source=slice(end - kept, end), target=slice(width - kept, width))
        self.window.end = width

    def show(self, *, rows: range, width: int, back: int = 0) -> None:
        """Let the next call work on `rows` and on the `width` columns that end `back` columns before the end."""
        window = self.window
        window.top, window.bottom = rows.start, rows.stop
        window.end -= back
        window.first = window.end - width

    def move_row(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        for layer in self.slabs:
            for states in (layer.keys, layer.values):
                states[target] = states[source]
