"""``POST /v1/completions``: plain text goes on, as the model would write it; no chat format, no form."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from ..generate.sampling import Choice
from .choices import Ended, More, follow_all
from .problems import RefusedError, bad_request
from .protocol import CompletionRequest
from .requests import Ticket, Usage
from .served import Ask, ServedModel
from .server import Server
from .writing import DONE, Heading, plain_logprobs, sse, usage_shape

_USUAL_TOKENS = 16
"""The protocol's own default."""


def read_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, each a text or tokens."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]


def ask_plain(model: ServedModel, prompt: str | list[int], request: CompletionRequest) -> Ask:
    """What one prompt asks for. Raises RefusedError when it does not fit."""
    tokenizer = model.opened.tokenizer
    tokens = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    limit = request.max_tokens or _USUAL_TOKENS
    if not tokens:
        raise bad_request("The prompt has no tokens. Give one character at least.", param="prompt")
    if len(tokens) + limit > model.max_context:
        raise bad_request(
            f"The prompt has {len(tokens)} tokens and {limit} more are asked for, but {model.name} takes "
            f"{model.max_context} together. Shorten the prompt or ask for fewer.",
            param="prompt",
            code="context_length_exceeded",
        )
    record = model.plain_record(prompt if isinstance(prompt, str) else str(tokenizer.decode(tokens)))
    return Ask(
        prompt_ids=tuple(tokens), tools=(), constraint=None, limit=limit, task=None, record=record, as_evaluated=False
    )


@dataclass(kw_only=True)
class _Growing:
    text: str = ""
    tokens: list[Choice] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PlainReply:
    """A reply to a completion request: for each prompt its choices."""

    server: Server
    model: ServedModel
    request: CompletionRequest
    asks: Sequence[Ask]
    tickets: Sequence[Sequence[Ticket]]
    heading: Heading

    async def whole(self) -> dict[str, Any]:
        """The reply as one object. Raises RefusedError when the model could not finish it."""
        choices: list[dict[str, Any]] = []
        usages: list[list[Usage]] = []
        try:
            for number, (ask, tickets) in enumerate(zip(self.asks, self.tickets, strict=True)):
                growing = [_Growing() for _ in tickets]
                found: list[dict[str, Any]] = [{} for _ in tickets]
                usages.append([])
                async with aclosing(self._follow(ask, tickets)) as events:
                    async for event in events:
                        one = growing[event.index]
                        if isinstance(event, More):
                            one.tokens += event.tokens
                            continue
                        usages[-1].append(event.usage)
                        self.server.note_answer(self.heading.id, self.model, ask, event, ticket=tickets[event.index])
                        found[event.index] = {
                            "index": number * len(tickets) + event.index,
                            "text": self._echo(ask) + event.text,
                            "logprobs": self._logprobs(one.tokens, offset=0),
                            "finish_reason": event.finish,
                        }
                choices += found
        finally:
            self._cancel()  # where one prompt failed, nobody waits for the others
        return {**self.heading.shape("text_completion"), "choices": choices, "usage": _sum(usages)}

    async def stream(self) -> AsyncGenerator[bytes]:
        """The reply as server-sent events, one prompt after the other."""
        usages: list[list[Usage]] = []
        try:
            for number, (ask, tickets) in enumerate(zip(self.asks, self.tickets, strict=True)):
                growing = [_Growing(text=self._echo(ask)) for _ in tickets]
                usages.append([])
                first = number * len(tickets)
                if self.request.echo:
                    for index in range(len(tickets)):
                        yield self._chunk(first + index, self._echo(ask), (), offset=0)
                async with aclosing(self._follow(ask, tickets)) as events:
                    async for event in events:
                        one = growing[event.index]
                        if isinstance(event, More):
                            one.tokens += event.tokens
                            if event.text:
                                yield self._chunk(first + event.index, event.text, one.tokens, offset=len(one.text))
                                one.text += event.text
                                one.tokens = []
                            continue
                        usages[-1].append(event.usage)
                        self.server.note_answer(self.heading.id, self.model, ask, event, ticket=tickets[event.index])
                        yield self._chunk(
                            first + event.index, "", one.tokens, offset=len(one.text), finish=event.finish
                        )
            if self.request.stream_options is not None and self.request.stream_options.include_usage:
                yield sse({**self.heading.shape("text_completion"), "choices": [], "usage": _sum(usages)})
        except RefusedError as refused:
            yield sse(refused.body)
        finally:
            self._cancel()
        yield DONE

    def _cancel(self) -> None:
        """Let go what is still running."""
        for tickets in self.tickets:
            for ticket in tickets:
                ticket.cancel()

    def _follow(self, ask: Ask, tickets: Sequence[Ticket]) -> AsyncGenerator[More | Ended]:
        return follow_all(tickets, ask, self.model.opened.renderer, stops=self.request.stops)

    def _echo(self, ask: Ask) -> str:
        return ask.record.prompt if self.request.echo else ""

    def _logprobs(self, tokens: Sequence[Choice], *, offset: int) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        return plain_logprobs(tokens, self.model.spell, self.request.logprobs, offset=offset)

    def _chunk(
        self, index: int, text: str, tokens: Sequence[Choice], *, offset: int, finish: str | None = None
    ) -> bytes:
        logprobs = self._logprobs(tokens, offset=offset) if tokens else None
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return sse({**self.heading.shape("text_completion"), "choices": [choice]})


def _sum(usages: Sequence[Sequence[Usage]]) -> dict[str, Any]:
    """The tokens of several prompts, each with its choices."""
    prompt = sum(one[0].prompt_tokens for one in usages)
    cached = sum(one[0].cached_tokens for one in usages)
    completion = sum(usage.completion_tokens for one in usages for usage in one)
    merged = replace(usages[0][0], prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
    return usage_shape([merged])
