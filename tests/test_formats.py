"""Every row format: what its rows become, how it is recognised, and what is wrong with rows that are not of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from weitiao.data.formats import FORMATS, check_format_name, recognise_format, row_to_record
from weitiao.data.options import ReadOptions
from weitiao.data.record import Record
from weitiao.data.records import digest_records, read_records
from weitiao.errors import DataError, Problem
from weitiao.messages import Message, ToolCall

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WEATHER = {"name": "weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}
CALL = ToolCall(name="weather", arguments={"city": "北京"})
WRITTEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
TEXT = "苏轼写下《赤壁赋》，苏轼是眉山人。"
SPANS = [
    {"id": 1, "label": "人物", "start_offset": 0, "end_offset": 2},
    {"id": 2, "label": "作品", "start_offset": 5, "end_offset": 8, "text": "赤壁赋"},
]
TRIPLE = {"predicate": "作者", "object_type": "人物", "subject_type": "作品", "object": "苏轼", "subject": "赤壁赋"}


def convert(row: dict[str, Any], *, require_target: bool = True, **options: Any) -> Record:
    record = row_to_record(row, "rows.jsonl:1", ReadOptions(**options), require_target=require_target)
    assert isinstance(record, Record), record
    return record


def problems(row: dict[str, Any], *, require_target: bool = True, **options: Any) -> list[Problem]:
    found = row_to_record(row, "rows.jsonl:1", ReadOptions(**options), require_target=require_target)
    assert isinstance(found, list), found
    return found


def turns(record: Record) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in record.messages]


def talk(*entries: dict[str, Any], key: str = "messages", **others: Any) -> dict[str, Any]:
    return {key: list(entries), **others}


def says(role: str, content: Any = None, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


# One labelled row of each format; the other files of tests use them too.
ROWS: dict[str, dict[str, Any]] = {
    "context_target": {"context": "Instruction: I\nInput: Q\n\nT\nAnswer: ", "target": "A"},
    "alpaca": {"instruction": "翻译成英文", "input": "你好", "output": "Hello", "history": [["在吗", "在"]]},
    "prompt_response": {"prompt": "你好", "response": "您好", "history": []},
    "content_summary": {"content": "类型#裙*颜色#红", "summary": "这条红裙很美。"},
    "text_category_output": {"text": "球队赢了", "category": ["体育", "财经"], "output": "体育"},
    "question_answer": {"question": "一加一？\nA. 一\nB. 二", "answer": "B", "source": "自写"},
    "messages": talk(says("system", "S"), says("user", "U"), says("assistant", "A")),
    "conversations": talk(says("user", "U"), says("assistant", "A", loss=True), key="conversations"),
    "sharegpt": talk({"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}, key="conversations", tools="[]"),
    "turn_pairs": {"conversation": [{"system": "S", "input": "U1", "output": "A1"}, {"input": "U2", "output": "A2"}]},
    "client_dialogue": talk(says("client", "U"), says("counselor", "A"), says("client", "谢谢"), key="dialogue"),
    "doccano_relations": {"text": TEXT, "entities": SPANS, "relations": [{"from_id": 2, "to_id": 1, "type": "作者"}]},
    "doccano_entities": {"text": TEXT, "entities": SPANS, "relations": []},
    "text_entities": {"text": TEXT, "entities": [{"entity_text": "苏轼", "entity_names": ["人物", "人名"]}]},
    "text_spans": {"text": TEXT, "label": [[0, 2, "人物"], [5, 8, "作品"]]},
    "text_label": {"text": "球队赢了", "label": "体育"},
    "uie": {"content": TEXT, "result_list": [{"text": "苏轼", "start": 0, "end": 2}], "prompt": "人物"},
    "spo_list": {"text": TEXT, "spo_list": [TRIPLE]},
    "label_studio": {
        "id": 1,
        "data": {"text": TEXT},
        "annotations": [{"result": [{"type": "labels", "value": {"start": 0, "end": 2, "labels": ["人物"]}}]}],
    },
}  # fmt: skip


def test_every_format_has_a_row_here() -> None:
    assert ROWS.keys() == {one.name for one in FORMATS}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_recognised_converts_and_is_the_same_when_its_format_is_named(name: str) -> None:
    assert recognise_format(ROWS[name]) == name
    record = convert(ROWS[name])
    assert record.raw is ROWS[name] and record.target
    assert convert(ROWS[name], format=name) == record
    assert record.text_span is None or record.prompt[slice(*record.text_span)] == record.text


@pytest.mark.parametrize("name", ROWS)
def test_a_task_field_is_read_in_every_format(name: str) -> None:
    assert convert(ROWS[name] | {"task": "mine"}).task == "mine"
    assert [problem.field for problem in problems(ROWS[name] | {"task": 7})] == ["task"]


@pytest.mark.parametrize("name", ROWS)
def test_a_system_message_of_the_recipe_joins_rows_without_one(name: str) -> None:
    own = [message for message in convert(ROWS[name]).messages if message.role == "system"]
    given = [message for message in convert(ROWS[name], system="系统").messages if message.role == "system"]
    assert given == (own or [Message(role="system", text="系统")])


@pytest.mark.parametrize("name", ["messages", "conversations", "sharegpt", "turn_pairs", "client_dialogue"])
def test_a_prompt_template_on_conversations_is_refused_not_ignored(name: str) -> None:
    (problem,) = problems(ROWS[name], prompt="{text}?")
    assert "would change nothing" in problem.message


def test_an_unknown_format_name_brings_up_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no row format `sharegtp`\. Did you mean sharegpt\?"):
        check_format_name("sharegtp")
    with pytest.raises(DataError, match="Known formats: context_target, alpaca"):
        check_format_name("xyz")


# --- One question, one answer ----------------------------------------------------------------------------------------


def test_alpaca_asks_with_its_instruction_about_its_input_after_its_history() -> None:
    record = convert(ROWS["alpaca"] | {"system": "S"})
    assert turns(record) == [("system", "S"), ("user", "在吗"), ("assistant", "在"), ("user", "翻译成英文\n你好")]
    assert (record.instruction, record.question, record.text, record.target) == ("S", "翻译成英文", "你好", "Hello")
    for nothing in ("", None, " "):
        assert turns(convert({"instruction": "讲个故事", "input": nothing, "output": "从前"})) == [("user", "讲个故事")]


def test_the_same_prompt_has_the_same_parts_in_every_format_that_leaves_it_alone() -> None:
    prompt = "这是什么？\n\n一个苹果"
    rows = [
        {"instruction": prompt, "input": "", "output": "A"},
        {"prompt": prompt, "response": "A"},
        {"content": prompt, "summary": "A"},
        {"question": prompt, "answer": "A"},
        talk(says("user", prompt), says("assistant", "A")),
        {"conversation": [{"input": prompt, "output": "A"}]},
    ]
    parts = {(r.messages, r.question, r.text, r.text_span, r.target) for r in map(convert, rows)}
    assert parts == {((Message(role="user", text=prompt),), "这是什么？", "一个苹果", (7, 11), "A")}


def test_text_and_category_are_asked_by_a_template_that_the_recipe_may_replace() -> None:
    record = convert(ROWS["text_category_output"])
    assert "体育、财经" in record.question and record.text == "球队赢了" and record.prompt.endswith("\n\n球队赢了")
    asked = convert(ROWS["text_category_output"], prompt="{text}\n\n以上是{category}中的哪一类？")
    assert asked.prompt == "球队赢了\n\n以上是体育、财经中的哪一类？"
    assert (asked.question, asked.text, asked.text_span) == ("以上是体育、财经中的哪一类？", "球队赢了", (0, 4))
    (problem,) = problems(ROWS["text_category_output"], prompt="{txet}?")
    assert (problem.field, problem.fix) == ("txet", "Use one of the row's fields: `text`, `category`, `output`.")
    assert "names no field" in problems(ROWS["text_category_output"], prompt="哪一类？")[0].message


def test_double_braces_and_json_in_a_template_are_text() -> None:
    record = convert(ROWS["content_summary"], prompt='{{name}}：{"a": 1} {content}')
    assert record.prompt == '{{name}}：{"a": 1} 类型#裙*颜色#红'


def test_a_template_writes_values_other_than_text_as_json() -> None:
    row = {"prompt": "P", "response": "R", "n": 3, "flag": True, "none": None, "deep": [{"a": "文"}]}
    assert convert(row, prompt="{prompt} {n} {flag} {none} {deep}").prompt == 'P 3 true  [{"a": "文"}]'


# --- Turns: which reply is learnt ------------------------------------------------------------------------------------


def test_a_conversation_that_ends_with_a_question_has_it_left_out_and_says_so() -> None:
    record = convert(ROWS["client_dialogue"])
    assert (turns(record), record.target) == ([("user", "U")], "A")
    assert record.left_out == "the last question, which has no reply"
    assert convert(ROWS["client_dialogue"], require_target=False).target is None
    assert turns(convert(ROWS["client_dialogue"], require_target=False))[-1] == ("user", "谢谢")


@pytest.mark.parametrize("off", [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0}])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_flag_keeps_a_reply_from_being_learnt(off: dict[str, Any], key: str) -> None:
    first = talk(
        says("user", "U1"), says("assistant", "A1", **off), says("user", "U2"), says("assistant", "A2"), key=key
    )
    record = convert(first)
    assert [message.learn for message in record.messages] == [True, False, True] and record.target == "A2"
    last = talk(
        says("user", "U1"), says("assistant", "A1"), says("user", "U2"), says("assistant", "A2", **off), key=key
    )
    record = convert(last)
    assert (record.target, record.left_out) == ("A1", "the last 2 turns, which hold no reply that may be learnt")
    assert (
        "no reply that may be learnt"
        in problems(talk(says("user", "U"), says("assistant", "A", **off), key=key))[0].message
    )


def test_flags_on_other_turns_are_refused_when_true_and_fine_when_false() -> None:
    def row(flag: bool) -> dict[str, Any]:
        return talk(says("system", "S", loss=flag), says("user", "U", loss=flag), says("assistant", "A"))

    assert convert(row(False)).target == "A"
    assert [problem.field for problem in problems(row(True))] == ["messages[0].loss", "messages[1].loss"]


def test_an_answer_may_be_a_value_only_where_it_is_the_target() -> None:
    value = [{"名": "苏轼"}]
    assert convert(talk(says("user", "U"), says("assistant", value))).target == value
    earlier = talk(says("user", "U"), says("assistant", value), says("user", "U"), says("assistant", "A"))
    assert [(p.field, p.message) for p in problems(earlier)] == [("messages[1].content", "is a list, not text.")]


def test_text_parts_are_one_text_and_pictures_are_refused() -> None:
    parts = [{"type": "text", "text": "看"}, {"type": "text", "text": "这里"}]
    assert convert(talk(says("user", parts), says("assistant", "A"))).prompt == "看这里"
    picture = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert problems(talk(says("user", picture), says("assistant", "A")))[0].field == "messages[0].content"


def test_a_later_pair_may_repeat_the_system_message_but_not_change_it() -> None:
    pairs = ROWS["turn_pairs"]["conversation"]
    again = {"conversation": [pairs[0], pairs[1] | {"system": "S"}]}
    assert turns(convert(again)) == [("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2")]
    assert problems({"conversation": [pairs[0], pairs[1] | {"system": "S2"}]})[0].field == "conversation[1].system"


# --- Tools -----------------------------------------------------------------------------------------------------------

QUESTION = says("user", "北京天气？")
CODE = "```python\ntool_call(city='北京')\n```"
OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
ANSWER = says("assistant", "22 度")
TOOL_TALKS: dict[str, dict[str, Any]] = {
    "openai": talk(
        QUESTION, says("assistant", None, tool_calls=[OPENAI_CALL]), says("tool", "22", tool_call_id="c1"), ANSWER,
        tools=[{"type": "function", "function": WEATHER}],
    ),
    "openai, deprecated": talk(
        QUESTION, says("assistant", "", function_call=OPENAI_CALL["function"]), says("function", "22", name="weather"),
        ANSWER, tools=json.dumps([WEATHER]),
    ),
    "glm4": talk(
        says("system", "", tools=[{"type": "function", "function": WEATHER}]), QUESTION,
        says("assistant", '{"name": "weather", "arguments": {"city": "北京"}}'), says("observation", "22"), ANSWER,
    ),
    "chatglm3 code": talk(
        says("system", None, tools=[WEATHER]), QUESTION,
        says("assistant", CODE, metadata="weather"), says("observation", "22"), ANSWER,
        key="conversations",
    ),
    "chatglm3 tool turn": talk(
        QUESTION, {"role": "tool", "name": "weather", "parameters": {"city": "北京"}, "observation": 22}, ANSWER,
        key="conversations", tools=[WEATHER],
    ),
    "sharegpt": talk(
        {"from": "human", "value": "北京天气？"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'},
        {"from": "observation", "value": "22"}, {"from": "gpt", "value": "22 度"},
        key="conversations", tools=json.dumps([WEATHER]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOL_TALKS)
def test_every_spelling_of_a_tool_call_is_the_same_record(name: str) -> None:
    record = convert(TOOL_TALKS[name])
    assert record.messages == (
        Message(role="user", text="北京天气？"),
        Message(role="assistant", text="", calls=(CALL,)),
        Message(role="tool", text="22"),
    )
    assert (record.target, record.calls, record.tools) == ("22 度", (), (WEATHER,))
    assert (record.text, record.text_span) == ("22", None)  # what a tool gave back is never shortened


def test_a_reply_that_calls_is_a_target_with_what_it_says_first() -> None:
    row = talk(QUESTION, says("assistant", "查一下", tool_calls=[OPENAI_CALL]))
    record = convert(row)
    assert (record.target, record.says, record.calls) == (f"查一下\n{WRITTEN_CALL}", "查一下", (CALL,))
    thought = talk(
        QUESTION, says("assistant", "查一下"), says("assistant", CODE, metadata="weather"), key="conversations"
    )  # fmt: skip
    gpt = [{"from": "human", "value": "北京天气？"}, {"from": "gpt", "value": "查一下"}]
    spoken = talk(
        *gpt,
        {"from": "function_call", "value": [{"name": "weather", "arguments": {"city": "北京"}}]},
        key="conversations",
    )
    for other in (convert(thought), convert(spoken)):
        assert (other.messages, other.target, other.calls) == (record.messages, record.target, record.calls)


def test_a_result_may_follow_a_reply_that_asked_in_its_own_words() -> None:
    row = talk(QUESTION, says("assistant", "查天气：北京"), says("observation", "22"), ANSWER)
    assert [message.role for message in convert(row).messages] == ["user", "assistant", "tool"]


def test_interpreter_code_is_the_argument_of_its_call() -> None:
    row = talk(QUESTION, says("assistant", "```python\nprint(1)\n```", metadata="interpreter"), key="conversations")
    assert convert(row).calls == (ToolCall(name="interpreter", arguments={"code": "print(1)"}),)


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(city=__import__('os').getcwd())",
        "tool_call('北京')",
        "tool_call(**{'city': 1})",
        "other(city='北京')",
        "tool_call(city='北京'",
        "tool_call(city={1, 2})",
        "tool_call(city=b'x')",
        "tool_call(city='\\ud800')",
        "tool_call(city=1e999)",
        "tool_call(city=" + "(" * 300 + ")" * 300 + ")",
        "",
        "\0",
    ],
)
def test_python_in_a_call_is_read_as_literals_and_never_run(code: str) -> None:
    row = talk(QUESTION, says("assistant", f"```python\n{code}\n```", metadata="weather"), key="conversations")
    (problem,) = problems(row)
    assert problem.field == "conversations[1].content" and "cannot be read" in problem.message


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"tool_calls": [{"function": {"name": "w", "arguments": "{oops"}}]}, "tool_calls[0].function.arguments"),
        ({"tool_calls": [{"function": {"name": "w", "arguments": "[1]"}}]}, "tool_calls[0].function.arguments"),
        ({"tool_calls": [{"function": {"name": "w", "arguments": '{"a": NaN}'}}]}, "tool_calls[0].function.arguments"),
        ({"tool_calls": [{"name": "w", "arguments": '{"a": 1, "a": 2}'}]}, "tool_calls[0].arguments"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls[0].function.name"),
        ({"tool_calls": ["w"]}, "tool_calls[0]"),
        ({"tool_calls": "w"}, "tool_calls"),
        ({"function_call": []}, "function_call"),
        ({"reasoning_content": "想"}, "reasoning_content"),
        ({"loss": "yes"}, "loss"),
        ({"loss": True, "weight": 0}, "weight"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_read_is_told_by_place(entry: dict[str, Any], field: str) -> None:
    found = problems(talk(QUESTION, says("assistant", "A", **entry)))
    assert [problem.field for problem in found] == [f"messages[1].{field}"]


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("[{oops", "not JSON"),
        ([{"type": "web_search"}], "type `web_search`"),
        (["weather"], "is text, not a tool"),
        ([{"description": "没有名字"}], "has no name"),
        (7, "is a number"),
    ],
)
def test_tools_that_cannot_be_read_are_told(tools: Any, words: str) -> None:
    (problem,) = problems(talk(QUESTION, ANSWER, tools=tools))
    assert problem.field.startswith("tools") and words in problem.message


def test_tools_in_two_places_must_be_the_same() -> None:
    system = says("system", "S", tools=[WEATHER])
    assert convert(talk(system, QUESTION, ANSWER, tools=[WEATHER])).tools == (WEATHER,)
    other = [WEATHER | {"name": "news"}]
    assert "other tools" in problems(talk(system, QUESTION, ANSWER, tools=other))[0].message


def test_a_result_must_name_a_call_that_was_made() -> None:
    row = talk(
        QUESTION, says("assistant", None, tool_calls=[OPENAI_CALL]), says("tool", "22", tool_call_id="c9"), ANSWER
    )
    assert problems(row)[0].field == "messages[2].tool_call_id"


def test_the_digest_sees_calls_tools_and_flags() -> None:
    plain = talk(QUESTION, ANSWER, says("user", "谢谢"), says("assistant", "不客气"))
    flagged = talk(QUESTION, ANSWER | {"loss": False}, says("user", "谢谢"), says("assistant", "不客气"))
    tooled = plain | {"tools": [WEATHER]}
    called = talk(QUESTION, says("assistant", WRITTEN_CALL))
    calling = talk(QUESTION, says("assistant", None, tool_calls=[OPENAI_CALL]))
    assert convert(called).target == convert(calling).target
    assert len({digest_records([convert(row)]) for row in (plain, flagged, tooled, called, calling)}) == 5


# --- Annotations -----------------------------------------------------------------------------------------------------


def test_relations_become_triples_in_the_key_order_of_the_seeds_rows() -> None:
    record = convert(ROWS["doccano_relations"])
    assert record.target == [TRIPLE] and list(record.target[0]) == list(TRIPLE)
    assert record.text == TEXT and "subject_type" in record.question
    assert convert(ROWS["spo_list"]).target == [TRIPLE]


def test_entities_are_written_in_the_order_of_the_text() -> None:
    entities = [{"text": "苏轼", "label": "人物"}, {"text": "赤壁赋", "label": "作品"}]
    backwards = ROWS["doccano_entities"] | {"entities": SPANS[::-1]}
    assert convert(ROWS["doccano_entities"]).target == convert(backwards).target == entities
    assert convert(ROWS["text_spans"]).target == entities
    assert convert({"text": TEXT, "entities": []}).target == []


def test_an_entity_row_takes_the_first_synonym_and_every_label() -> None:
    names = {
        "text": TEXT,
        "entities": [{"entity_text": "苏轼", "entity_names": ["人物", "人名"], "start_idx": 0, "end_idx": 2}],
    }
    assert convert(names).target == [{"text": "苏轼", "label": "人物"}]
    labels = {"text": TEXT, "entities": [{"text": "苏轼", "labels": ["人物", "诗人"]}]}
    assert convert(labels).target == [{"text": "苏轼", "label": "人物"}, {"text": "苏轼", "label": "诗人"}]


def test_duie_slots_become_triples_of_their_own() -> None:
    subject = {"subject": "苏轼", "subject_type": "人物"}
    slots = {"object": {"@value": "奖", "period": "第一届"}, "object_type": {"@value": "奖项", "period": "时间"}}
    spo = {"predicate": "获奖", **subject, **slots}
    target = convert({"text": TEXT, "spo_list": [spo]}).target
    assert [(t["predicate"], t["object"], t["object_type"]) for t in target] == [
        ("获奖", "奖", "奖项"),
        ("获奖_period", "第一届", "时间"),
    ]


def test_uie_asks_for_what_its_prompt_names() -> None:
    record = convert(ROWS["uie"])
    assert record.target == ["苏轼"] and "“人物”" in record.question and record.text == TEXT
    assert convert(ROWS["uie"] | {"result_list": []}).target == []


def studio(*results: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"data": {"text": TEXT}, "annotations": [{"result": list(results)}], **others}


def marked(name: str, start: int, end: int, label: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "labels",
        "value": {"start": start, "end": end, "text": TEXT[start:end], "labels": [label]},
    }


def test_label_studio_choices_spans_relations_and_texts() -> None:
    spans = (marked("a", 0, 2, "人物"), marked("b", 5, 8, "作品"))
    relation = {"type": "relation", "from_id": "b", "to_id": "a", "labels": ["作者"], "direction": "right"}
    assert convert(studio(*spans)).target == [{"text": "苏轼", "label": "人物"}, {"text": "赤壁赋", "label": "作品"}]
    assert convert(studio(*spans, relation)).target == [TRIPLE]
    turned = relation | {"from_id": "a", "to_id": "b", "direction": "left"}
    assert convert(studio(*spans, turned)).target == [TRIPLE]
    chosen = {"type": "choices", "from_name": "kind", "value": {"choices": ["文学"]}}
    assert convert(studio(chosen)).target == ["文学"]
    assert convert(studio(chosen, chosen | {"from_name": "era"})).target == {"kind": ["文学"], "era": ["文学"]}
    assert convert(studio({"type": "textarea", "value": {"text": ["摘要"]}})).target == "摘要"
    assert convert(studio()).target == []


def test_label_studio_tasks_that_are_skipped_or_disputed_are_reported() -> None:
    skipped = {"data": {"text": TEXT}, "annotations": [{"was_cancelled": True, "result": []}]}
    assert "no finished annotation" in problems(skipped)[0].message
    assert convert(skipped, require_target=False).target is None
    one, two = studio(marked("a", 0, 2, "人物"))["annotations"], studio(marked("a", 0, 2, "地名"))["annotations"]
    assert convert({"data": {"text": TEXT}, "annotations": [*one, *one]}).target
    assert "disagree" in problems({"data": {"text": TEXT}, "annotations": [*one, *two]})[0].message
    named = {"data": {"评论": TEXT, "url": ""}, "annotations": one}
    assert convert(named).text == TEXT
    assert "has no `text`" in problems(named | {"data": {"a": "x", "b": "y"}})[0].message


def shifted(row: dict[str, Any], key: str) -> dict[str, Any]:
    """The row with its first span one place too far to the right."""
    copy: dict[str, Any] = json.loads(json.dumps(row))
    span = copy[key][0]
    if key == "label":
        copy[key][0] = {"start": 1, "end": 3, "text": "苏轼", "label": "人物"}
    for name in ("start", "end", "start_offset", "end_offset"):
        if isinstance(span, dict) and name in span:
            span[name] += 1
    span_text = {"text": "苏轼"} if key == "entities" else {}
    if isinstance(span, dict):
        span.update(span_text)
    return copy


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("doccano_relations", "entities"),
        ("doccano_entities", "entities"),
        ("uie", "result_list"),
        ("text_spans", "label"),
    ],
)
def test_an_offset_that_does_not_match_the_text_is_refused_with_the_place_where_it_stands(name: str, key: str) -> None:
    found = problems(shifted(ROWS[name], key))
    assert found[0].field == f"{key}[0]"
    assert "from 1 to 3 is `轼写`, but the row says `苏轼`" in found[0].message and "It stands at 0" in found[0].fix


@pytest.mark.parametrize(
    ("start", "end"), [(-1, 2), (2, 2), (3, 1), (0, 99), ("0", 2), (None, None), (True, 2), (0.0, 2)]
)
def test_offsets_outside_the_text_are_refused(start: Any, end: Any) -> None:
    row = {"text": TEXT, "entities": [{"id": 1, "label": "人物", "start_offset": start, "end_offset": end}]}
    assert problems(row)[0].field == "entities[0]"


def test_a_relation_must_point_at_entities_of_its_row() -> None:
    row = ROWS["doccano_relations"]
    assert (
        problems(row | {"relations": [{"from_id": 9, "to_id": 1, "type": "作者"}]})[0].field == "relations[0].from_id"
    )
    twice = row | {"entities": [SPANS[0], SPANS[1] | {"id": 1}]}
    assert any(problem.field == "entities[1].id" for problem in problems(twice))


def test_a_format_that_is_named_decides_between_triples_and_entities() -> None:
    empty = ROWS["doccano_entities"]
    assert convert(empty, format="doccano_relations").target == []
    assert [p.field for p in problems(ROWS["doccano_relations"], format="doccano_entities")] == ["relations"]
    assert recognise_format({"text": "T", "label": []}) is None
    assert convert({"text": "T", "label": []}, format="text_spans").target == []


def test_a_misspelt_key_that_leaves_several_formats_is_named() -> None:
    [problem] = problems({"text": "球队赢了", "lable": "体育"})
    assert "fits several formats" in problem.message and problem.fix == "Did you mean `label` instead of `lable`?"


# --- Rows without their answers --------------------------------------------------------------------------------------

ANSWER_KEYS = {
    "context_target": "target", "alpaca": "output", "prompt_response": "response", "content_summary": "summary",
    "text_category_output": "output", "question_answer": "answer", "uie": "result_list",
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWER_KEYS)
def test_a_row_without_its_answer_is_still_recognised(name: str) -> None:
    row = {key: value for key, value in ROWS[name].items() if key != ANSWER_KEYS[name]}
    record = convert(row, require_target=False)
    assert record.target is None and record.messages == convert(ROWS[name]).messages
    assert [problem.field for problem in problems(row)] == [ANSWER_KEYS[name]]


@pytest.mark.parametrize(
    ("name", "key"),
    [("doccano_relations", "relations"), ("doccano_entities", "entities"), ("text_entities", "entities"),
     ("text_spans", "label"), ("text_label", "label"), ("spo_list", "spo_list"), ("label_studio", "annotations")],
)  # fmt: skip
def test_a_text_alone_is_asked_about_once_its_format_is_named(name: str, key: str) -> None:
    row = {field: value for field, value in ROWS[name].items() if field != key and field != "entities"}
    record = convert(row, require_target=False, format=name)
    assert record.target is None and record.text in (TEXT, "球队赢了")
    assert problems(row, format=name)


# --- The shared sets -------------------------------------------------------------------------------------------------

SHARED_SETS = [
    ("spo_and_topics/train.jsonl", "context_target", 802),
    ("spo_and_topics/dev.jsonl", "context_target", 100),
    ("conversations/train.json", "conversations", 71),
    ("adgen/train.jsonl", "content_summary", 200),
    ("alpaca/identity.json", "alpaca", 91),
    ("alpaca/alpaca_zh.json", "alpaca", 300),
    ("tool_calls/toolcalls_zh.json", "sharegpt", 240),
    ("news_messages/train.jsonl", "messages", 320),
    ("counselling/emollm.json", "turn_pairs", 200),
    ("counselling/smile.jsonl", "client_dialogue", 150),
    ("doccano/relations.jsonl", "doccano_relations", 70),
    ("forgetting_probe/questions.jsonl", "question_answer", 200),
    ("prompt_response/sample.jsonl", "prompt_response", 100),
]


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared data set {path} is not on this machine")
    return path


@pytest.mark.parametrize(("name", "format", "num_rows"), SHARED_SETS)
def test_every_shared_set_loads_without_being_told_its_format_and_loses_no_row(
    name: str, format: str, num_rows: int
) -> None:
    found = read_records(shared(name), options=ReadOptions(placeholders={"name": "小微", "author": "我们"}))
    assert len(found) == num_rows == len({record.source for record in found})
    assert {recognise_format(record.raw) for record in found} == {format}
    assert all(record.target and record.prompt for record in found)


def test_every_file_of_the_shared_data_is_in_the_list_above() -> None:
    files = {str(path.relative_to(SHARED)) for path in shared("README.md").parent.glob("*/*")}
    assert files == {name for name, _, _ in SHARED_SETS}


def test_the_shared_dialogues_and_tools_are_what_their_readme_says() -> None:
    smile = read_records(shared("counselling/smile.jsonl"))
    assert Counter(record.left_out for record in smile) == {"": 124, "the last question, which has no reply": 26}
    tools = read_records(shared("tool_calls/toolcalls_zh.json"))
    assert sum(len(message.calls) for record in tools for message in record.messages) == 180
    assert sum(message.role == "tool" for record in tools for message in record.messages) == 181
    doccano = read_records(shared("doccano/relations.jsonl"))
    assert sum(len(record.target or ()) for record in doccano) == 122


def test_the_shared_identities_are_refused_until_their_placeholders_are_filled() -> None:
    with pytest.raises(DataError) as caught:
        read_records(shared("alpaca/identity.json"))
    assert "holds the placeholder {{author}}, which nothing fills" in str(caught.value)
    assert len({problem.source for problem in caught.value.problems}) == 85
    filled = read_records(
        shared("alpaca/identity.json"), options=ReadOptions(placeholders={"Name": "小微", "AUTHOR": "我们"})
    )
    assert sum("小微" in str(record.target) for record in filled) == 77
    assert all("{{" not in str(record.target) for record in filled)
    assert any("{{name}}" in record.raw["output"] for record in filled)


# --- What must not be taken in silence -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("text_category_output", {"category": [None]}, "category"),
        ("text_category_output", {"category": 3}, "category"),
        ("text_label", {"label": [None]}, "label"),
        ("text_label", {"label": {"a": 1}}, "label"),
        ("text_entities", {"entities": [{"text": "苏轼", "labels": [None]}]}, "entities[0].labels"),
        ("spo_list", {"spo_list": [TRIPLE | {"object": {"@value": None}}]}, "spo_list[0].object"),
        ("doccano_entities", {"relations": 0}, "relations"),
        ("doccano_relations", {"relations": None}, "relations"),
        ("label_studio", {"annotations": [{}]}, "annotations[0].result"),
        ("sharegpt", {"system": 0}, "system"),
        ("sharegpt", {"tools": [WEATHER | {"parameters": "x"}]}, "tools[0].parameters"),
        ("sharegpt", {"tools": [WEATHER | {"description": 7}]}, "tools[0].description"),
        ("turn_pairs", {"conversation": [{"system": False, "input": "U", "output": "A"}]}, "conversation[0].system"),
        ("conversations", {"conversations": [says("user", "U"), says("assistant", "A", metadata=7)]},
         "conversations[1].metadata"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"},
                                        {"from": "observation"}, {"from": "gpt", "value": "A"}]},
         "conversations[2].value"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_reported_where_it_could_have_been_passed_over(
    name: str, change: dict[str, Any], field: str
) -> None:
    assert field in [problem.field for problem in problems(ROWS[name] | change, format=name)]
