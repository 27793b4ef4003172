"""Replies in the protocol's shapes: whole ones and the chunks of streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..generate.sampling import Choice
from .requests import Usage

DONE = b"data: [DONE]\n\n"

Spell = Callable[[int], bytes]
"""The bytes that a token writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """What every piece of one reply says."""

    id: str
    created: int
    model: str
    fingerprint: str
    """Changes when the same request and seed may give another answer: model, adapter, engine."""

    def shape(self, kind: str) -> dict[str, Any]:
        """The keys that all share; `kind` is the protocol's ``object``."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def sse(value: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_shape(usages: Sequence[Usage]) -> dict[str, Any]:
    """The tokens of a reply of several choices, which share one prompt."""
    prompt = usages[0].prompt_tokens
    completion = sum(usage.completion_tokens for usage in usages)
    cached = min(usages[0].cached_tokens, prompt)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def chat_logprobs(tokens: Sequence[Choice], spell: Spell, num_top: int) -> dict[str, Any]:
    """The log-probabilities of a chat reply's tokens."""
    return {
        "content": [
            {
                **_token(one.token, one.logprob, spell),
                "top_logprobs": [_token(*top, spell) for top in one.top[:num_top]],
            }
            for one in tokens
        ],
        "refusal": None,
    }


def _token(token: int, logprob: float, spell: Spell) -> dict[str, Any]:
    spelled = spell(token)
    return {
        "token": _as_text(spelled),
        "logprob": max(logprob, -9999.0),
        "bytes": list(spelled),
    }


def _as_text(spelled: bytes) -> str:
    r"""The bytes as text; those that only together with others make a character as ``bytes:\xe4``."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def plain_logprobs(tokens: Sequence[Choice], spell: Spell, num_top: int, *, offset: int) -> dict[str, Any]:
    """The log-probabilities of a plain completion's tokens; `offset` is how many characters stand before them."""
    texts = [_as_text(spell(one.token)) for one in tokens]
    offsets, place = [], offset
    for text in texts:
        offsets.append(place)
        place += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(one.logprob, -9999.0) for one in tokens],
        "top_logprobs": [{_as_text(spell(token)): value for token, value in one.top[:num_top]} for one in tokens]
        if num_top
        else None,
        "text_offset": offsets,
    }
