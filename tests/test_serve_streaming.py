"""Streamed text against the whole answer as evaluation reads it, in every kind of vocabulary."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from made_glm import LAYOUTS, renderer_named
from random_texts import random_texts
from tiny_models import TOKENIZERS, renderer_of
from weitiao.generate.chat import answer_text, reply_of
from weitiao.generate.constraint import end_text
from weitiao.generate.row import Finish, Generation
from weitiao.messages import Message, ToolCall, write_calls
from weitiao.render.base import Renderer
from weitiao.serve.streaming import TextStream

NAMES = (*TOKENIZERS, *(f"{layout} {kind}" for layout in LAYOUTS for kind in ("made", "real")))
TOOLS = ({"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}},)


def renderer(name: str, request: pytest.FixtureRequest) -> Renderer:
    return renderer_of(name) if name in TOKENIZERS else renderer_named(name, request)


def ended(token_ids: Sequence[int], finish: Finish = "stop") -> Generation:
    return Generation(index=0, token_ids=tuple(token_ids), finish=finish, logprob=0.0)


def in_pieces(stream: TextStream, token_ids: Sequence[int], draw: random.Random) -> list[str]:
    pieces, start = [], 0
    while start < len(token_ids):
        size = draw.choice((1, 1, 1, 2, 5))
        pieces.append(stream.push(token_ids[start : start + size]))
        start += size
    return pieces


@pytest.mark.parametrize("name", NAMES)
def test_pieces_joined_are_the_answer(name: str, request: pytest.FixtureRequest) -> None:
    form, draw = renderer(name, request), random.Random(1)
    texts = ["", "好", "a", "�", "你好�", " ", "\n", "  a", "🙂", *random_texts(90, seed=7)]
    num_early = 0
    for text in texts:
        answer = form.render_answer(text)
        ids = answer[: -len(form.render_answer(""))]
        for finish in ("stop", "length"):
            stream = TextStream(form)
            pieces = in_pieces(stream, ids, draw)
            assert all(not piece.endswith("\ufffd") or "\ufffd" in text for piece in pieces)
            early = "".join(pieces)
            done = ended(ids, finish)
            assert early + stream.finish(done) == reply_of(done, form, held=False).text
            num_early += bool(early)
    assert num_early > 60, "texts are sent while they are written, not at the end"


@pytest.mark.parametrize("name", NAMES)
def test_any_tokens_at_all_are_told_as_the_whole_answer_reads(name: str, request: pytest.FixtureRequest) -> None:
    form, draw = renderer(name, request), random.Random(2)
    known = [i for i in range(len(form.tokenizer)) if i not in form.stop_ids]
    single = [i for token, i in form.tokenizer.get_vocab().items() if len(token) == 6 and token.startswith("<0x")]
    for count in (*range(25), 120):
        ids = [draw.choice(single if single and draw.random() < 0.3 else known) for _ in range(count)]
        for finish in ("stop", "length"):
            for tools in ((), TOOLS):
                stream = TextStream(form, tools=tools)
                early = "".join(in_pieces(stream, ids, draw))
                done = ended(ids, finish)
                assert early + stream.finish(done) == reply_of(done, form, tools, held=False).text


@pytest.mark.parametrize("name", ["inst", "metaspace", "chatml", "chatglm made"])
def test_what_stands_between_answer_and_stop_token_is_never_sent(name: str, request: pytest.FixtureRequest) -> None:
    form = renderer(name, request)
    for text in ('["体育"]', "a ", "a", " "):
        whole = form.render_answer(text)
        ids = whole[:-1]  # with the blank that Llama 2's format writes before </s>
        stream = TextStream(form, held=True)
        sent = stream.push(ids)
        assert not end_text(form) or not sent.endswith(text + end_text(form))
        assert sent + stream.finish(ended(ids)) == answer_text(ids, form, stopped=True, held=True) == text
        stream = TextStream(form)
        assert stream.push(ids) + stream.finish(ended(ids)) == text


@pytest.mark.parametrize("name", ["chatml", "byte fallback", "chatglm made", "glm4 made"])
@pytest.mark.parametrize("stops", [["好"], ["END", "EN"], ["\n\n"], ["ab", "xabz"], ["aab"], ["很长的一段话", "话"]])
def test_answers_are_cut_before_the_first_stop_text(
    name: str, stops: list[str], request: pytest.FixtureRequest
) -> None:
    form, draw = renderer(name, request), random.Random(3)
    parts = [*"abxz \n很长的一段话END你", *stops, *stops]
    for _ in range(60):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 14)))
        ids = form.render_answer(text)[: -len(form.render_answer(""))]
        text = form.read_answer(ids)  # as the vocabulary spells it
        firsts = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
        stream = TextStream(form, stops=stops)
        sent = "".join(in_pieces(stream, ids, draw))
        sent += stream.finish(ended(ids))
        assert stream.stopped is bool(firsts)
        assert sent == (text[: min(firsts)[1]] if firsts else text)
        if not firsts:
            assert stream.num_tokens == len(ids)


def test_the_rest_after_a_stop_text_is_neither_sent_nor_counted() -> None:
    form = renderer_of("chatml")
    ids = form.render_answer("one two END three four five")[:-1]
    stream = TextStream(form, stops=["END"])
    assert "".join(stream.push([token]) for token in ids) == "one two "
    assert 0 < stream.num_tokens < len(ids)
    assert stream.push(ids) == stream.finish(ended(ids)) == ""


def test_a_refused_answer_has_no_rest() -> None:
    form = renderer_of("chatml")
    stream = TextStream(form, held=True)
    stream.push(form.render_answer('{"a')[:-1])
    assert stream.finish(ended(form.render_answer('{"a')[:-1], "refused")) == ""


@pytest.mark.parametrize("name", ["chatglm3 made", "glm4 made"])
def test_calls_in_a_formats_own_words_are_sent_as_they_are_read(name: str, request: pytest.FixtureRequest) -> None:
    form: Any = renderer(name, request)
    call = ToolCall(name="weather", arguments={"city": "北京"})
    asked = [Message(role="user", text="?")]
    for reply in (Message(role="assistant", text="", calls=(call,)), Message(role="assistant", text="你好")):
        ids = form.render_reply(asked, reply, TOOLS)[:-1]
        stream = TextStream(form, tools=TOOLS)
        sent = "".join(stream.push([token]) for token in ids) + stream.finish(ended(ids))
        assert sent == (write_calls("", [call]) if reply.calls else "你好")
        assert not reply.calls or json.loads(sent.split("\n")[1]) == {"name": "weather", "arguments": {"city": "北京"}}
