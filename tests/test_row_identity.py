"""What makes two rows the same: for the fingerprint of a set, and as a question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from weitiao.data.checks import SamePairs, SameRows, input_key
from weitiao.data.formats import row_to_record
from weitiao.data.record import Record
from weitiao.data.records import digest_records
from weitiao.messages import ToolCall

TOOL = {"name": "weather", "description": "天气", "parameters": {"type": "object", "properties": {}}}
CALLING: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "北京天气如何？"},
        {
            "role": "assistant",
            "content": "我查一下。",
            "function_call": {"name": "weather", "arguments": {"city": "北京"}},
        },
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "晴天。"},
        {"role": "user", "content": "上海呢？"},
        {"role": "assistant", "content": "再查。", "function_call": {"name": "weather", "arguments": {"city": "上海"}}},
    ],
    "tools": [TOOL],
}


def convert(row: dict[str, Any]) -> Record:
    record = row_to_record(row, "rows.jsonl:1", require_target=True)
    assert isinstance(record, Record), record
    return record


def test_the_fingerprint_of_plain_rows_never_changes() -> None:
    """Runs keep it: with another value every finished run would refuse its own rows."""
    asked = convert({"context": "Instruction: I\nInput: Q\n\nT\nAnswer: ", "target": "A"})
    talked = convert({
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": {"b": 2, "a": "甲"}},
        ],
        "task": "t",
    })  # fmt: skip
    assert digest_records([asked]) == "1c4dd124359251aa94c04901be738b43201126f834a24f6641c1bcfed0b4a414"
    assert digest_records([asked, talked]) == "38ad8906268fcbd14522af376f1425e7170ba43873bd07a560815c81e31c7d7e"


def test_the_fingerprint_sees_every_part_of_tools_and_calls() -> None:
    record = convert(CALLING)
    first, calling, result, reply, last = record.messages
    others = [
        replace(record, tools=()),
        replace(record, tools=(TOOL | {"description": "气温"},)),
        replace(record, calls=(ToolCall(name="weather", arguments={"city": "广州"}),)),
        replace(record, calls=()),
        replace(record, messages=(first, replace(calling, calls=()), result, reply, last)),
        replace(record, messages=(first, replace(calling, text="我看看。"), result, reply, last)),
        replace(record, messages=(first, replace(calling, learn=False), result, reply, last)),
        convert({**CALLING, "messages": [*CALLING["messages"][:-1], CALLING["messages"][-1] | {"content": "再看。"}]}),
    ]
    assert len({digest_records([each]) for each in (record, *others)}) == 1 + len(others)


def test_rows_that_offer_other_tools_or_made_other_calls_are_other_questions() -> None:
    record = convert(CALLING)
    first, calling, *after = record.messages
    others = [
        replace(record, tools=()),
        replace(record, tools=(TOOL | {"description": "气温"},)),
        replace(record, tools=(TOOL, TOOL | {"name": "time"})),
        replace(record, messages=(first, replace(calling, calls=()), *after)),
        replace(record, messages=(first, replace(calling, calls=calling.calls * 2), *after)),
    ]
    assert len({input_key(each) for each in (record, *others)}) == 1 + len(others)
    other_answer = replace(others[0], source="rows.jsonl:2", target="不能查。")
    assert pairs_of([record, other_answer], [other_answer]).contradictions == ()
    assert pairs_of([record], [other_answer]).leaks == ()
    assert pairs_of([record], [replace(record, source="dev.jsonl:1")]).leaks == ((1, 0),)


def pairs_of(train: list[Record], dev: list[Record]) -> SamePairs:
    same = SameRows()
    for side, rows in ((False, train), (True, dev)):
        for row in rows:
            same.add(row, dev=side)
    return same.pairs()


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_blanks_around_a_message_and_the_key_order_of_arguments_make_no_other_question(space: str) -> None:
    record = convert(CALLING)
    first, calling, *after = record.messages
    call = ToolCall(name="f", arguments={"a": 1, "b": 2})
    turned = ToolCall(name="f", arguments={"b": 2, "a": 1})
    one = replace(record, messages=(first, replace(calling, calls=(call,)), *after))
    two = replace(record, messages=(replace(first, text=space + first.text), replace(calling, calls=(turned,)), *after))
    assert input_key(one) == input_key(two)
