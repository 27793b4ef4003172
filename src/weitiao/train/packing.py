"""Proof, before anything is written, that a model can be trained on rows laid end to end.

Packed attention is a function that the model must call, with nothing asked of it that it cannot do (`attention.py`).
A model may refuse it, ask more of it, not call it at all, or carry a state from one token to the next beside its
attention; in the last two cases every row would see the rows before it, and nobody would know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.attention import PACKED
from ..models.prefix_lm import row_prefix
from ..models.ptuning import prefix_states
from ..models.sources import first_line
from ..render.base import Example
from ..render.example_store import lengths_of
from .batches import positions_of, prefixes_of

_WAY_OUT = "Set train.packing=false: rows are then taken one at a time, which is slower."

_TOLERANCE = 0.1
"""Of the norm: rounding in bfloat16 makes 0.01 to 0.02, a row that sees another one makes several tenths."""


def check_packing(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Return when two rows of `examples` end to end give what each gives alone; the model is left as it was.

    Raises:
        ModelError: the model cannot be trained on packed rows; the sentence says why and names ``train.packing``.
    """
    shortest = lengths_of(examples).argsort(kind="stable")[:2].tolist()
    first, second = examples[shortest[0]], examples[shortest[-1]]
    with torch.no_grad(), _packed(model):
        model.train()  # dropout in the attention is asked for in training only …
        _run(model, [first, second])
        model.eval()  # … and any dropout would make two passes differ
        together = _run(model, [first, second])[len(first) :]
    with torch.no_grad():
        alone = _run(model, [second])
    difference = float((together - alone).norm() / alone.norm())
    if not difference < _TOLERANCE:
        raise ModelError(
            f"Rows laid end to end see each other in this model ({type(model).__name__}): packed, the second of two "
            f"rows gives hidden states that differ by {difference:.0%} from those it gives alone. {_WAY_OUT}"
        )


@contextmanager
def _packed(model: PreTrainedModel) -> Iterator[None]:
    """Within this the model attends to packed rows; afterwards it is as before, ready to evaluate."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(PACKED)
        if model.config._attn_implementation != PACKED:
            raise ModelError(f"{type(model).__name__} has an attention of its own, which cannot be packed. {_WAY_OUT}")
        yield
    except (TypeError, ValueError) as error:  # an argument it does not know, an attention it does not take
        raise ModelError(
            f"{type(model).__name__} cannot be trained on packed rows ({first_line(error)}). {_WAY_OUT}"
        ) from None
    finally:
        model.set_attn_implementation(before)
        model.eval()


def _run(model: PreTrainedModel, rows: Sequence[Example]) -> Tensor:
    """Hidden states ``[T, H]`` of the rows end to end, in float32."""
    ids = torch.tensor([[token for row in rows for token in row.token_ids]], device=model.device)
    prefixes = prefixes_of(rows, lambda token_ids: row_prefix(model, token_ids))
    positions = positions_of([len(row) for row in rows], prefixes).to(model.device)
    extra: dict[str, object] = {}
    if model.config._attn_implementation == PACKED:
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        extra["row_starts"] = torch.cat([torch.zeros(1, dtype=ends.dtype), ends])
        if prefixes is not None:
            extra["row_prefixes"] = torch.tensor([prefix.num_tokens for prefix in prefixes])
        if (past := prefix_states(model)) is not None:
            extra["past_states"] = past
    output = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **extra)
    hidden: Tensor = output.last_hidden_state[0].float()
    return hidden
