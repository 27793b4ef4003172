"""Tokens in, tokens out: many prompts through one causal language model, as fast as the machine allows.

A decoding step costs nearly the same for one token as for dozens, because most of its time goes into reading the
weights. So rows share one batch; a row that ends leaves at once and a waiting prompt takes its place. Knows torch
and transformers models; knows nothing of text, messages, tasks or answer forms.

What the model is given, step by step, for three rows (p prompt, g chosen, f forced by a row's constraint)::

    p p p p p p p p p       the new tokens of all rows, end to end: here three prompts
    g g g                   every row goes on by the token chosen for it
    g f f f f g p p p p     the first row's grammar left no choice for four tokens; the third ended, a new one joins

There is no padding anywhere: a row's token at position p lies in column p of the cache, whoever its neighbours are.
Models whose rows have a context (prefix_lm.py) and models with a learnt prefix (ptuning.py) run in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import DataError, ModelError, Problem
from ..models.prefix_lm import RowPrefix, row_prefix
from ..models.ptuning import prefix_states
from .attention import Chunk, Chunks, attending_by_rows
from .cache import SlabCache, cache_bytes
from .constraint import Constraint
from .sampling import Choice, Sampling, choose_tokens

__all__ = ["Generation", "Sampling", "cache_bytes", "generate"]

_PREFILL_TOKENS = 4096
"""Most prompt tokens of one step: bounds its activations; a longer prompt joins alone."""

_EXACT_ROWS = 32
"""Up to this many rows oneDNN's bf16 products round as for one row; from 33 on one result in 10 000 differs."""

_ATTENTIONS = {"full_attention", "sliding_attention"}
"""Kinds of layers that attention by rows can run."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one prompt became."""

    index: int
    """Which prompt, counted from 0."""
    token_ids: tuple[int, ...]
    """The answer, without the stop token; of a refused one, what was written until then."""
    finish: Literal["stop", "length", "refused"]
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


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    sampling: Sampling,
    limits: Sequence[int] | None = None,
    constraints: Sequence[Constraint | None] | None = None,
    max_rows: int = 32,
    max_cache_tokens: int = 65536,
    exact: bool = False,
) -> Iterator[Generation]:
    """Yield each prompt's `Generation` as soon as it ends, so in any order; `index` says which it is.

    Answers do not depend on the other prompts beyond rounding, drawn ones neither, for each prompt has its own
    random numbers, made from the seed and its index. In bf16, rounding decides between two tokens that the model
    finds almost equally good; `exact` takes that away on a CPU, and answers are those of `model.generate`, bit for
    bit. It prefills prompts one by one, attends row by row, feeds forced tokens one by one and keeps to 32 rows.

    An answer with a constraint satisfies its grammar or is refused; it is never cut in silence and never falls back to
    free text. Tokens that its grammar forces are not asked for: they are fed together with the last chosen one.

    Args:
        model: a causal language model in evaluation mode, with or without a PEFT adapter.
        prompts: token ids of each prompt, special tokens included.
        stop_ids: tokens that end an answer.
        sampling: how to choose, and how many tokens at most.
        limits: for each prompt, the most new tokens, where that is less than `sampling.max_new_tokens`.
        constraints: for each prompt, the constraint of its answer, or None. They are not changed. Their compiler's
            stop tokens must be `stop_ids`.
        max_rows: most prompts in one step.
        max_cache_tokens: most positions of key/value cache set aside for the rows together, counted as if every
            row reached max_new_tokens; one row runs whatever it needs.
        exact: round as one row alone does, at about two thirds of the speed (bf16 on a CPU).

    Raises:
        DataError: empty prompts, or prompts that do not fit the model's positions; before anything runs.
        ModelError: the model is in training mode, its adapter adds virtual tokens, its attention is of a kind that
            batches cannot run, or it cannot be run `exact`.
        ValueError: max_rows, max_cache_tokens or a limit below 1, or not one limit or constraint for each prompt.
    """
    if max_rows < 1 or max_cache_tokens < 1:
        raise ValueError(f"max_rows is {max_rows} and max_cache_tokens {max_cache_tokens}; both must be at least 1.")
    if limits is not None and (len(limits) != len(prompts) or min(limits, default=1) < 1):
        raise ValueError(
            f"limits holds {len(limits)} counts from {min(limits, default=1)} on for {len(prompts)} prompts; it must "
            "hold one for each, and each must be at least 1."
        )
    if constraints is not None and len(constraints) != len(prompts):
        raise ValueError(
            f"constraints holds {len(constraints)} for {len(prompts)} prompts; it must hold one, or None, for each."
        )
    _check_model(model, exact)
    _check_prompts(model, prompts, sampling)
    rows = [
        _Row(
            index=index,
            pending=list(prompt),
            num_prompt=len(prompt),
            limit=min(sampling.max_new_tokens, limits[index] if limits is not None else sampling.max_new_tokens),
            constraint=constraints[index] if constraints is not None else None,
            random=Random(f"{sampling.seed}/{index}"),
            prefix=row_prefix(model, prompt),
        )
        for index, prompt in enumerate(prompts)
    ]
    # A function of its own, so that the checks above run at the call and not at the first row asked for.
    return _run(_Batch(model, stop_ids, sampling, exact), rows, max_rows, max_cache_tokens)


def _check_model(model: PreTrainedModel | PeftModel, exact: bool) -> None:
    if model.training:
        raise ModelError("The model is in training mode, so dropout would change its answers. Call model.eval() first.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"The adapter's method {model.active_peft_config.peft_type} adds virtual tokens to the prompt, which "
            "batched generation does not support yet. Use model.generate, or an adapter that changes weights (LoRA)."
        )
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTIONS
    if others:
        raise ModelError(
            f"The model has layers of {', '.join(sorted(others))}, which batched generation does not support. "
            "Use model.generate."
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
    waiting.sort(key=lambda row: row.num_prompt)  # taken from the end: longest first
    while waiting or batch.rows:
        longest = max(row.num_prompt for row in batch.rows or waiting[-1:])
        allowed = max_cache_tokens // (batch.cache.num_past + longest + batch.sampling.max_new_tokens)
        allowed = max(1, min(max_rows, allowed, len(batch.rows) + len(waiting)))
        num_tokens = 0
        while waiting and len(batch.rows) < allowed:
            num_tokens += waiting[-1].num_prompt
            if num_tokens > _PREFILL_TOKENS and num_tokens > waiting[-1].num_prompt:
                break
            ended = batch.join(waiting.pop())
            if ended is not None:
                yield ended
        if batch.rows:
            yield from batch.step(capacity=allowed)


@dataclass(kw_only=True)
class _Row:
    """One prompt on its way."""

    index: int
    pending: list[int]
    """Tokens that are known and not yet cached: the prompt, later the chosen token and those forced behind it."""
    num_prompt: int
    limit: int
    """Most tokens to choose."""
    constraint: Constraint | None
    random: Random
    prefix: RowPrefix | None = None
    """Its context, in a prefix language model."""
    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    logprobs: list[float] = field(default_factory=list)
    num_cached: int = 0
    num_steps: int = 0
    allowed: Tensor | None = None
    """With a constraint, the ids to choose the next token from."""


def _positions(rows: Sequence[_Row], chunks: Chunks) -> Tensor:
    """``[1, 2, T]``, both channels of the positions of the new tokens of rows that have contexts."""
    channels: tuple[list[int], list[int]] = ([], [])
    for row, chunk in zip(rows, chunks.chunks, strict=True):
        assert row.prefix is not None
        for channel, positions in zip(channels, row.prefix.positions(chunk.start, chunk.end), strict=True):
            channel += positions
    return torch.tensor([channels]).to(chunks.device, non_blocking=True)


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
        with torch.no_grad():
            past_states = prefix_states(model)
        self.cache = SlabCache(model.config.get_text_config().num_hidden_layers, past_states)

    def join(self, row: _Row) -> Generation | None:
        """Take `row` in; its answer where the grammar leaves nothing to ask for."""
        if row.constraint is not None:
            row.constraint = row.constraint.fork()
            ended = self._follow(row)
            if ended is not None:
                return ended
        self.rows.append(row)
        return None

    @torch.inference_mode()
    def step(self, *, capacity: int) -> list[Generation]:
        """Call the model once and choose a token for every row; returns those that ended.

        `capacity` is the number of rows to set cache aside for.
        """
        with attending_by_rows(self.model):
            if not self.exact:
                logits = self._forward(0, [len(row.pending) for row in self.rows], capacity)
                return self._choose(list(range(len(self.rows))), logits)
            old = sum(row.num_cached > 0 for row in self.rows)  # those that have just joined stand behind the others
            parts = [self._forward(0, [1] * old, capacity)] if old else []
            parts += [
                self._forward(place, [self.rows[place].num_prompt], capacity) for place in range(old, len(self.rows))
            ]
            ready = [place for place, row in enumerate(self.rows) if not row.pending]
            return self._choose(ready, torch.cat(parts)[ready]) if ready else []

    def _forward(self, top: int, counts: list[int], capacity: int) -> Tensor:
        """Feed each row from `top` on so many of its pending tokens; logits ``[R, V]`` after the last of each."""
        rows = self.rows[top : top + len(counts)]
        chunks = Chunks(
            top=top,
            chunks=[
                Chunk(start=row.num_cached, num_tokens=count, prefix=row.prefix.num_tokens if row.prefix else 0)
                for row, count in zip(rows, counts, strict=True)
            ],
            device=self.model.device,
            num_past=self.cache.num_past,
            exact=self.exact,
        )
        new_ids = [token for row, count in zip(rows, counts, strict=True) for token in row.pending[:count]]
        for row, count in zip(rows, counts, strict=True):
            row.num_steps += row.num_cached > 0
            row.num_cached += count
            del row.pending[:count]
        self.cache.reserve(num_rows=capacity, num_tokens=max(row.num_cached for row in rows))
        slots = self.cache.slots
        slots.rows, slots.columns, positions = chunks.slots()
        output = self.model(
            input_ids=torch.tensor([new_ids], device=self.model.device),
            position_ids=_positions(rows, chunks) if rows[0].prefix else positions[None],
            past_key_values=self.cache,
            use_cache=True,
            # An index, not a count: only the scores after each row's last token are wanted.
            logits_to_keep=chunks.last,
            chunks=chunks,
        )
        if chunks.num_calls != len(self.cache.slabs):
            name = type(self.model).__name__
            raise ModelError(
                f"{chunks.num_calls} of {len(self.cache.slabs)} layers of {name} use the attention interface of "
                "transformers, so batched generation cannot run it. Use model.generate."
            )
        return output.logits[0]  # type: ignore[no-any-return]

    def _choose(self, places: list[int], logits: Tensor) -> list[Generation]:
        """Choose a token for the rows at `places` by `logits` ``[R, V]``; remove and return the rows that ended."""
        rows = [self.rows[place] for place in places]
        choices = choose_tokens(
            logits,
            allowed=[row.allowed for row in rows],
            sampling=self.sampling,
            randoms=[row.random for row in rows],
        )
        ended = []
        for place, row, choice in reversed(list(zip(places, rows, choices, strict=True))):
            done = self._take(row, choice)
            if done is not None:
                ended.append(done)
                self._remove(place)
        return ended

    def _take(self, row: _Row, choice: Choice) -> Generation | None:
        """Go on by a chosen token; the row's answer where it ends with that."""
        if not math.isfinite(choice.logprob):
            return self._end(
                row,
                "refused",
                "The model's scores are not numbers, or forbid every token. Its weights may be broken, or its dtype "
                "too narrow: try float32.",
            )
        ended = self._append(row, choice)
        return ended if ended is not None or row.constraint is None else self._follow(row)

    def _follow(self, row: _Row) -> Generation | None:
        """Append what the constraint forces, then see what it allows; the row's answer where it ends with that."""
        assert row.constraint is not None
        while True:
            forced = row.constraint.forced()
            if not forced:
                allowed = row.constraint.allowed()
                if not len(allowed):
                    return self._end(row, "refused", f"No token can follow: {row.constraint.why()}.")
                if len(allowed) > 1:
                    row.allowed = torch.from_numpy(allowed).to(self.model.device, non_blocking=True)
                    return None
                forced = allowed.tolist()
            for token in forced:
                ended = self._append(row, Choice(token=token, logprob=0.0))
                if ended is not None:
                    return ended

    def _append(self, row: _Row, choice: Choice) -> Generation | None:
        """Write one token; the row's answer where that ends it."""
        if choice.token in self.stop_ids:
            return self._end(row, "stop", stop_logprob=choice.logprob)
        row.tokens.append(choice.token)
        row.logprobs.append(choice.logprob)
        row.pending.append(choice.token)
        if row.constraint is not None and not row.constraint.advance(choice.token):
            return self._end(row, "refused", f"The answer cannot go on: {row.constraint.why()}.")
        if len(row.tokens) < row.limit:
            return None
        if row.constraint is None or row.constraint.accepting:
            return self._end(row, "length")
        return self._end(
            row, "refused", f"The limit of {row.limit} tokens was reached inside the answer: {row.constraint.why()}."
        )

    def _end(
        self, row: _Row, finish: Literal["stop", "length", "refused"], reason: str = "", *, stop_logprob: float = 0.0
    ) -> Generation:
        return Generation(
            index=row.index,
            token_ids=tuple(row.tokens),
            finish=finish,
            logprob=sum(row.logprobs) + stop_logprob,
            reason=reason,
            token_logprobs=tuple(row.logprobs),
            stop_logprob=stop_logprob,
            num_steps=row.num_steps,
        )

    def _remove(self, place: int) -> None:
        last = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = last
            self.cache.move_row(len(self.rows), place, last.num_cached)
