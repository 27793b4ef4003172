"""Where values stand: exact for all that a form writes, in any JSON style, and for all that it parses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.errors import FormError
from weitiao.tasks.forms import STYLES, AnswerForm, Field
from weitiao.tasks.value_spans import ValueSpan, value_spans

FENCES = (("", ""), ("```json\n", "\n```"), ("```JSON\n", "```"))
KINDS = "boolean|list|list of strings|null|number|object|string"

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)
blanks = st.text(alphabet=" \t\r\n", max_size=3)


@st.composite
def forms_and_answers(draw: st.DrawFn) -> tuple[AnswerForm, Any]:
    """A form of any JSON shape and style, and an answer of it."""
    shape = draw(st.sampled_from(["object list", "object", "label list", "string list"]))
    opening, closing = draw(st.sampled_from(FENCES))
    form = {"shape": shape, "style": draw(st.sampled_from(STYLES)), "fence_open": opening, "fence_close": closing}
    if shape in ("label list", "string list"):
        strings = draw(st.lists(st.text(), max_size=4))
        return AnswerForm(**form, labels=tuple(sorted({*strings, "x"}))), strings
    keys = draw(st.lists(st.text(), min_size=1, max_size=4, unique=True))
    items = st.tuples(*[values for _ in keys]).map(lambda row: dict(zip(keys, row)))
    answer = draw(items if shape == "object" else st.lists(items, max_size=3))
    return AnswerForm(**form, fields=tuple(Field(key=key, kind=KINDS) for key in keys)), answer


def leaves(value: Any, steps: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The values without values of their own, by a plain recursion over the parsed answer."""
    if isinstance(value, dict | list) and value:
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*steps, step))
    elif steps:
        yield steps, value


def assert_exact(spans: tuple[ValueSpan, ...], text: str, answer: Any) -> None:
    """Every value once, spelled where its span says, in order and apart."""
    assert {span.steps: json.dumps(span.value) for span in spans} == {
        steps: json.dumps(value) for steps, value in leaves(answer)
    }
    assert len({span.path for span in spans}) == len(spans)
    for span in spans:
        assert json.dumps(json.loads(text[span.start : span.end])) == json.dumps(span.value)
        assert text[span.start : span.end].strip() == text[span.start : span.end]
    assert all(one.end < other.start for one, other in pairwise(spans))


@settings(deadline=None)
@given(forms_and_answers())
def test_every_value_of_every_answer_a_form_writes_is_found_where_it_stands(pair: tuple[AnswerForm, Any]) -> None:
    form, answer = pair
    text = form.write(answer)
    assert_exact(value_spans(form, text), text, answer)


def spelled_freely(value: Any, draw: st.DrawFn) -> str:
    """`value` as JSON with any blanks between its parts and the keys of objects in any order."""

    def blank() -> str:
        return draw(blanks)

    if isinstance(value, dict):
        members = draw(st.permutations(list(value.items())))
        parts = [f"{json.dumps(key)}{blank()}:{blank()}{spelled_freely(inner, draw)}" for key, inner in members]
        return f"{{{blank()}{f'{blank()},{blank()}'.join(parts)}{blank()}}}"
    if isinstance(value, list):
        return f"[{blank()}{f'{blank()},{blank()}'.join(spelled_freely(item, draw) for item in value)}{blank()}]"
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


@settings(deadline=None)
@given(st.data())
def test_every_value_of_any_spelling_a_form_accepts_is_found_where_it_stands(data: st.DataObject) -> None:
    form, answer = data.draw(forms_and_answers())
    body = spelled_freely(answer, data.draw)
    outside = st.text(alphabet=" \t\r\n\u3000", max_size=3)
    opening, closing = form.fence_open.strip(), form.fence_close.strip()
    inner = [data.draw(outside) for _ in range(2)] if opening else ["", ""]
    text = f"{data.draw(outside)}{opening}{inner[0]}{body}{inner[1]}{closing}{data.draw(outside)}"
    assert_exact(value_spans(form, text), text, form.parse(text))


def test_paths_name_items_and_keys() -> None:
    form = AnswerForm(
        shape="object list",
        fence_open="```json\n",
        fence_close="\n```",
        fields=(
            Field(key="名", kind="string"),
            Field(key="a.b", kind="list of strings"),
            Field(key="n", kind="object"),
        ),
    )
    text = '```json\n[{"名": "\\u5f20", "a.b": ["x", "y"], "n": {"": 1}}, {"名": "", "a.b": [ ], "n": {}}]\n```'
    found = {span.path: text[span.start : span.end] for span in value_spans(form, text)}
    assert found == {
        "[0].名": '"\\u5f20"',
        '[0]["a.b"][0]': '"x"',
        '[0]["a.b"][1]': '"y"',
        '[0].n[""]': "1",
        "[1].名": '""',
        '[1]["a.b"]': "[ ]",
        "[1].n": "{}",
    }


def test_a_key_at_the_top_has_no_dot() -> None:
    form = AnswerForm(shape="object", fields=(Field(key="name", kind="string"), Field(key="[0]", kind="null")))
    assert [span.path for span in value_spans(form, '{"[0]": null, "name": "Ada"}')] == ['["[0]"]', "name"]


@pytest.mark.parametrize(
    ("text", "start", "end"), [("手机", 0, 2), (" 手机 ", 0, 4), ("\n手机\n", 1, 3), ("\u3000\t水果", 2, 4)]
)
def test_a_label_is_found_without_the_blanks_that_parsing_forgives(text: str, start: int, end: int) -> None:
    form = AnswerForm(shape="label", labels=(" 手机 ", "手机", "水果"))
    [span] = value_spans(form, text)
    assert (span.path, span.start, span.end) == ("", start, end)
    assert span.value == text[start:end] == form.parse(text)


@pytest.mark.parametrize("text", ["", " 你好，\n世界 "])
def test_free_text_is_one_value(text: str) -> None:
    assert value_spans(AnswerForm(shape="text"), text) == (ValueSpan(steps=(), value=text, start=0, end=len(text)),)


def test_a_list_without_items_has_no_values() -> None:
    form = AnswerForm(shape="label list", labels=("手机",), fence_open="```\n", fence_close="\n```")
    assert value_spans(form, "```\n[ ]\n```") == ()


def test_a_text_the_form_refuses_has_no_spans() -> None:
    form = AnswerForm(shape="label list", labels=("手机",))
    for wrong in ('["飞机"]', '["手机"', "手机"):
        with pytest.raises(FormError):
            value_spans(form, wrong)


def test_values_nested_as_deeply_as_parsing_allows_are_found() -> None:
    form = AnswerForm(shape="object", fields=(Field(key="k", kind=KINDS),))
    deep, found = 100, 0
    while True:  # parsing gives up at a depth that depends on the interpreter and on who calls
        text = f'{{"k": {"[" * deep}1{"]" * deep}}}'
        try:
            form.parse(text)
        except FormError:
            break
        if deep > 5000:
            break
        [span] = value_spans(form, text)
        assert text[span.start : span.end] == "1" and len(span.steps) == deep + 1
        found, deep = deep, deep + 100
    assert found >= 100
