"""Patterns read from labelled strings: what they allow, and that they never exclude a label."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from weitiao.tasks.fields import Bounds
from weitiao.tasks.forms import AnswerForm, Field, JsonStyle
from weitiao.tasks.grammar import form_grammar
from weitiao.tasks.patterns import LEAST_VALUES, infer_pattern


def ten(write: Callable[[int], str]) -> list[str]:
    return [write(number) for number in range(1, 11)]


@pytest.mark.parametrize(
    ("values", "others", "never"),
    [
        (ten(lambda n: f"2024-05-{n:02}"), ["1999-12-31"], ["2024-5-1", "2024-13-01", "2024年5月1日", "tomorrow"]),
        (ten(lambda n: f"2024年5月{n}日"), ["1999年12月31日"], ["2024年13月1日", "2024-05-01", "2024年5月"]),
        (ten(lambda n: f"2024年{n % 3 + 9:02}月{n}日"), ["1999年12月3日"], ["2024年0月1日"]),
        (ten(lambda n: f"2024/5/{n}"), ["2021/12/31"], ["2021/12/32", "2021-12-31"]),
        (ten(lambda n: f"{n:02}:{n * 5:02}"), ["23:59"], ["24:00", "7:30"]),
        (ten(lambda n: f"2024-05-{n:02}T10:00:00Z"), ["2024-05-01T23:59:59+08:00"], ["2024-05-01"]),
        (ten(lambda n: f"{n * 7}元"), ["1元", "9999元"], ["1 元", "元", "12.5元", "1美元"]),
        (ten(lambda n: f"{n * 7 / 10}kg" if n % 2 else f"{n}cm"), ["180cm", "62.5kg"], ["62.5", "1m", ".5kg"]),
        (ten(lambda n: f"{n * 9}.5%"), ["3.25%", "100%"], ["3", "%", "a%"]),
        (ten(lambda n: f"{n - 5}"), ["-7", "12"], ["1.5", "", "-"]),
        (ten(lambda n: f"ABC{n:04}"), ["XYZ9999"], ["AB1234", "abc1234", "ABC12345"]),
        (ten(lambda n: f"138{n:08}"), ["01012345678"], ["1381234567", "138-12345678"]),
        (ten(lambda n: f"010-{n:08}"), ["021-87654321"], ["02187654321"]),
    ],
)
def test_strings_that_agree_have_a_pattern(values: list[str], others: list[str], never: list[str]) -> None:
    pattern = infer_pattern(values)
    assert pattern
    assert all(re.fullmatch(pattern, value) for value in [*values, *others])
    assert not any(re.fullmatch(pattern, value) for value in never)


@pytest.mark.parametrize(
    "values",
    [
        ten(lambda n: f"2024-05-{n:02}")[: LEAST_VALUES - 1],
        ten(lambda n: f"2024-05-{n:02}")[: LEAST_VALUES - 1] * 5,
        [*ten(lambda n: f"2024-05-{n:02}"), "unknown"],
        ten(lambda n: "word" + "abcdefghijk"[n]),
        ten(lambda n: f"{n}{'元角分人个只头条张把'[n - 1]}"),
        ten(lambda n: f"第{n}章"),
        ten(str.__call__)[:0],
    ],
)
def test_strings_that_do_not_agree_have_none(values: list[str]) -> None:
    assert infer_pattern(values) == ""


@given(
    st.lists(
        st.from_regex(r"[0-9]{1,3}(\.[0-9])?(kg|%|元)?|[A-Z]{2}[0-9]{3}|2024-0[1-9]-1[0-9]|\w{0,4}", fullmatch=True)
    )
)
def test_a_pattern_never_excludes_a_string_it_was_read_from(values: list[str]) -> None:
    pattern = infer_pattern(values)
    assert not pattern or all(re.fullmatch(pattern, value) for value in values)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=4), st.text(max_size=4), st.integers(1, 10**6))
def test_every_pattern_is_one_for_the_engine_too(before: str, after: str, start: int) -> None:
    values = [f"{before}{start + number}{after}" for number in range(9)]
    pattern = infer_pattern(values)
    assert not pattern or all(re.fullmatch(pattern, value) for value in values)
    form = AnswerForm(shape="object", fields=(Field(key="p", kind="string", pattern=pattern),))
    assert all(accepts(form, form.write({"p": value})) for value in values if value.strip())


class _Bytes:
    eos_token_id, bos_token_id, unk_token_id, special_token_ids = 0, None, 0, (0,)
    tokens = (b"<|end|>", *(bytes([byte]) for byte in range(256)))

    def __call__(self, text: bytes | str) -> list[int]:
        return [byte + 1 for byte in (text.encode() if isinstance(text, str) else text)]


def accepts(form: AnswerForm, text: str) -> bool:
    grammar = LLMatcher.grammar_from_lark(form_grammar(form) or "")
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(_Bytes())), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = [byte + 1 for byte in text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_pattern_is_read_from_labels_kept_described_and_held_to() -> None:
    rows = [{"born": f"1990年{n}月1日", "note": "甲" * n} for n in range(1, 13)]
    form = AnswerForm.infer([*rows, {"born": "", "note": "x"}], texts=[""] * 13)
    born, note = form.fields
    assert born.pattern
    assert note.pattern == ""
    assert AnswerForm.from_json(form.to_json()) == form
    assert form.describe() == f"a JSON object with the keys born (like {born.pattern}), note"
    assert accepts(form, '{"born": "2001年12月31日", "note": "乙"}')
    assert accepts(form, '{"born": "", "note": "乙"}')
    assert not accepts(form, '{"born": "去年", "note": "乙"}')


@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_pattern_beyond_ascii_is_left_out_where_labels_are_escaped(ascii_only: bool) -> None:
    style = JsonStyle(ensure_ascii=ascii_only)
    field = Field(key="p", kind="string", pattern="[0-9]{1,4}元", bounds=Bounds(max_length=5))
    form = AnswerForm(shape="object", style=style, fields=(field,))
    assert accepts(form, form.write({"p": "12元"}))
    assert accepts(form, form.write({"p": "many"})) is ascii_only
