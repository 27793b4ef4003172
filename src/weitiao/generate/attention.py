"""Attention of many rows that each bring some new tokens, end to end in one sequence, to what the cache holds of them.

Every linear layer sees one sequence ``[1, T, hidden]`` without padding, whether a row brings one token or a thousand;
only attention knows rows. Registered in transformers' own attention interface, so that any model that supports that
interface can be run. Knows tensors only.

A token sees itself and what came before it in its row, and beside that its row's context, where rows have one, and the
learnt keys and values that lie in the first columns of every row (P-Tuning v2).

Shapes: T new tokens, R rows, H query heads, K key/value heads (H = K · G), C columns of the cache, P learnt ones among
them, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import ModelError

ROWS = "weitiao_rows"
"""The name under which this attention is known to transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The new tokens of one row."""

    start: int
    """Position of the first of them: the number of tokens cached before."""
    num_tokens: int
    prefix: int = 0
    """How many tokens of the row, from the first on, all its tokens see. They must come in one chunk, the row's first:
    what is cached no longer changes, so it could not see what comes after."""

    def __post_init__(self) -> None:
        if self.prefix > (self.start or self.num_tokens):
            raise ValueError(
                f"A context of {self.prefix} tokens is cut: {self.start} are cached and {self.num_tokens} come. Give "
                "the whole context in the row's first chunk."
            )

    @property
    def end(self) -> int:
        """Number of tokens cached after."""
        return self.start + self.num_tokens

    def first_seen(self, window: int) -> int:
        """The first position that any of the tokens looks at."""
        return max(0, self.start + 1 - window) if window else 0


@dataclass(kw_only=True, slots=True)
class Chunks:
    """What attention must know of one call of the model: chunk i belongs to row `top` + i of the cache."""

    top: int
    chunks: Sequence[Chunk]
    device: torch.device
    num_past: int = 0
    """P: a row's token at position p lies in column P + p, and the columns before are seen by every token."""
    exact: bool = False
    """Attend row by row, as transformers does for a row alone."""
    num_calls: int = 0
    """How many layers have attended: a model that goes another way is found out."""
    firsts: list[int] = field(init=False)
    """Where each chunk begins in the sequence."""
    last: Tensor = field(init=False)
    """``[R]``, where each chunk's last token lies in the sequence."""
    _masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)
    """Made once for all layers, by the place of the chunk (none: all together) and the window."""

    def __post_init__(self) -> None:
        counts = [chunk.num_tokens for chunk in self.chunks]
        self.firsts = list(accumulate(counts, initial=0))[:-1]
        self.last = torch.tensor([first + count - 1 for first, count in zip(self.firsts, counts)], device=self.device)

    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and position of every token, each ``[T]``."""
        rows = [self.top + place for place, chunk in enumerate(self.chunks) for _ in range(chunk.num_tokens)]
        positions = [position for chunk in self.chunks for position in range(chunk.start, chunk.end)]
        both = torch.tensor([rows, positions]).to(self.device, non_blocking=True)
        return both[0], both[1] + self.num_past if self.num_past else both[1], both[1]

    def seen(self, window: int) -> tuple[int, int]:
        """The columns, from … to, that the last token of any row looks at."""
        ends = [chunk.end for chunk in self.chunks]
        return max(0, min(ends) - window) if window and not self.num_past else 0, max(ends) + self.num_past

    def mask_of_last(self, window: int, dtype: torch.dtype) -> Tensor:
        """``[R, 1, 1, C]``: 0 where a row's last token may look, -inf elsewhere."""
        if (None, window) not in self._masks:
            first, end = self.seen(window)
            positions = torch.arange(first, end) - self.num_past
            ends = torch.tensor([chunk.end for chunk in self.chunks])[:, None]
            hidden = positions >= ends
            if window:
                hidden |= (positions >= 0) & (positions < ends - window)
            self._masks[None, window] = self._scores(hidden, dtype)[:, None, None]
        return self._masks[None, window]

    def mask_of_chunk(self, place: int, window: int, dtype: torch.dtype) -> Tensor:
        """``[1, 1, Q, C]``: 0 where the chunk's tokens may look, of the columns in sight of any of them."""
        if (place, window) not in self._masks:
            chunk = self.chunks[place]
            query = torch.arange(chunk.start, chunk.end)[:, None]
            own = torch.arange(chunk.first_seen(window), chunk.end)
            position = torch.cat([torch.arange(-self.num_past, 0), own])[None, :]
            hidden = (position > query) & (position >= chunk.prefix)
            if window:
                hidden |= (position >= 0) & (position <= query - window)
            self._masks[place, window] = self._scores(hidden, dtype)[None, None]
        return self._masks[place, window]

    def in_sight(self, states: Tensor, place: int, window: int) -> Tensor:
        """The columns ``[1, K, C, D]`` of the slab `states` that any token of a chunk looks at."""
        chunk = self.chunks[place]
        row, first, end = states[self.top + place, None], chunk.first_seen(window), self.num_past + chunk.end
        if first and self.num_past:
            return torch.cat([row[:, :, : self.num_past], row[:, :, self.num_past + first : end]], dim=2)
        return row[:, :, first:end]

    def is_plain(self, place: int, window: int) -> bool:
        """Whether a chunk needs no mask: one token, which sees all that is in sight, or a row that is causal."""
        chunk = self.chunks[place]
        causal = chunk.start == 0 and not self.num_past and chunk.prefix <= 1 and not 0 < window < chunk.end
        return chunk.num_tokens == 1 or causal

    def _scores(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        scores = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return scores.to(self.device, non_blocking=True)


@contextmanager
def attending_by_rows(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within this the model attends by rows; after it, as before. Costs milliseconds, and nothing inside another."""
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    before = base.config._attn_implementation
    if before == ROWS:
        yield
        return
    base.set_attn_implementation(ROWS)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    chunks: Chunks,
    **_: object,  # transformers hands every attention function the same wide set of arguments
) -> tuple[Tensor, None]:
    """Attention output ``[1, T, H, D]``.

    Rows that bring one token attend together, in one call with a mask; the others one by one, without padding.

    Args:
        module: the attention layer.
        query: ``[1, H, T, D]``.
        key: the cache's ``[rows, K, columns, D]``, new tokens included.
        value: the same.
        attention_mask: none, see `_no_mask`.
        scaling: factor on the scores.
        sliding_window: how many tokens a token may look at, itself included.
        softcap: bound of the scores.
        position_bias: refused.
        s_aux: refused.
        chunks: the engine's own, handed on by the model's forward.
    """
    if attention_mask is not None or position_bias is not None or s_aux is not None:
        raise ModelError(
            f"The attention of {type(module).__name__} uses a mask, a position bias or sinks of its own, which batched "
            "generation cannot honour. Use model.generate."
        )
    chunks.num_calls += 1
    window = sliding_window or 0
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if window and any(chunk.prefix for chunk in chunks.chunks):
        raise ModelError(
            f"{type(module).__name__} looks at the last {window} tokens only, which would hide a part of the context "
            "from tokens that must see all of it. Use model.generate."
        )
    num_heads, size = query.shape[1], value.shape[-1]
    out = query.new_empty(query.shape[2], num_heads, size)
    together = not chunks.exact and any(chunk.num_tokens == 1 for chunk in chunks.chunks)
    if together:
        rows, (first, end) = slice(chunks.top, chunks.top + len(chunks.chunks)), chunks.seen(window)
        mask = chunks.mask_of_last(window, query.dtype)
        last = query[0, :, chunks.last].transpose(0, 1)
        out[chunks.last] = _attend_one(
            last, key[rows, :, first:end], value[rows, :, first:end], mask=mask, scale=scale, softcap=softcap
        )
    for place, chunk in enumerate(chunks.chunks):
        if chunk.num_tokens == 1 and together:
            continue
        here = slice(chunks.firsts[place], chunks.firsts[place] + chunk.num_tokens)
        keys, values = (chunks.in_sight(states, place, window) for states in (key, value))
        if softcap:
            capped = chunks.mask_of_chunk(place, window, query.dtype)
            out[here] = _attend_capped(query[:, :, here], keys, values, capped, scale, softcap)[0].transpose(0, 1)
            continue
        bias = None if chunks.is_plain(place, window) else chunks.mask_of_chunk(place, window, query.dtype)
        # transformers' own, whose way of sharing key heads decides how results are rounded
        out[here] = sdpa_attention_forward(module, query[:, :, here], keys, values, bias, scaling=scale)[0][0]
    return out[None], None


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention ``[R, H, D]`` of one query of each row ``[R, H, D]`` over ``[R, K, C, D]``."""
    # Query heads that share a key head become its queries: keys are not repeated.
    shared = query.reshape(query.shape[0], key.shape[1], -1, query.shape[2])
    if softcap:
        return _attend_capped(shared, key, value, mask, scale, softcap).reshape(query.shape[0], query.shape[1], -1)
    out = scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scale)
    return out.reshape(query.shape[0], query.shape[1], -1)


def _attend_capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention with soft-capped scores, which SDPA does not know: ``[R, H, Q, D]``, softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap + mask
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(query.dtype), value)


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """Attention by rows needs no mask, so none is built."""


AttentionInterface.register(ROWS, _attend)
AttentionMaskInterface.register(ROWS, _no_mask)
