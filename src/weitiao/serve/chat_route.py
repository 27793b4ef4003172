"""``POST /v1/chat/completions``: from a request that was read to the reply's JSON, whole or as a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..generate.sampling import Choice
from ..messages import ToolCall, write_calls
from .choices import Ended, More, follow_all
from .conversations import describe_calls
from .problems import RefusedError
from .protocol import ChatRequest
from .requests import Ticket, Usage
from .served import Ask, ServedModel
from .server import Server
from .tool_stream import CallStream
from .writing import DONE, Heading, chat_logprobs, sse, usage_shape


@dataclass(kw_only=True)
class _Growing:
    """One choice while it comes."""

    calls: CallStream
    text: str = ""
    """What was told of it."""
    untold: list[Choice] = field(default_factory=list)
    """Tokens whose log-probabilities wait for their text."""
    tokens: list[Choice] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ChatReply:
    """A reply to a chat request: the tickets that are running, and how their choices are written."""

    server: Server
    model: ServedModel
    request: ChatRequest
    ask: Ask
    tickets: Sequence[Ticket]
    heading: Heading

    async def whole(self) -> dict[str, Any]:
        """The reply as one object. Raises RefusedError when the model could not finish it."""
        growing = [self._begin() for _ in self.tickets]
        choices: list[dict[str, Any]] = [{} for _ in self.tickets]
        usages: list[Usage | None] = [None] * len(self.tickets)
        async with aclosing(self._follow()) as events:
            async for event in events:
                one = growing[event.index]
                if isinstance(event, More):
                    one.text += one.calls.push(event.text)
                    one.tokens += event.tokens
                    continue
                rest, calls = self._finish(one, event)
                usages[event.index] = event.usage
                message, finish = self._message(one.text + rest, calls, event)
                choices[event.index] = {
                    "index": event.index,
                    "message": message,
                    "logprobs": self._logprobs(one.tokens),
                    "finish_reason": finish,
                }
        told = [usage for usage in usages if usage is not None]
        return {**self.heading.shape("chat.completion"), "choices": choices, "usage": usage_shape(told)}

    async def stream(self) -> AsyncGenerator[bytes]:
        """The reply as server-sent events. What goes wrong on the way is told as an event, too."""
        growing = [self._begin() for _ in self.tickets]
        usages: list[Usage] = []
        try:
            for index in range(len(self.tickets)):
                yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            async with aclosing(self._follow()) as events:
                async for event in events:
                    one = growing[event.index]
                    if isinstance(event, More):
                        one.untold += event.tokens
                        if text := one.calls.push(event.text):
                            one.text += text
                            yield self._chunk(event.index, {"content": text}, tokens=self._told(one))
                        continue
                    usages.append(event.usage)
                    for chunk in self._end(one, event):
                        yield chunk
            if self.request.stream_options is not None and self.request.stream_options.include_usage:
                shape = {**self.heading.shape("chat.completion.chunk"), "choices": [], "usage": usage_shape(usages)}
                yield sse(shape)
        except RefusedError as refused:
            yield sse(refused.body)
        finally:  # a client may leave before the first choice is followed
            for ticket in self.tickets:
                ticket.cancel()
        yield DONE

    # ---- one choice ------------------------------------------------------------------------------------------------

    def _begin(self) -> _Growing:
        names = [str(tool["name"]) for tool in self.ask.tools]
        in_tags = bool(names) and self.model.calls_in_tags(self.ask.tools)
        return _Growing(calls=CallStream(names=names, in_tags=in_tags))

    def _follow(self) -> AsyncGenerator[More | Ended]:
        return follow_all(self.tickets, self.ask, self.model.opened.renderer, stops=self.request.stops)

    def _finish(self, one: _Growing, event: Ended) -> tuple[str, tuple[ToolCall, ...]]:
        """The text still to be told, and the calls; the answer is counted and can be rated from now on."""
        whole = event.reply.text if event.reply is not None and self.ask.tools else event.text
        rest, calls = one.calls.finish(whole)
        self.server.note_answer(self.heading.id, self.model, self.ask, event, ticket=self.tickets[event.index])
        return rest, calls

    def _end(self, one: _Growing, event: Ended) -> list[bytes]:
        """The last chunks of a choice."""
        rest, calls = self._finish(one, event)
        message, finish = self._message(one.text + rest, calls, event)
        chunks = []
        if rest or (one.untold and self.request.logprobs):
            chunks.append(self._chunk(event.index, {"content": rest}, tokens=self._told(one)))
        if message.get("refusal"):
            chunks.append(self._chunk(event.index, {"refusal": message["refusal"]}))
        for place, call in enumerate(message.get("tool_calls") or ()):
            opening = {**call, "index": place, "function": {"name": call["function"]["name"], "arguments": ""}}
            chunks.append(self._chunk(event.index, {"tool_calls": [opening]}))
            arguments = {"index": place, "function": {"arguments": call["function"]["arguments"]}}
            chunks.append(self._chunk(event.index, {"tool_calls": [arguments]}))
        if "function_call" in message:
            chunks.append(self._chunk(event.index, {"function_call": message["function_call"]}))
        # an empty text, as many clients print what every chunk holds, and would print None
        last = {} if calls or event.refusal else {"content": ""}
        return [*chunks, self._chunk(event.index, last, finish=finish)]

    def _message(self, text: str, calls: Sequence[ToolCall], event: Ended) -> tuple[dict[str, Any], str]:
        """The assistant's message and the reason why it ended."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if event.refusal:
            return {**message, "content": None, "refusal": event.refusal}, event.finish
        if not calls:
            return message, event.finish
        if self.request.one_call:  # there is room for one: the others stay text
            text, calls = write_calls(text, calls[1:]) if calls[1:] else text, calls[:1]
        message["content"] = text or None
        if self.request.functions is not None:
            call = calls[0]
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            return {**message, "function_call": {"name": call.name, "arguments": arguments}}, "function_call"
        return {**message, "tool_calls": describe_calls(calls)}, "tool_calls"

    def _told(self, one: _Growing) -> Sequence[Choice]:
        tokens, one.untold = one.untold, []
        return tokens

    def _logprobs(self, tokens: Sequence[Choice]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return chat_logprobs(tokens, self.model.spell, self.request.top_logprobs or 0)

    def _chunk(
        self, index: int, delta: dict[str, Any], *, tokens: Sequence[Choice] = (), finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(tokens) if tokens else None}
        shape = self.heading.shape("chat.completion.chunk")
        wants_usage = self.request.stream_options is not None and self.request.stream_options.include_usage
        usage = {"usage": None} if wants_usage else {}
        return sse({**shape, "choices": [{**choice, "finish_reason": finish}], **usage})
