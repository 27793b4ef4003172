"""How probable a model finds texts that it did not write: labelled answers, the choices of a question.

Nothing is generated. The log-probability of each continuation behind its prompt is summed, from the logits of its own
positions alone: the matrix of all tokens by the vocabulary never exists.

Shapes: R sequences of this call, K positions whose logits are computed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.adapters import has_adapter, without_adapter
from ..models.prefix_lm import row_prefix

BATCH_TOKENS = 4096
"""Most tokens, padding included, of one forward pass; a longer sequence goes alone."""

LOGITS_BYTES = 1 << 27
"""Most float32 logits of one forward pass."""

Continuation = tuple[Sequence[int], Sequence[int]]
"""The tokens of a prompt, and those that follow it; both at least one."""
OnSequences = Callable[[int, int], None]
"""Called with (sequences done, sequences in all)."""


def log_likelihoods(
    model: PreTrainedModel | PeftModel,
    continuations: Sequence[Continuation],
    *,
    batch_tokens: int = BATCH_TOKENS,
    adapted: bool = True,
    on_sequences: OnSequences | None = None,
) -> list[float]:
    """The log-probability (nats) of each continuation behind its prompt.

    Continuations that differ in their last token alone, as the letters of choices do, share one sequence.

    Args:
        model: a causal or prefix language model in evaluation mode.
        continuations: prompts and what follows them, within the model's positions.
        batch_tokens: most tokens of one forward pass.
        adapted: False finds what the model held before it was tuned: its adapter is off meanwhile.
        on_sequences: told of the progress.

    Raises:
        ModelError: the model without its adapter is asked for, and it has none.
    """
    if not adapted:
        if not has_adapter(model):
            raise ModelError("The model has no adapter, so there is no before and after. Open it with its adapter.")
        with without_adapter(model):
            return log_likelihoods(model, continuations, batch_tokens=batch_tokens, on_sequences=on_sequences)
    sharing: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for place, (prompt, follows) in enumerate(continuations):
        sharing.setdefault(((*prompt, *follows[:-1]), len(follows)), []).append(place)
    values = [0.0] * len(continuations)
    done = 0
    for batch in _batches(sharing, batch_tokens, model.config.get_text_config().vocab_size):
        keep = max(count for _, count in batch)
        logits = _last_logits(model, [given for given, _ in batch], keep)
        for row, key in zip(logits, batch, strict=True):
            scores = row[keep - key[1] :].float()
            norms = scores.logsumexp(-1)
            for place in sharing[key]:
                wanted = torch.tensor(continuations[place][1], device=scores.device)[:, None]
                values[place] = float((scores.gather(1, wanted)[:, 0] - norms).sum())
        done += len(batch)
        if on_sequences is not None:
            on_sequences(done, len(sharing))
    return values


def _batches(
    sequences: Mapping[tuple[tuple[int, ...], int], object], batch_tokens: int, vocabulary: int
) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """Sequences in batches of alike length, within the limits of tokens and of logits."""
    batch: list[tuple[tuple[int, ...], int]] = []
    keep = 0
    for given, count in sorted(sequences, key=lambda key: (len(key[0]), key)):
        widest = max(keep, count)
        tokens, logits = (len(batch) + 1) * len(given), (len(batch) + 1) * widest * vocabulary * 4
        if batch and (tokens > batch_tokens or logits > LOGITS_BYTES):
            yield batch
            batch, widest = [], count
        batch.append((given, count))
        keep = widest
    if batch:
        yield batch


@torch.inference_mode()
def _last_logits(model: PreTrainedModel | PeftModel, sequences: Sequence[tuple[int, ...]], keep: int) -> torch.Tensor:
    """Logits ``[R, K, V]`` at the last `keep` positions of each of `sequences`, which are padded on the left."""
    width = max(keep, *(len(sequence) for sequence in sequences))
    padding = [width - len(sequence) for sequence in sequences]
    ids = [[0] * left + list(sequence) for left, sequence in zip(padding, sequences, strict=True)]
    columns = torch.arange(width, device=model.device)
    left = torch.tensor(padding, device=model.device)[:, None]
    channels = _channels(model, sequences, padding)
    output = model(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=(columns >= left).long(),
        position_ids=(columns - left).clamp_(min=0) if channels is None else channels,
        use_cache=False,
        # An index, not a count: the slice of a count is not contiguous, and the head would copy its weight per row.
        logits_to_keep=columns[width - keep :],
    )
    logits: torch.Tensor = output.logits
    return logits


def _channels(
    model: PreTrainedModel | PeftModel, sequences: Sequence[tuple[int, ...]], padding: Sequence[int]
) -> torch.Tensor | None:
    """Both channels of the positions ``[R, 2, width]`` of rows that have contexts, 0 at padding on the left.

    None for a model that reads from left to right.
    """
    rows = []
    for sequence, left in zip(sequences, padding, strict=True):
        prefix = row_prefix(model, sequence)
        if prefix is None:
            return None
        rows.append([[0] * left + channel for channel in prefix.positions(0, len(sequence))])
    return torch.tensor(rows, device=model.device)
