"""The official client of the protocol against a real server: whatever it asks is answered as the protocol has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from served_models import serving
from weitiao.serve.server import Server

HELLO = [{"role": "user", "content": "你好"}]
FREE = {"response_format": {"type": "text"}}
FACTS = "Instruction: 回答。\nInput: 谁搬到了哪里？\n\n去年王安搬到了北京。\nAnswer: "
LABEL = "Instruction: 回答。\nInput: 在哪一边？\n\n去年王安搬到了北京。\nAnswer: "
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["北京", "上海"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "北京"}'}}


@pytest.fixture(scope="module")
def served(tuned_run: Path) -> Iterator[tuple[str, Server]]:
    with serving(tuned_run) as address_and_server:
        yield address_and_server


@pytest.fixture(scope="module")
def client(served: tuple[str, Server]) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served[0]}/v1", api_key="EMPTY", max_retries=0, timeout=60) as made:
        yield made


def ask(client: OpenAI, **fields: Any) -> ChatCompletion:
    made: dict[str, Any] = {"model": "train", "messages": HELLO, "max_tokens": 12, **fields}
    return client.chat.completions.create(**made)


def stream(client: OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    made: dict[str, Any] = {"model": "train", "messages": HELLO, "max_tokens": 12, **fields}
    return list(client.chat.completions.create(stream=True, **made))


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(delta.content or "" for delta in deltas)


def finishes(chunks: list[ChatCompletionChunk]) -> list[str]:
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


# --- Whole replies ---------------------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[dict[str, Any], Callable[[ChatCompletion], bool]]] = {
    "plain": (FREE, lambda r: r.object == "chat.completion" and r.choices[0].message.role == "assistant"),
    "cut at max_tokens": ({**FREE, "max_tokens": 3}, lambda r: r.choices[0].finish_reason == "length"),
    "max_completion_tokens": (
        {**FREE, "max_tokens": openai.omit, "max_completion_tokens": 2},
        lambda r: r.usage is not None and r.usage.completion_tokens == 2,
    ),
    "usage adds up": (
        FREE,
        lambda r: r.usage is not None and r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens,
    ),
    "n": ({**FREE, "n": 3, "temperature": 1.5}, lambda r: [c.index for c in r.choices] == [0, 1, 2]),
    "n counts the prompt once": (
        {**FREE, "n": 2, "max_tokens": 2},
        lambda r: r.usage is not None and r.usage.completion_tokens == 4 and r.usage.prompt_tokens < 40,
    ),
    "no logprobs unasked": (FREE, lambda r: r.choices[0].logprobs is None),
    "logprobs": (
        {**FREE, "logprobs": True, "max_tokens": 4},
        lambda r: [one.top_logprobs for one in r.choices[0].logprobs.content] == [[]] * 4,  # type: ignore[union-attr]
    ),
    "top_logprobs": (
        {**FREE, "logprobs": True, "top_logprobs": 5, "max_tokens": 4},
        lambda r: all(
            len(one.top_logprobs) == 5 and one.top_logprobs[0].token == one.token and one.logprob <= 0
            for one in r.choices[0].logprobs.content  # type: ignore[union-attr]
        ),
    ),
    "the model named in the reply": (FREE, lambda r: r.model == "train"),
    "an id of its own": (FREE, lambda r: r.id.startswith("chatcmpl-") and r.created > 1_700_000_000),
    "a fingerprint": (FREE, lambda r: (r.system_fingerprint or "").startswith("fp_")),
    "content in parts": (
        {**FREE, "messages": [{"role": "user", "content": [{"type": "text", "text": "你好"}]}]},
        lambda r: r.choices[0].message.content is not None,
    ),
    "a system message": (
        {**FREE, "messages": [{"role": "system", "content": "你是小微。"}, *HELLO]},
        lambda r: r.usage is not None and r.usage.prompt_tokens > 10,
    ),
    "a developer message": (
        {**FREE, "messages": [{"role": "developer", "content": "你是小微。"}, *HELLO]},
        lambda r: r.choices[0].message.content is not None,
    ),
    "several turns": (
        {**FREE, "messages": [*HELLO, {"role": "assistant", "content": "嗯"}, {"role": "user", "content": "再见"}]},
        lambda r: r.choices[0].message.content is not None,
    ),
    "labels of a request": (
        {**FREE, "user": "u1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        lambda r: r.choices[0].message.content is not None,
    ),
    "the labelled form by default": (
        {"messages": [{"role": "user", "content": FACTS}], "max_tokens": 64},
        lambda r: (
            r.choices[0].message.refusal is not None
            or list(json.loads(r.choices[0].message.content or "")[0]) == ["人", "城"]
        ),
    ),
    "another task's form": (
        {"messages": [{"role": "user", "content": LABEL}], "max_tokens": 64},
        lambda r: json.loads(r.choices[0].message.content or "") in (["南方"], ["北方"]),
    ),
    "the form with a temperature": (
        {"messages": [{"role": "user", "content": LABEL}], "temperature": 2, "max_tokens": 64},
        lambda r: json.loads(r.choices[0].message.content or "") in (["南方"], ["北方"]),
    ),
    "json_schema": (
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}},
            "max_tokens": 100,
        },
        lambda r: list(json.loads(r.choices[0].message.content or "")) == ["name", "age"],
    ),
    "json_object": (
        {"response_format": {"type": "json_object"}, "max_tokens": 200, "logit_bias": {}},
        lambda r: (
            r.choices[0].message.refusal is not None or isinstance(json.loads(r.choices[0].message.content or ""), dict)
        ),
    ),
    "a form that does not fit into the limit is refused": (
        {"messages": [{"role": "user", "content": FACTS}], "max_tokens": 2},
        lambda r: (
            r.choices[0].message.content is None
            and "limit of 2 tokens" in (r.choices[0].message.refusal or "")
            and r.choices[0].finish_reason == "length"
        ),
    ),
    "a required call": (
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 130},
        lambda r: (
            r.choices[0].finish_reason == "tool_calls"
            and r.choices[0].message.tool_calls[0].function.name == "weather"  # type: ignore[index, union-attr]
            and json.loads(r.choices[0].message.tool_calls[0].function.arguments)["town"] in ("北京", "上海")  # type: ignore[index, union-attr]
        ),
    ),
    "a named call": (
        {
            "tools": [WEATHER, CLOCK],
            "tool_choice": {"type": "function", "function": {"name": "clock"}},
            "max_tokens": 100,
        },
        lambda r: [call.function.name for call in r.choices[0].message.tool_calls] == ["clock"],  # type: ignore[union-attr]
    ),
    "tools that are not called": (
        {"tools": [WEATHER], "tool_choice": "auto"},
        lambda r: r.choices[0].finish_reason in ("stop", "length") and not r.choices[0].message.tool_calls,
    ),
    "tools that must not be called": (
        {"tools": [WEATHER], "tool_choice": "none"},
        lambda r: not r.choices[0].message.tool_calls,
    ),
    "what a tool gave back": (
        {
            "messages": [
                *HELLO,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "22 度"},
            ],
            "tools": [WEATHER],
        },
        lambda r: r.choices[0].finish_reason in ("stop", "length"),
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_replies_are_as_the_protocol_has_them(client: OpenAI, case: str) -> None:
    fields, holds = WHOLE[case]
    reply = ask(client, **fields)
    assert holds(reply), reply


# --- Sampling --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_reply_and_another_seed_another(client: OpenAI) -> None:
    same = [ask(client, **FREE, temperature=2, seed=7).choices[0].message.content for _ in range(2)]
    assert same[0] == same[1]
    others = {ask(client, **FREE, temperature=2, seed=seed).choices[0].message.content for seed in range(8, 12)}
    assert len(others | {same[0]}) > 1


def test_choices_of_one_request_differ_and_are_repeated_by_the_seed(client: OpenAI) -> None:
    first = [c.message.content for c in ask(client, **FREE, temperature=2, n=4, seed=1).choices]
    assert first == [c.message.content for c in ask(client, **FREE, temperature=2, n=4, seed=1).choices]
    assert len(set(first)) > 1


def test_without_temperature_replies_are_those_of_the_contract(client: OpenAI) -> None:
    assert len({ask(client, **FREE).choices[0].message.content for _ in range(3)}) == 1


def test_a_tiny_nucleus_or_one_best_token_is_greedy(client: OpenAI) -> None:
    greedy = ask(client, **FREE, temperature=0).choices[0].message.content
    assert ask(client, **FREE, temperature=1.5, top_p=1e-6).choices[0].message.content == greedy
    assert ask(client, **FREE, temperature=1.5, extra_body={"top_k": 1}).choices[0].message.content == greedy


def tokens_of(reply: ChatCompletion) -> list[str]:
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    return [str(one.bytes) for one in logprobs.content]


def test_a_bias_forces_or_forbids_a_token(client: OpenAI, served: tuple[str, Server]) -> None:
    tokenizer = served[1].models["train"].opened.tokenizer
    forced = tokenizer.convert_tokens_to_ids("s")
    said = ask(client, **FREE, max_tokens=4, logit_bias={str(forced): 100}).choices[0].message.content
    assert said == "ssss"
    plain = ask(client, **FREE, max_tokens=1, logprobs=True)
    best = tokens_of(plain)[0]
    ids = [i for i in range(len(tokenizer)) if str(list(served[1].models["train"].spell(i))) == best]
    biased = ask(client, **FREE, max_tokens=1, logprobs=True, logit_bias={str(i): -100 for i in ids})
    assert tokens_of(biased)[0] != best


def test_penalties_keep_tokens_from_coming_again(client: OpenAI, served: tuple[str, Server]) -> None:
    forced = served[1].models["train"].opened.tokenizer.convert_tokens_to_ids("s")
    liked = {str(forced): 3.5}
    freely = ask(client, **FREE, max_tokens=10, logit_bias=liked, logprobs=True)
    for penalty in ("presence_penalty", "frequency_penalty"):
        held = ask(client, **FREE, max_tokens=10, logit_bias=liked, logprobs=True, extra_body={penalty: 2})
        assert tokens_of(held).count("[115]") < tokens_of(freely).count("[115]")


def test_a_stop_text_ends_the_reply_before_it(client: OpenAI, served: tuple[str, Server]) -> None:
    forced = served[1].models["train"].opened.tokenizer.convert_tokens_to_ids("s")
    bias = {str(forced): 100}
    for stop in ("sss", ["never", "sss"]):
        reply = ask(client, **FREE, logit_bias=bias, stop=stop)
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("", "stop")
    assert ask(client, **FREE, logit_bias=bias, max_tokens=3, stop="ssss").choices[0].message.content == "sss"
    chunks = stream(client, **FREE, logit_bias=bias, stop="ss")
    assert text_of(chunks) == "" and finishes(chunks) == ["stop"]


# --- Streams ---------------------------------------------------------------------------------------------------------

STREAMED: dict[str, dict[str, Any]] = {
    "free": FREE,
    "one token": {**FREE, "max_tokens": 1},
    "long": {**FREE, "max_tokens": 60},
    "a form": {"messages": [{"role": "user", "content": FACTS}], "max_tokens": 64},
    "labels": {"messages": [{"role": "user", "content": LABEL}], "max_tokens": 64},
    "a stop": {**FREE, "stop": ["e", "。"], "max_tokens": 30},
    "drawn": {**FREE, "temperature": 1.2, "seed": 3, "max_tokens": 30},
    "several": {**FREE, "n": 3, "temperature": 1.2, "seed": 4},
    "a schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
        "max_tokens": 100,
    },
    "tools at rest": {"tools": [WEATHER], "max_tokens": 20},
}


@pytest.mark.parametrize("case", STREAMED)
def test_a_stream_says_what_the_whole_reply_says(client: OpenAI, case: str) -> None:
    fields = STREAMED[case]
    whole, chunks = ask(client, **fields), stream(client, **fields)
    for choice in whole.choices:
        if choice.message.refusal is None:
            assert text_of(chunks, choice.index) == (choice.message.content or "")
    assert sorted(finishes(chunks)) == sorted(str(choice.finish_reason) for choice in whole.choices)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.object == "chat.completion.chunk" and chunk.model == "train" for chunk in chunks)


def test_a_stream_tells_its_usage_when_asked(client: OpenAI) -> None:
    chunks = stream(client, **FREE, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == ask(client, **FREE).usage.completion_tokens  # type: ignore[union-attr]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in stream(client, **FREE))


def test_a_streamed_call_is_the_call_of_the_whole_reply(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 130,
        "parallel_tool_calls": False,
    }
    whole, chunks = ask(client, **fields), stream(client, **fields)
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for one in chunk.choices[0].delta.tool_calls or ():
            assert one.function is not None
            calls.setdefault(one.index, ["", ""])
            calls[one.index][0] += one.function.name or ""
            calls[one.index][1] += one.function.arguments or ""
    told = whole.choices[0].message.tool_calls
    assert told is not None
    assert list(calls.values()) == [[call.function.name, call.function.arguments] for call in told]  # type: ignore[union-attr]
    assert finishes(chunks) == ["tool_calls"]


def test_streamed_logprobs_are_those_of_the_whole_reply(client: OpenAI) -> None:
    fields: dict[str, Any] = {**FREE, "logprobs": True, "top_logprobs": 2}
    told = [
        token.token
        for chunk in stream(client, **fields)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or ()
    ]
    assert told == [token.token for token in ask(client, **fields).choices[0].logprobs.content]  # type: ignore[union-attr]


def test_the_streaming_helper_of_the_client_parses_a_schema(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    with client.chat.completions.stream(
        model="train", messages=[{"role": "user", "content": "你好"}], response_format=form, max_tokens=100
    ) as events:
        final = events.get_final_completion()
    assert list(json.loads(final.choices[0].message.content or "")) == ["name", "age"]


# --- Other routes ----------------------------------------------------------------------------------------------------


def test_models_are_listed_and_described(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["train"]
    assert client.models.retrieve("train").owned_by == "weitiao"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_plain_completions(client: OpenAI) -> None:
    one = client.completions.create(model="train", prompt="你好", max_tokens=4, logprobs=2)
    assert one.choices[0].logprobs is not None and len(one.choices[0].logprobs.tokens or ()) == 4
    echoed = client.completions.create(model="train", prompt="你好", max_tokens=4, echo=True)
    assert echoed.choices[0].text == f"你好{one.choices[0].text}"
    several = client.completions.create(model="train", prompt=["你好", "再见"], max_tokens=4, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == one.choices[0].text
    tokens = client.completions.create(model="train", prompt=[70, 71], max_tokens=4)
    assert tokens.usage is not None and tokens.usage.prompt_tokens == 2
    chunks = list(client.completions.create(model="train", prompt="你好", max_tokens=4, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text
