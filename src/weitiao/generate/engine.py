"""Tokens in, tokens out: many prompts through one causal language model, as fast as the machine allows.

A decoding step costs nearly the same for one row as for dozens, because most of its time goes into reading the
weights. So rows share one batch; a row that ends leaves at once and a waiting prompt takes its place. Knows torch
and transformers models; knows nothing of text, messages, tasks or answer forms.

How the cache lies in memory, for three rows (p prompt, g generated, · unused); all rows end at the same column, so
transformers sees ordinary left padding and each step writes one column::

    · p p p p g g |        a row that ends: the last row is moved into its place
    p p p p p p g |        a row that joins: its prompt is prefilled in a free row, ending at the same column
    · · · · p p g |        the longest row ends: the columns left of the others are no longer read

Prompts run longest first, so a joining prompt is never wider than the rows already there.

Shapes: R rows of this call, C columns in use, Q new columns, H query heads, K key/value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..errors import DataError, ModelError, Problem
from .cache import SPARE_COLUMNS, SlabCache

_PREFILL_TOKENS = 4096
"""Most prompt tokens, padding included, of one prefill: bounds its activations; a longer prompt goes alone."""

_NUCLEUS_TOKENS = 1024
"""Draws look at this many best tokens first: sorting a vocabulary of 262 144 costs many times as much."""

_EXACT_ROWS = 32
"""Up to this many rows oneDNN's bf16 products round as for one row; from 33 on one result in 10 000 differs."""

_ROW_BY_ROW = "weitiao_row_by_row"
"""The name under which the attention of exact steps is known to transformers."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and how many at most."""

    max_new_tokens: int = 512
    """Most tokens of an answer; the stop token counts."""
    temperature: float = 0.0
    """0 takes the most probable token; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw only from the fewest tokens that hold this probability together; 1 is off."""
    top_k: int = 0
    """Draw only from this many best tokens; 0 is off."""
    seed: int = 0
    """With a prompt's index, the seed of its own random numbers."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off).")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or a positive count.")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt became."""

    index: int
    """Which prompt, counted from 0."""
    token_ids: tuple[int, ...]
    """The answer, without the stop token."""
    finish: Literal["stop", "length"]
    """`stop`: a stop token was chosen; `length`: max_new_tokens were."""
    logprob: float
    """Sum of the chosen tokens' log-probabilities, stop token included, under the model's own distribution
    (temperature 1, nothing cut off)."""


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    sampling: Sampling,
    limits: Sequence[int] | None = None,
    max_rows: int = 32,
    max_cache_tokens: int = 65536,
    exact: bool = False,
) -> Iterator[Generation]:
    """Yield each prompt's `Generation` as soon as it ends, so in any order; `index` says which it is.

    Answers do not depend on the other prompts beyond rounding, drawn ones neither, for each prompt has its own
    random numbers, made from the seed and its index. In bf16, rounding decides between two tokens that the model
    finds almost equally good; `exact` takes that away on a CPU, and answers are those of `model.generate`, bit for
    bit. It prefills prompts one by one, attends row by row and keeps to 32 rows.

    Args:
        model: a causal language model in evaluation mode, with or without a PEFT adapter.
        prompts: token ids of each prompt, special tokens included.
        stop_ids: tokens that end an answer.
        sampling: how to choose, and how many tokens at most.
        limits: for each prompt, the most new tokens, where that is less than `sampling.max_new_tokens`.
        max_rows: most prompts in one step.
        max_cache_tokens: most positions of key/value cache set aside for the rows together, counted as if every
            row reached max_new_tokens; one row runs whatever it needs.
        exact: round as one row alone does, at about two thirds of the speed (bf16 on a CPU).

    Raises:
        DataError: empty prompts, or prompts that do not fit the model's positions; before anything runs.
        ModelError: the model is in training mode, its adapter adds virtual tokens, or it cannot be run `exact`.
        ValueError: max_rows, max_cache_tokens or a limit below 1, or not one limit for each prompt.
    """
    if max_rows < 1 or max_cache_tokens < 1:
        raise ValueError(f"max_rows is {max_rows} and max_cache_tokens {max_cache_tokens}; both must be at least 1.")
    if limits is not None and (len(limits) != len(prompts) or min(limits, default=1) < 1):
        raise ValueError(
            f"limits holds {len(limits)} counts from {min(limits, default=1)} on for {len(prompts)} prompts; it must "
            "hold one for each, and each must be at least 1."
        )
    _check_model(model, exact)
    _check_prompts(model, prompts, sampling)
    rows = [_Row(index=index, prompt=prompt, limit=sampling.max_new_tokens) for index, prompt in enumerate(prompts)]
    for row, limit in zip(rows, limits or (), strict=False):
        row.limit = min(row.limit, limit)
    # A function of its own, so that the checks above run at the call and not at the first row asked for.
    return _run(_Batch(model, stop_ids, sampling, exact), rows, max_rows, max_cache_tokens)


def cache_bytes(
    model: PreTrainedModel, *, longest_prompt: int, max_new_tokens: int, num_rows: int, max_cache_tokens: int = 65536
) -> int:
    """The memory that `generate` sets aside for keys and values at most, when `num_rows` rows run together."""
    config = model.config.get_text_config()
    columns = longest_prompt + max_new_tokens
    rows = max(1, min(num_rows, max_cache_tokens // columns))
    num_heads = config.num_attention_heads
    num_kv = getattr(config, "num_key_value_heads", None) or num_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    numbers = 2 * config.num_hidden_layers * num_kv * size * rows * (columns + SPARE_COLUMNS)
    return int(numbers * model.dtype.itemsize)


def _check_model(model: PreTrainedModel | PeftModel, exact: bool) -> None:
    if model.training:
        raise ModelError("The model is in training mode, so dropout would change its answers. Call model.eval() first.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"The adapter's method {model.active_peft_config.peft_type} adds virtual tokens to the prompt, which "
            "batched generation does not support yet. Use model.generate, or an adapter that changes weights (LoRA)."
        )
    if exact and (model.device.type, model.config._attn_implementation) != ("cpu", "sdpa"):
        raise ModelError(
            f"Exact generation is for models on a CPU with sdpa attention; this one is on {model.device} with "
            f"{model.config._attn_implementation}. Leave out exact, or load the model so."
        )


def _check_prompts(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    limit = model.config.get_text_config().max_position_embeddings
    problems = []
    for index, prompt in enumerate(prompts):
        needed = len(prompt) + sampling.max_new_tokens
        if not prompt:
            message, fix = "it has no tokens.", "Give at least one token, such as the beginning-of-sequence token."
        elif needed > limit:
            message = f"{len(prompt)} tokens + {sampling.max_new_tokens} new ones = {needed} positions of {limit}."
            fix = "Shorten the prompt or lower max_new_tokens."
        else:
            continue
        problems.append(Problem(source=f"prompt {index}", field="tokens", message=message, fix=fix))
    if problems:
        raise DataError(f"{len(problems)} of {len(prompts)} prompts cannot be run by this model.", problems)


def _run(batch: _Batch, waiting: list[_Row], max_rows: int, max_cache_tokens: int) -> Iterator[Generation]:
    """Run the batch until no prompt waits and no row is left; no torch mode is held while the caller has the turn."""
    max_rows = min(max_rows, _EXACT_ROWS) if batch.exact else max_rows
    waiting.sort(key=lambda row: len(row.prompt))  # taken from the end: longest first
    while waiting or batch.rows:
        longest = max(len(row.prompt) for row in batch.rows or waiting[-1:])
        allowed = max_cache_tokens // (longest + batch.sampling.max_new_tokens)
        allowed = max(1, min(max_rows, allowed, len(batch.rows) + len(waiting)))
        free = min(allowed - len(batch.rows), len(waiting))
        # A prefill costs most of a step whatever its size, so it waits for a quarter of the rows to be free.
        if batch.exact or free >= allowed / 4 or free == len(waiting):
            while free > 0:
                together = 1 if batch.exact else max(1, _PREFILL_TOKENS // len(waiting[-1].prompt))
                joining = [waiting.pop() for _ in range(min(free, together))]
                free -= len(joining)
                yield from batch.join(joining, capacity=allowed)
        if batch.rows:
            yield from batch.step()


@dataclass(kw_only=True)
class _Row:
    """One prompt on its way; `tokens` are chosen already, all but the last of them cached."""

    index: int
    prompt: Sequence[int]
    limit: int
    """Most tokens to choose."""
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    random: Random = field(default_factory=Random)

    @property
    def num_cached(self) -> int:
        return len(self.prompt) + len(self.tokens) - 1


class _Batch:
    """The rows that are generating; row i of `rows` lies in row i of the cache."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, stop_ids: Collection[int], sampling: Sampling, exact: bool = False
    ) -> None:
        self.model = model
        self.exact = exact
        self.stop_ids = frozenset(stop_ids)
        self.sampling = sampling
        self.rows: list[_Row] = []
        self.cache = SlabCache(model.config.get_text_config().num_hidden_layers)

    @torch.inference_mode()
    def join(self, joining: list[_Row], *, capacity: int) -> list[Generation]:
        """Prefill `joining` (longest first, none longer than a row here), choose their first tokens.

        Returns the rows that ended with that. `capacity` is the number of rows to set cache aside for.
        """
        width, top = len(joining[0].prompt), len(self.rows)
        self.cache.reserve(num_rows=capacity, width=max([width, *(row.num_cached for row in self.rows)]), num_new=0)
        self.cache.show(rows=range(top, top + len(joining)), width=0, back=width)
        padding = [width - len(row.prompt) for row in joining]
        logits = self._forward([[0] * p + list(row.prompt) for p, row in zip(padding, joining, strict=True)], padding)
        self.rows += joining
        for row in joining:
            row.random.seed(f"{self.sampling.seed}/{row.index}")
        return self._choose(top, logits)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Add one token to every row; returns those that ended."""
        width = max(row.num_cached for row in self.rows)
        self.cache.reserve(num_rows=len(self.rows), width=width, num_new=1)
        self.cache.show(rows=range(len(self.rows)), width=width)
        ids, padding = [row.tokens[-1:] for row in self.rows], [width - row.num_cached for row in self.rows]
        if not self.exact:
            return self._choose(0, self._forward(ids, padding))
        with _row_by_row_attention(self.model):
            logits = self._forward(ids, padding)
        return self._choose(0, logits)

    def _forward(self, ids: list[list[int]], padding: list[int]) -> Tensor:
        """Logits ``[R, V]`` after the last of `ids` (R lists of Q), given how many columns of each row are padding."""
        window, device = self.cache.window, self.model.device
        new_ids = torch.tensor(ids, device=device)
        left = torch.tensor(padding, device=device)[:, None]
        seen = window.end - window.first
        columns = torch.arange(seen + new_ids.shape[1], device=device)
        output = self.model(
            input_ids=new_ids,
            attention_mask=(columns >= left).long(),
            position_ids=(columns[seen:] - left).clamp_(min=0),
            past_key_values=self.cache,
            use_cache=True,
            # An index, not a count: a slice of the hidden states is not contiguous, and the head would then
            # copy its weight once per row (10 s for 32 rows and a vocabulary of 262 144).
            logits_to_keep=torch.tensor([new_ids.shape[1] - 1], device=device),
        )
        window.end += new_ids.shape[1]
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _choose(self, top: int, logits: Tensor) -> list[Generation]:
        """Choose a token for each row from `top` on by `logits` ``[R, V]``; remove and return the rows that ended."""
        ended = []
        for place, row_logits in reversed(list(enumerate(logits, start=top))):
            row = self.rows[place]
            token, logprob = _choose_token(row_logits.float(), self.sampling, row.random)
            row.tokens.append(token)
            row.logprob += logprob
            stopped = token in self.stop_ids
            if stopped or len(row.tokens) == row.limit:
                ended.append(
                    Generation(
                        index=row.index,
                        token_ids=tuple(row.tokens[:-1] if stopped else row.tokens),
                        finish="stop" if stopped else "length",
                        logprob=row.logprob,
                    )
                )
                self._remove(place)
        return ended

    def _remove(self, place: int) -> None:
        last = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = last
            self.cache.move_row(len(self.rows), place)


def _choose_token(row_logits: Tensor, sampling: Sampling, random: Random) -> tuple[int, float]:
    """The chosen token and its log-probability under the model's own distribution."""
    if sampling.temperature == 0:
        token = int(row_logits.max(0).indices)  # argmax is slower
    else:
        token = _draw(row_logits / sampling.temperature, sampling, random.random())
    return token, float(row_logits[token] - row_logits.logsumexp(0))


def _draw(scaled: Tensor, sampling: Sampling, point: float) -> int:
    """The token at `point` in [0, 1) of the distribution that top-k and top-p leave, best token first.

    For probabilities 0.2, 0.5, 0.3 and top_p 0.7, tokens 1 and 2 are left: token 1 up to point 0.625, then token 2.
    """
    best, ids = scaled.topk(min(sampling.top_k or _NUCLEUS_TOKENS, len(scaled)))
    total = (best if sampling.top_k else scaled).logsumexp(0)
    upto = (best - total).double().exp().cumsum(0)
    if not sampling.top_k and upto[-1] < (sampling.top_p if sampling.top_p < 1 else point):
        best, ids = scaled.sort(descending=True)
        upto = (best - total).double().exp().cumsum(0)
    last = len(ids) - 1
    if sampling.top_p < 1:
        last = min(last, int(torch.searchsorted(upto, sampling.top_p)))
        point *= float(upto[last])
    return int(ids[min(last, int(torch.searchsorted(upto, point, right=True)))])


@contextmanager
def _row_by_row_attention(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within this, the model's steps attend row by row; before and after, with sdpa."""
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    base.set_attn_implementation(_ROW_BY_ROW)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")


def _attend_row_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,  # transformers hands every attention function the same wide set of arguments
) -> tuple[Tensor, None]:
    """Attention output ``[R, 1, H, D]`` of one step, each row computed as if it were alone and without padding.

    Padding alone changes no sum, but it moves a row's columns to other vector lanes, and with them the rounding.

    Args:
        module: the attention layer; unused.
        query: ``[R, H, 1, D]``.
        key: ``[R, K, C, D]``.
        value: ``[R, K, C, D]``.
        attention_mask: ``[R, C]``, False where a row is padding (see `_keep_mask`).
        scaling: factor on the scores.
        sliding_window: columns that a row may look at, itself included.
    """
    num_rows, num_heads, _one, size = query.shape
    num_kv, num_columns = key.shape[1:3]
    # Query heads that share a key head become its queries, as in transformers' own sdpa: keys are not repeated.
    shared = query.reshape(num_rows, num_kv, num_heads // num_kv, size)
    out = torch.empty_like(shared)
    outside = num_columns - sliding_window if sliding_window else 0
    for row, padding in enumerate((~attention_mask).sum(1).tolist()):
        here, seen = slice(row, row + 1), slice(max(padding, outside), None)
        out[here] = scaled_dot_product_attention(shared[here], key[here, :, seen], value[here, :, seen], scale=scaling)
    return out.view(num_rows, 1, num_heads, size), None


def _keep_mask(*_args: object, attention_mask: Tensor, **_kwargs: object) -> Tensor:
    """The mask ``[R, C]`` as the model was given it: row-by-row attention needs no other."""
    return attention_mask


AttentionInterface.register(_ROW_BY_ROW, _attend_row_by_row)
AttentionMaskInterface.register(_ROW_BY_ROW, _keep_mask)
