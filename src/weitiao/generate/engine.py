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

from collections.abc import Collection, Iterator, Sequence
from random import Random

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import DataError, ModelError, Problem
from ..models.prefix_lm import row_prefix
from ..models.ptuning import prefix_states
from .batch import Batch
from .cache import cache_bytes
from .constraint import Constraint
from .row import Generation, Row
from .sampling import Chooser, Sampling

__all__ = ["Generation", "Sampling", "cache_bytes", "generate"]

_PREFILL_TOKENS = 4096
"""Most prompt tokens of one step: bounds its activations; a longer prompt joins alone."""

_EXACT_ROWS = 32
"""Up to this many rows oneDNN's bf16 products round as for one row; from 33 on one result in 10 000 differs."""

_ATTENTIONS = {"full_attention", "sliding_attention"}
"""Kinds of layers that attention by rows can run."""


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
    check_model(model, exact=exact)
    _check_prompts(model, prompts, sampling)
    stops = frozenset(stop_ids)
    rows = [
        Row(
            index=index,
            prompt=tuple(prompt),
            limit=min(sampling.max_new_tokens, limits[index] if limits is not None else sampling.max_new_tokens),
            stop_ids=stops,
            chooser=Chooser(sampling=sampling, random=Random(f"{sampling.seed}/{index}")),
            constraint=constraints[index] if constraints is not None else None,
            prefix=row_prefix(model, prompt),
        )
        for index, prompt in enumerate(prompts)
    ]
    with torch.no_grad():
        batch = Batch(model, past_states=prefix_states(model), exact=exact)
    # A function of its own, so that the checks above run at the call and not at the first row asked for.
    return _run(batch, rows, max_rows, max_cache_tokens, sampling.max_new_tokens)


def check_model(model: PreTrainedModel | PeftModel, *, exact: bool) -> None:
    """Raise ModelError where batches cannot run `model`, or not `exact`."""
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


def _run(
    batch: Batch, waiting: list[Row], max_rows: int, max_cache_tokens: int, max_new_tokens: int
) -> Iterator[Generation]:
    """Run the batch until no prompt waits and no row is left; no torch mode is held while the caller has the turn."""
    max_rows = min(max_rows, _EXACT_ROWS) if batch.exact else max_rows
    waiting.sort(key=lambda row: row.num_prompt)  # taken from the end: longest first
    while waiting or batch.rows:
        longest = max(row.num_prompt for row in batch.rows or waiting[-1:])
        allowed = max_cache_tokens // (batch.cache.num_past + longest + max_new_tokens)
        allowed = max(1, min(max_rows, allowed, len(batch.rows) + len(waiting)))
        num_tokens = 0
        while waiting and len(batch.rows) < allowed:
            num_tokens += waiting[-1].num_prompt
            if num_tokens > _PREFILL_TOKENS and num_tokens > waiting[-1].num_prompt:
                break
            row = waiting.pop()
            row.constraint = None if row.constraint is None else row.constraint.fork()
            ended = batch.join(row)
            if ended is not None:
                yield ended
        if batch.rows:
            yield from batch.step(capacity=allowed)
