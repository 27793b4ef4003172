"""What the server refuses, as the official client of the protocol sees it: a sentence with the place, never silence."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from test_serve_openai import HELLO, WEATHER, ask
from test_serve_openai import client as client
from test_serve_openai import served as served
from weitiao.serve.server import Server

BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "another model": ({"model": "gpt-4"}, 404, "Served are: train"),
    "no messages": ({"messages": []}, 400, "messages"),
    "the assistant last": ({"messages": [*HELLO, {"role": "assistant", "content": "嗯"}]}, 400, "nothing to answer"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content",
    ),
    "an unknown field": ({"extra_body": {"foo": 1}}, 400, "foo: is not a field"),
    "a hot temperature": ({"temperature": 3}, 400, "temperature"),
    "no nucleus": ({"top_p": 0}, 400, "top_p"),
    "no choices": ({"n": 0}, 400, "n:"),
    "five stops": ({"stop": list("abcde")}, 400, "stop"),
    "an empty stop": ({"stop": ""}, 400, "empty"),
    "top_logprobs alone": ({"top_logprobs": 2}, 400, "logprobs is not true"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "a strong penalty": ({"presence_penalty": 2.1}, 400, "presence_penalty"),
    "a token that is none": ({"logit_bias": {"x": 1}}, 400, "numbers of tokens"),
    "a token that is not there": ({"logit_bias": {"999999": 1}}, 400, "no token 999999"),
    "two limits": ({"max_completion_tokens": 5}, 400, "two names"),
    "too long": ({"max_tokens": 10_000_000}, 400, "Shorten"),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "nix"}}}},
        400,
        "no JSON Schema",
    ),
    "a schema that cannot be held": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": {"not": {}}}}},
        400,
        "cannot be enforced",
    ),
    "another format": ({"response_format": {"type": "yaml"}}, 400, "response_format"),
    "a choice without tools": ({"tool_choice": "required"}, 400, "there are no tools"),
    "a tool that is not offered": (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        400,
        "not among the tools",
    ),
    "tools and a schema": (
        {"tools": [WEATHER], "response_format": {"type": "json_object"}},
        400,
        "cannot be held to both",
    ),
    "a result of no call": (
        {"messages": [*HELLO, {"role": "tool", "tool_call_id": "x", "content": "1"}]},
        400,
        "tool_call_id",
    ),
    "options of no stream": ({"stream_options": {"include_usage": True}}, 400, "stream is not true"),
    "another task": ({"extra_body": {"task": "poems"}}, 404, "Its tasks: "),
    "to be stored": ({"store": True}, 400, "store"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_sentences_in_the_protocols_shape(client: OpenAI, case: str) -> None:
    fields, status, said = BAD[case]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **{**fields})
    assert caught.value.status_code == status
    body = caught.value.body
    assert isinstance(body, dict) and {"message", "type", "param", "code"} == body.keys()
    assert said in f"{body['param']}: {body['message']}", body


def test_bodies_that_are_no_json_are_told_so(served: tuple[str, Server]) -> None:
    url = f"{served[0]}/v1/chat/completions"
    cut = httpx.post(url, content='{"model": ', headers={"Content-Type": "application/json"})
    assert cut.status_code == 400 and "not JSON" in cut.json()["error"]["message"]
    form = httpx.post(url, data={"model": "train"})
    assert form.status_code == 400 and "application/json" in form.json()["error"]["message"]
    assert httpx.get(url).status_code == 405 and httpx.get(url).json()["error"]["type"] == "invalid_request_error"
