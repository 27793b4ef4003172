"""A request as vLLM's ``/v1/completions`` takes it, and the events of its stream read back as tokens and an end.

The names are those of vLLM 0.12 and later (`vllm/entrypoints/openai/completion/protocol.py`). Prompts go as our own
token ids, so they cannot become others on the way, and tokens come back as ids; vLLM's text is not looked at.

vLLM applies a form's mask before it takes log-probabilities (`vllm/v1/worker/gpu_model_runner.py`), by default those
before temperature and penalties: they mean what `generate.sampling.Choice` says, renormalised over what was allowed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import WeitiaoError
from ..generate.row import Generation
from ..generate.sampling import Choice
from .requests import Done, Request, Usage

_START = re.compile(r"^start\s*:", re.MULTILINE)
_INNER = "weitiao_answer"


class VllmError(WeitiaoError):
    """What vLLM sent is not the answer that was asked for."""


def body_of(request: Request, *, model: str, stop_ids: Collection[int]) -> dict[str, Any]:
    """The body of a request to ``/v1/completions``.

    Everything that chooses tokens is said, also where it is off: vLLM would take what is left out from the model's
    generation_config.json. `stop_ids` are all that end an answer: vLLM is told to know no others.
    """
    sampling, steering = request.sampling, request.steering
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.limit,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": steering.min_p,
        "presence_penalty": steering.presence_penalty,
        "frequency_penalty": steering.frequency_penalty,
        "repetition_penalty": 1.0,
        "seed": _seed(sampling.seed, request.choice),
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": steering.num_top,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    if steering.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in steering.logit_bias.items()}
    if request.grammar is not None:
        body["structured_outputs"] = {"grammar": grammar_behind(request.before, request.grammar)}
    return body


def grammar_behind(before: str, lark: str) -> str:
    """One Lark grammar of the text `before` and then a text of `lark`; vLLM takes no grammar beside another."""
    if not before:
        return lark
    return f"start: {json.dumps(before)} {_INNER}\n{_START.sub(f'{_INNER}:', lark, count=1)}"


def _seed(seed: int, choice: int) -> int:
    """A seed of 63 bits of its own for each choice; vLLM takes -1 to be none."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8]) >> 1


class Reading:
    """The tokens of one answer as they come in, held against what was asked."""

    def __init__(self, request: Request, *, stop_ids: Collection[int], between_ids: Sequence[int] = ()) -> None:
        """
        Args:
            request: what was asked.
            stop_ids: tokens that end the answer.
            between_ids: tokens that training writes between an answer and its stop token; a form knows nothing of them.
        """
        self._request = request
        self._stop_ids = frozenset(stop_ids)
        self._between_ids = tuple(between_ids)
        self._constraint = None if request.constraint is None else request.constraint.fork()
        self._choices: list[Choice] = []
        self._stop: Choice | None = None
        self._finish: str | None = None
        self._usage: Mapping[str, Any] = {}

    def take(self, event: Mapping[str, Any]) -> tuple[Choice, ...]:
        """The new tokens of an event, without the stop token. Raises VllmError where they cannot be the answer's."""
        if usage := event.get("usage"):
            self._usage = usage
        found: list[Choice] = []
        for choice in event.get("choices") or ():
            self._require_same_prompt(choice)
            found += _choices_of(choice, self._request.steering.num_top)
            self._finish = choice.get("finish_reason") or self._finish
        if found and self._finish == "stop" and found[-1].token in self._stop_ids:
            self._stop = found.pop()
        for one in found:
            self._advance(one.token)
        self._choices += found
        return tuple(found)

    def done(self) -> Done:
        """The whole answer, once the stream has ended. Raises VllmError where it ended without a reason."""
        if self._finish not in ("stop", "length"):
            raise VllmError(f"vLLM broke the answer off (finish_reason {self._finish!r}). Its log says why.")
        tokens = tuple(choice.token for choice in self._choices)
        logprobs = tuple(choice.logprob for choice in self._choices)
        reason = self._why_refused()
        stop_logprob = self._stop.logprob if self._stop is not None else 0.0
        finish = "refused" if reason else "stop" if self._finish == "stop" else "length"
        generation = Generation(
            index=0,
            token_ids=tokens,
            finish=finish,  # type: ignore[arg-type]  # one of the three
            logprob=sum(logprobs) + stop_logprob,
            reason=reason,
            token_logprobs=logprobs,
            stop_logprob=stop_logprob,
            num_steps=len(tokens),
        )
        cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        usage = Usage(
            prompt_tokens=len(self._request.prompt_ids),
            cached_tokens=int(cached),
            completion_tokens=len(tokens) + (self._stop is not None),
        )
        return Done(finish=generation.finish, usage=usage, generation=generation, tokens=tuple(self._choices))

    def _require_same_prompt(self, choice: Mapping[str, Any]) -> None:
        read = choice.get("prompt_token_ids")
        if read is not None and list(read) != list(self._request.prompt_ids):
            raise VllmError(
                f"vLLM was sent a prompt of {len(self._request.prompt_ids)} tokens and read another, of {len(read)}. "
                "Is something between that changes requests?"
            )

    def _advance(self, token: int) -> None:
        if self._constraint is not None and not self._constraint.advance(token):
            raise VllmError(
                f"vLLM's answer is not in its form: {self._constraint.why()}. Start vLLM with "
                "--structured-outputs-config.backend guidance."
            )

    def _why_refused(self) -> str:
        if self._constraint is None:
            return ""
        for token in self._between_ids:
            self._constraint.advance(token)
        if self._constraint.accepting:
            return ""
        if self._finish == "length":
            return f"The limit of {self._request.limit} tokens was reached inside the answer: {self._constraint.why()}."
        return f"The answer ended early: {self._constraint.why()}."


def _choices_of(choice: Mapping[str, Any], num_top: int) -> list[Choice]:
    """The tokens of one choice of an event, each with its log-probability and `num_top` alternatives."""
    ids = choice.get("token_ids")
    told = choice.get("logprobs") or {}
    logprobs: Sequence[float | None] = told.get("token_logprobs") or ()
    if ids is None and (logprobs or choice.get("text")):
        raise VllmError("vLLM sent no token ids (return_token_ids). It may be too old for that: install a newer one.")
    ids = ids or ()
    if len(logprobs) != len(ids):
        raise VllmError(f"vLLM sent {len(ids)} tokens with {len(logprobs)} log-probabilities.")
    tops: Sequence[Mapping[str, float] | None] = told.get("top_logprobs") or [None] * len(ids)
    return [
        Choice(token=int(token), logprob=-9999.0 if logprob is None else float(logprob), top=_top(top)[:num_top])
        for token, logprob, top in zip(ids, logprobs, tops, strict=True)
    ]


def _top(told: Mapping[str, float] | None) -> tuple[tuple[int, float], ...]:
    """The alternatives of ``{"token_id:5": -0.1, …}``, best first."""
    found = [(int(name.removeprefix("token_id:")), float(value)) for name, value in (told or {}).items()]
    return tuple(sorted(found, key=lambda one: -one[1]))
