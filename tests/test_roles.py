"""Roles of ChatGLM3 and GLM-4: the originals' own ids, what is learnt, tools there and back, nothing ever run."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from made_glm import renderer_named, vocabulary_folder
from test_conversation import CALL, TALK, TALK_REPLY, TOOL_TALK, WEATHER, learnt_runs, say
from tiny_models import model_of
from weitiao.data.formats import row_to_record
from weitiao.data.record import Record
from weitiao.errors import RenderError
from weitiao.generate.chat import reply_all, token_spans
from weitiao.generate.constraint import compiler_of
from weitiao.generate.engine import Sampling
from weitiao.messages import ToolCall, write_calls
from weitiao.render.base import Example
from weitiao.render.glm_calls import Dialect, read_call, write_call
from weitiao.render.roles import RolesRenderer
from weitiao.render.template import TemplateRenderer

GetRenderer = Callable[[str], RolesRenderer]
CASES = ("chatglm3 made", "glm4 made", "chatglm3 real", "glm4 real")
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\x00\ufffd▁")  # rows hold no NUL
CONTROL = ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>", "sop", "</s>", "\n")
TEXTS = st.lists(st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(CONTROL)), max_size=6).map("".join)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**18), 10**18), st.floats(allow_nan=False, allow_infinity=False)
    )
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["city", "城市", "from", "user-id", "ﬁ", "a b", "True"]), VALUES, max_size=4
)


@pytest.fixture
def named(request: pytest.FixtureRequest) -> GetRenderer:
    return lambda name: renderer_named(name, request)  # type: ignore[no-any-return]


@pytest.fixture(params=CASES)
def renderer(request: pytest.FixtureRequest, named: GetRenderer) -> RolesRenderer:
    return named(request.param)


@pytest.fixture(params=CASES[:2])
def made(request: pytest.FixtureRequest, named: GetRenderer) -> RolesRenderer:
    return named(request.param)


def goldens(layout: Any, shared: Path) -> Any:
    return json.loads((vocabulary_folder(layout, shared) / "goldens.json").read_text(encoding="utf-8"))


def control_ids(renderer: RolesRenderer) -> dict[str, int]:
    return {token.content: i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}


def shown(renderer: RolesRenderer, example: Example) -> str:
    """The example's text, what is learnt in braces."""
    text, inside = "", False
    for piece, learnt in zip(renderer.show_tokens(example.token_ids), example.loss_mask, strict=True):
        text += ("{" if learnt and not inside else "}" if inside and not learnt else "") + piece
        inside = learnt
    return text + ("}" if inside else "")


# ---- the originals' ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "ids"), [("chatglm3", "input_ids"), ("glm4", "ids_gen1")])
def test_prompts_are_the_original_ones_and_then_the_empty_line(
    named: GetRenderer, shared_or_skip: Path, layout: Dialect, ids: str
) -> None:
    """Where tools are on offer the prompt ends as the original's does; else the empty line is already there."""
    renderer = named(f"{layout} real")
    empty_line = [30910, 13] if layout == "chatglm3" else [198]
    for case in goldens(layout, shared_or_skip)["chat"]:
        row = {"conversations": [*case["messages"], {"role": "assistant", "content": "?"}]}
        record = row_to_record(row, "rows.jsonl:1", require_target=True)
        assert isinstance(record, Record)
        expected = case[ids] + ([] if record.tools else empty_line)
        assert list(renderer.render_prompt(record.messages, record.tools)) == expected


@pytest.mark.parametrize("layout", ["chatglm3", "glm4"])
def test_turns_have_the_ids_of_the_originals_single_messages(
    named: GetRenderer, shared_or_skip: Path, layout: Dialect
) -> None:
    renderer = named(f"{layout} real")
    for case in goldens(layout, shared_or_skip)["single_messages"]:
        role = {"observation": "tool"}.get(case["role"], case["role"])
        if case["metadata"]:
            continue  # its content is no call
        talk = [say("user", "?"), say(role, case["message"]), say("user", "?")]
        assert tuple(case["ids"]) in {
            renderer.render_prompt(talk)[start:][: len(case["ids"])]
            for start in range(len(renderer.render_prompt(talk)))
        }


def test_stop_tokens_are_the_originals(named: GetRenderer) -> None:
    assert named("chatglm3 real").stop_ids == (2, 64795, 64797)
    assert set(named("glm4 real").stop_ids) == {151329, 151336, 151338}
    assert named("glm4 real").stop_ids[0] == 151336


# ---- what is learnt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatglm3 made",
            "[gMASK]sop<|user|> \n 甲乙<|assistant|>{ \n 丙<|user|>} \n 丁<|assistant|>{ \n 戊己</s>}",
        ),
        ("glm4 made", "[gMASK]<sop><|user|>\n甲乙<|assistant|>{\n丙<|user|>}\n丁<|assistant|>{\n戊己<|user|>}"),
    ],
)
def test_the_family_learns_the_empty_line_the_reply_and_the_role_that_ends_it(
    named: GetRenderer, name: str, expected: str
) -> None:
    talk = [say("user", "甲乙"), say("assistant", "丙"), say("user", "丁")]
    (example,) = named(name).render_conversation(talk, say("assistant", "戊己"))
    assert shown(named(name), example) == expected
    (bare,) = named(name).render_conversation(talk, say("assistant", "戊己"), masks="answer")
    assert bare.token_ids == example.token_ids
    line = " \n" if "chatglm3" in name else "\n"
    assert shown(named(name), bare) == expected.replace("{" + line, line + "{")


def test_each_learnt_reply_follows_the_very_prompt_that_asks_for_it(renderer: RolesRenderer) -> None:
    whole = (*TALK, TALK_REPLY)
    (example,) = renderer.render_conversation(TALK, TALK_REPLY, turns="all", masks="answer")
    runs = learnt_runs([example])
    assert [prompt for prompt, _ in runs] == [renderer.render_prompt(whole[:at]) for at in (2, 4, 6)]
    assert [renderer.read_answer(reply) for _, reply in runs] == [whole[at].text for at in (2, 4, 6)]
    assert runs[-1][1] == renderer.render_answer(TALK_REPLY.text) and example.num_answer == len(runs[-1][1])


@pytest.mark.parametrize("tools", [(), (WEATHER,)])
def test_a_conversation_with_calls_is_one_example_and_its_replies_read_back(
    renderer: RolesRenderer, tools: tuple[Any, ...]
) -> None:
    """Also where no tool is on offer: then calls are text."""
    reply = say("assistant", "", ToolCall(name="get_weather", arguments={"city": "广州"}))
    whole = (*TOOL_TALK, reply)
    (example,) = renderer.render_conversation(TOOL_TALK, reply, tools=tools, turns="all", masks="answer")
    runs = learnt_runs([example])
    for (prompt, learnt), at in zip(runs, (1, 4, 6), strict=True):
        assert prompt == renderer.render_prompt(whole[:at], tools)
        assert renderer.read_answer(learnt, tools) == write_calls(whole[at].text, whole[at].calls)
    user, tool = control_ids(renderer)["<|user|>"], control_ids(renderer)["<|observation|>"]
    assert [learnt[-1] for _, learnt in runs] == [tool, user, tool]


# ---- texts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=4, max_size=4), arguments=ARGUMENTS)
def test_no_text_becomes_a_control_token(renderer: RolesRenderer, texts: list[str], arguments: dict[str, Any]) -> None:
    system, question, result, answer = texts
    call = ToolCall(name="get_weather", arguments=arguments)
    talk = [say("system", f"a{system}"), say("user", question), say("assistant", answer, call), say("tool", result)]
    tool = {**WEATHER, "description": system}
    (example,) = renderer.render_conversation(talk, say("assistant", answer), tools=[tool])
    names = {i: name for name, i in control_ids(renderer).items() if name != "<unk>"}
    found = [names[i] for i in example.token_ids if i in names]
    systems = ["<|system|>"] * (2 if "<|endoftext|>" in names.values() else 1)  # GLM-4 offers tools in one of their own
    assert found[2:-1] == [
        *systems,
        *("<|user|>", "<|assistant|>", *(["<|assistant|>"] if answer else []), "<|observation|>", "<|assistant|>"),
    ]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=TEXTS)
def test_every_answer_reads_back_as_it_was_written(renderer: RolesRenderer, answer: str) -> None:
    """Also where tools are on offer, whatever its first line looks like."""
    assert renderer.read_answer(renderer.render_answer(answer)) == answer
    reply = renderer.render_reply([say("user", "?")], say("assistant", answer), [WEATHER])
    assert renderer.read_answer(reply, [WEATHER]) == answer


# ---- tools -----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(says=TEXTS, arguments=st.lists(ARGUMENTS, min_size=1, max_size=2))
def test_every_call_reads_back_as_it_was_written(
    made: RolesRenderer, says: str, arguments: list[dict[str, Any]]
) -> None:
    calls = [ToolCall(name="get_weather", arguments=each) for each in arguments]
    reply = made.render_reply([say("user", "?")], say("assistant", says, *calls), [WEATHER])
    assert made.read_answer(reply, [WEATHER]) == write_calls(says, calls)


@pytest.mark.parametrize(
    ("arguments", "chatglm3"),
    [
        ({"city": "北京", "n": 1.5}, '```python\ntool_call(city="北京", n=1.5)\n```'),
        ({"a": {"b": [None, True, 'x"y\n']}}, '```python\ntool_call(a={"b": [None, True, "x\\"y\\n"]})\n```'),
        ({}, "```python\ntool_call()\n```"),
        ({"user-id": 1}, '{"user-id": 1}'),
    ],
)
def test_calls_are_python_for_chatglm3_and_json_for_glm4(arguments: dict[str, Any], chatglm3: str) -> None:
    call = ToolCall(name="get_weather", arguments=arguments)
    assert write_call(call, "chatglm3") == chatglm3
    assert write_call(call, "glm4") == json.dumps(arguments, ensure_ascii=False)
    assert read_call("get_weather", chatglm3, "chatglm3") == read_call("get_weather", write_call(call, "glm4"), "glm4")


@pytest.mark.parametrize("code", ["print(1)", "\n  a = '```'\n\n", "", "{'a': 1}"])
def test_the_interpreters_code_stands_in_its_fence_as_it_is(named: GetRenderer, code: str) -> None:
    call = ToolCall(name="interpreter", arguments={"code": code})
    assert write_call(call, "chatglm3") == f"```python\n{code}\n```"
    reply = named("chatglm3 made").render_reply([say("user", "?")], say("assistant", "", call), [WEATHER])
    assert named("chatglm3 made").read_answer(reply, [WEATHER]) == write_calls("", [call])


@pytest.mark.parametrize(
    "content",
    [
        "```python\ntool_call(city=__import__('os').system('touch PWNED'))\n```",
        "```python\ntool_call(city=open('/etc/passwd').read())\n```",
        "```python\nprint('x')\n```",
        "```python\ntool_call(city='北\n```",
        "tool_call(**{'city': 1})",
        '{"city": ',
        "[1]",
    ],
)
def test_a_call_that_cannot_be_read_is_shown_and_never_run(
    made: RolesRenderer, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = made.encode_inside("get_weather\n")
    reply = (*line, *made.render_answer(content))
    assert made.read_answer(reply, [WEATHER]) == f"get_weather\n{content}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pieces", "read"),
    [
        (["你好"], "你好"),  # no first line at all
        (["你好，\n我是助手"], "你好，\n我是助手"),  # a first line that is no tool
        (["\n好的", "get_weather\n{}"], '好的\n<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'),
        (["\n好的", "get_weather"], "\n好的<|assistant|>get_weather"),  # cut at the limit
        (["get_weather\n{}", "\n好的"], "get_weather\n{}<|assistant|>\n好的"),  # text behind a call
        ([""], ""),
    ],
)
def test_replies_that_are_no_text_and_then_calls_come_back_as_they_are(
    named: GetRenderer, pieces: list[str], read: str
) -> None:
    renderer = named("glm4 made")
    assistant = control_ids(renderer)["<|assistant|>"]
    ids: list[int] = []
    for piece in pieces:
        ids += [*([assistant] if ids else []), *renderer.encode_inside(piece)]
    assert renderer.read_answer(ids, [WEATHER]) == read


def test_a_tool_whose_name_holds_a_line_break_is_refused(made: RolesRenderer) -> None:
    with pytest.raises(RenderError, match="holds a line break"):
        made.render_reply([say("user", "?")], say("assistant", "", ToolCall(name="a\nb", arguments={})), [WEATHER])


def test_tools_join_chatglm3s_system_message_and_stand_before_glm4s(named: GetRenderer) -> None:
    asked = [say("system", "你是助手。"), say("user", "在吗")]
    written = json.dumps([WEATHER], indent=4, ensure_ascii=False)
    renderer = named("chatglm3 made")
    assert "".join(renderer.show_tokens(renderer.render_prompt(asked, [WEATHER]))) == (
        f"[gMASK]sop<|system|> \n 你是助手。\n{written}<|user|> \n 在吗<|assistant|>"
    )
    renderer = named("glm4 made")
    before, _, after = "".join(renderer.show_tokens(renderer.render_prompt(asked, [WEATHER]))).partition(written[2:-2])
    told = "".join(renderer.show_tokens(renderer.render_prompt(asked, [WEATHER])))
    assert json.dumps(WEATHER, indent=4, ensure_ascii=False) in told and not before.endswith("你是助手。") and not after
    assert told.endswith("参数。<|system|>\n你是助手。<|user|>\n在吗<|assistant|>")


# ---- answers that are held to a grammar, and their tokens ------------------------------------------------------------


@pytest.mark.parametrize("tools", [(), (WEATHER,)])
@pytest.mark.parametrize(
    ("grammar", "answer"),
    [
        ('start: "```json\\n[" A "]\\n```"\nA: "\\"水果\\"" | "\\"手机\\""', '```json\n["手机"]\n```'),
        ("start: A\nA: /[^\\n]{1,30}/", "😀 你好， b"),
        ('start: "水果" | "手机"', "手机"),
    ],
)
def test_a_grammar_holds_the_answer_and_what_opens_it(
    renderer: RolesRenderer, grammar: str, answer: str, tools: tuple[Any, ...]
) -> None:
    reply = renderer.render_reply([say("user", "?")], say("assistant", answer), tools)
    compiler = compiler_of(renderer, max(renderer.tokenizer.get_vocab().values()) + 1)
    constraint = compiler.compile(grammar, before=renderer.before_answer(tools))
    for token in reply[:-1]:
        forced = constraint.forced()
        assert forced[:1] in ([], [token])
        assert token in constraint.allowed(), constraint.why()
        assert constraint.advance(token)
    assert constraint.accepting
    assert reply[-1] in constraint.allowed()
    assert renderer.read_answer(reply, tools) == answer


def test_tokens_are_placed_in_the_answers_text(renderer: RolesRenderer) -> None:
    """The empty line shares the place of the answer's first token; a call's tokens all write the whole."""
    for tools in ((), (WEATHER,)):
        reply = renderer.render_reply([say("user", "?")], say("assistant", "你好 b"), tools)[:-1]
        spans = token_spans(renderer, reply, "你好 b", tools)
        assert spans == sorted(spans) and spans[0][0] == 0 and spans[-1][1] == len("你好 b")
        assert {place for start, end in spans for place in range(start, end)} == set(range(len("你好 b")))
    reply = renderer.render_reply([say("user", "?")], say("assistant", "", CALL), [WEATHER])[:-1]
    text = renderer.read_answer(reply, [WEATHER])
    assert set(token_spans(renderer, reply, text, [WEATHER])) == {(0, len(text))}


def test_replies_are_held_to_their_grammar_where_tools_are_on_offer_and_where_none_is(made: RolesRenderer) -> None:
    model = model_of("glm", len(made.tokenizer))
    grammar = 'start: "```json\\n[" A "]\\n```"\nA: "\\"水果\\"" | "\\"手机\\""'
    questions = [[say("user", "什么？")]] * 4
    tools = [(), (WEATHER,), (), (WEATHER,)]
    sampling = Sampling(max_new_tokens=60)
    replies = list(
        reply_all(model, made, questions, sampling=sampling, tools=tools, grammars=[grammar, grammar, None, None])
    )
    for reply in sorted(replies, key=lambda one: one.index):
        if reply.index < 2:
            assert reply.finish == "stop" and reply.text in ('```json\n["水果"]\n```', '```json\n["手机"]\n```')
        assert reply.tokens[0][0] == 0 and max(end for _, end, _ in reply.tokens) == len(reply.text)


# ---- the same format as a chat template ------------------------------------------------------------------------------


def test_glm4s_own_chat_template_gives_the_same_prompts_and_answers(named: GetRenderer) -> None:
    """Its history has a line break before a reply, its prompts end before it: the prompt takes it over."""
    roles = named("glm4 real")
    template = TemplateRenderer(roles.tokenizer)
    for talk in (TALK, TALK[:2], TOOL_TALK[:1]):
        assert template.render_prompt(talk) == roles.render_prompt(talk)
    assert template.read_answer(template.render_answer("好\n")) == "好\n"
    (example,) = template.render_conversation(TALK[:4], say("assistant", "还没"), turns="last")
    assert template.read_answer(example.token_ids[-example.num_answer :]) == "还没"


@pytest.mark.parametrize(
    ("history", "asking", "opening"),
    [
        ("<|assistant|>⏎ANSWER", "<|assistant|>", "⏎"),  # GLM-4
        ("<|assistant|>⏎ANSWER<eop>", "<|assistant|>⏎", ""),  # ChatML, Gemma
        ("<|assistant|> ANSWER <eop>", "<|assistant|>", ""),  # Llama 2: the blank is the answer's, as ever
        ("<|assistant|>⏎ANSWER<eop>", "<|assistant|>⏎<sop>⏎", ""),  # history drops the thought that is asked for
        ("<|assistant|><sop>⏎ANSWER<eop>", "<|assistant|>", ""),  # a thought is no opening
        ("<|assistant|><sop>⏎ANSWER<eop>", "<|assistant|><sop>", "⏎"),
    ],
)
def test_a_line_break_before_a_templates_replies_belongs_to_the_prompt(
    named: GetRenderer, history: str, asking: str, opening: str
) -> None:
    tokenizer = copy(named("glm4 made").tokenizer)
    turn = history.replace("ANSWER", "{{ m['content'] }}").replace("⏎", "{{ '\\n' }}")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}" + turn + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + asking.replace("⏎", "{{ '\\n' }}") + "{% endif %}"
    )
    template = TemplateRenderer(tokenizer)
    prompt = template.render_prompt([say("user", "好")])
    assert template.read_inside(prompt) == f"<|user|>好{asking}{opening}".replace("⏎", "\n")
    assert template.before_answer([WEATHER]) == opening.replace("⏎", "\n") and template.before_answer() == ""
    reply = template.render_reply([say("user", "好")], say("assistant", "\n好"), [WEATHER])
    assert template.read_answer(reply, [WEATHER]) == "\n好"
    assert template.read_answer(template.render_answer("\n好")) == "\n好"


def test_tools_are_told_in_text_where_a_template_reads_them_elsewhere(named: GetRenderer) -> None:
    template = TemplateRenderer(named("glm4 real").tokenizer)
    assert "get_weather" in template.read_inside(template.render_prompt(TOOL_TALK, [WEATHER]))
    reply = template.render_reply([say("user", "?")], say("assistant", "好", CALL), [WEATHER])
    assert template.read_answer(reply, [WEATHER]) == write_calls("好", [CALL])
