"""The one place where messages meet the engine: evaluation, prediction and chat all ask a model through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel

from ..messages import Message
from ..render.base import Renderer, Tools
from .engine import Sampling, generate


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """One model answer."""

    index: int
    """Which conversation it answers."""
    text: str
    finish: Literal["stop", "length"]
    """`length`: cut at the token limit."""
    num_tokens: int
    logprob: float


def reply_all(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    conversations: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    tools: Sequence[Tools] | None = None,
    limits: Sequence[int] | None = None,
    max_rows: int = 48,
) -> Iterator[Reply]:
    """Yield the reply to each conversation as it is done, in any order.

    Args:
        model: a causal model in eval mode.
        renderer: its chat format.
        conversations: lists of messages, each ending with the user's or a tool's.
        sampling: how tokens are chosen.
        tools: for each conversation, the tools on offer.
        limits: for each conversation, the most tokens of its reply, where that is less than `sampling` allows.
        max_rows: conversations answered together.
    """
    offers = tools if tools is not None else [()] * len(conversations)
    prompts = [renderer.render_prompt(messages, offer) for messages, offer in zip(conversations, offers, strict=True)]
    stop_ids = renderer.stop_ids
    for done in generate(model, prompts, stop_ids=stop_ids, sampling=sampling, limits=limits, max_rows=max_rows):
        yield Reply(
            index=done.index,
            text=renderer.read_answer(done.token_ids),
            finish=done.finish,
            num_tokens=len(done.token_ids),
            logprob=done.logprob,
        )
