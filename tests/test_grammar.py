"""Grammars of answer forms, held against the engine that will use them: what they accept, and what cannot be said."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from weitiao.data.records import Record, read_records
from weitiao.errors import FormError
from weitiao.tasks.base import Task, assign_task, infer_tasks
from weitiao.tasks.fields import Bounds
from weitiao.tasks.forms import STYLES, AnswerForm, Field, JsonStyle
from weitiao.tasks.grammar import LEXER_FUEL, MAX_ITEMS, form_grammar

SHARED = Path(os.environ.get("WEITIAO_SHARED") or Path(__file__).parents[2] / "shared") / "data"
EXAMPLES = Path(__file__).parents[1] / "examples"
FENCES = (("", ""), ("```json\n", "\n```"), ("```\n", "```"), ("```json\r\n", "\r\n```"))
SETS = {
    "spo_and_topics": (SHARED / "spo_and_topics/train.jsonl", SHARED / "spo_and_topics/dev.jsonl"),
    "doccano": (SHARED / "doccano/relations.jsonl",),
    "news": (SHARED / "news_messages/train.jsonl",),
    "questions": (SHARED / "forgetting_probe/questions.jsonl",),
    "starter": (EXAMPLES / "starter/train.jsonl", EXAMPLES / "starter/heldout.jsonl"),
    "classification": (EXAMPLES / "classification/rows.jsonl",),
}

END = 0
WORDS = ("你好", "喜剧", '"]', '"}', "```", "\\n", '", "', "  ", "\n\n", "<end>", "[{", "true", "123")


class _Bytes:
    """A vocabulary of the 256 bytes and a few words of several, the first token the end."""

    eos_token_id = END
    bos_token_id = None
    unk_token_id = END
    tokens = (b"<|end|>", *(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS))
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [byte + 1 for byte in data]


@cache
def byte_tokens() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def matcher_of(grammar: str) -> LLMatcher:
    limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, step_lexer_fuel=LEXER_FUEL)
    matcher = LLMatcher(byte_tokens(), LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(matcher: LLMatcher, text: str) -> bool:
    """Whether `text` is a whole answer. The matcher is as new afterwards."""
    tokens = [byte + 1 for byte in text.encode()]
    taken = matcher.try_consume_tokens(tokens)
    whole = taken == len(tokens) and matcher.is_accepting()
    matcher.reset()
    return whole


def walk(matcher: LLMatcher, seed: int, *, most: int = 3_000, rush: int = 60) -> tuple[str, bool]:
    """What a model without sense may answer: random allowed tokens; after `rush` tokens those that lead to an end."""
    source, written = random.Random(seed), b""
    closing = [token for token in range(1, len(_Bytes.tokens)) if _Bytes.tokens[token][:1] in b'"]}`']
    for step in range(most):
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(len(_Bytes.tokens)) if mask[token // 8] >> (token % 8) & 1]
        assert allowed, "there is always something to say"
        if END in allowed and (len(allowed) == 1 or step > rush):
            return written.decode(), True
        rest = [token for token in allowed if token != END]
        hurried = [token for token in rest if token in closing] if step > rush else []
        token = source.choice(hurried or rest)
        assert matcher.consume_token(token)
        written += _Bytes.tokens[token]
    return written.decode(errors="replace"), matcher.is_accepting()


def check_walks(form: AnswerForm, text: str = "", *, count: int = 3, seed: int = 0) -> list[Any]:
    """Random answers read back and written alike; returns those that were finished."""
    matcher = matcher_of(form_grammar(form, text) or "")
    answers = []
    for number in range(count):
        written, finished = walk(matcher, seed + number)
        matcher.reset()
        if finished:
            answers.append(form.parse(written))
            assert form.write(answers[-1]) == written
    return answers


def strings_of(field: str, answers: Sequence[Any]) -> list[str]:
    return [item[field] for answer in answers for item in (answer if isinstance(answer, list) else [answer])]


# ---- labelled sets --------------------------------------------------------------------------------------------


@cache
def rows_and_tasks(name: str) -> tuple[tuple[tuple[Record, Task], ...], tuple[Task, ...]]:
    for path in SETS[name]:
        if not path.exists():
            pytest.skip(f"{path} is not here; set WEITIAO_SHARED")
    rows = [row for path in SETS[name] for row in read_records(path)]
    tasks = infer_tasks(rows)
    owned = [(row, assign_task(row, tasks)) for row in rows]
    return tuple((row, task) for row, task in owned if isinstance(task, Task)), tasks


def copies(task: Task, row: Record) -> bool:
    """Whether every value that must be copied from the text stands there."""
    gold = task.gold(row)
    copied = [field for field in task.form.fields if field.copied]
    return all(
        value in row.text or value == field.absent
        for item in (gold if isinstance(gold, list) else [gold])
        for field in copied
        for value in (item[field.key] if isinstance(item[field.key], list) else [item[field.key]])
    )


@pytest.mark.parametrize("name", SETS)
def test_every_gold_answer_is_accepted_byte_for_byte(name: str) -> None:
    rows, _ = rows_and_tasks(name)
    formed = [(row, task) for row, task in rows if task.form.shape != "text"]
    assert formed
    shared = {task.name: matcher_of(form_grammar(task.form, ground=False) or "") for _, task in formed}
    refused = []
    for row, task in formed:
        target = task.write_target(row)
        assert accepts(shared[task.name], target), target
        if not accepts(matcher_of(form_grammar(task.form, row.text) or ""), target):
            refused.append((row, task))
    assert all(not copies(task, row) for row, task in refused), "only a label that is not in its text is refused"
    assert len(refused) <= 0.01 * len(formed)


@pytest.mark.parametrize("name", SETS)
def test_what_a_senseless_model_answers_has_the_form_and_is_grounded(name: str) -> None:
    rows, tasks = rows_and_tasks(name)
    for task in tasks:
        if task.form.shape == "text":
            assert form_grammar(task.form) is None
            continue
        mine = [row for row, owner in rows if owner == task][:3]
        answers = 0
        for number, row in enumerate(mine):
            for answer in check_walks(task.form, row.text, seed=number, count=2):
                answers += 1
                for field in (field for field in task.form.fields if field.copied):
                    for value in strings_of(field.key, [answer]):
                        parts = value if isinstance(value, list) else [value]
                        assert all(part and (part in row.text or part == field.absent) for part in parts)
        assert answers, "some walks come to an end"


@cache
def starter_tokens(folder: Path) -> LLTokenizer:
    return LLTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), eos_token=[1, 106])


def test_masks_are_quick_with_the_vocabulary_of_the_starter_model(starter_folder_or_skip: Path) -> None:
    """Measured here: a median of 27 microseconds; the bound leaves room for a machine that is busy."""
    import time

    tokens = starter_tokens(starter_folder_or_skip)
    rows, _ = rows_and_tasks("spo_and_topics")
    times = []
    for row, task in rows[-30:]:
        grammar = LLMatcher.grammar_from_lark(form_grammar(task.form, row.text) or "")
        matcher = LLMatcher(tokens, grammar, log_level=0)
        for token in tokens.tokenize_str(task.write_target(row)):
            started = time.process_time()
            matcher.compute_bitmask()
            times.append(time.process_time() - started)
            if not matcher.consume_token(token):
                assert not copies(task, row)
                break
    assert sorted(times)[len(times) // 2] < 500e-6


# ---- any labels -----------------------------------------------------------------------------------------------

characters = st.characters(exclude_categories=["Cs"])
texts = st.text(characters, max_size=12)
numbers = st.integers(-(10**6), 10**6) | st.decimals(-1000, 1000, places=3, allow_nan=False).map(float)
scalars = st.none() | st.booleans() | numbers | texts
nested = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)
quick = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def object_lists(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    keys = draw(st.lists(texts, min_size=1, max_size=3, unique=True))
    items = st.tuples(*[nested for _ in keys]).map(lambda row: dict(zip(keys, row)))
    return [*draw(st.lists(st.lists(items, max_size=3), max_size=3)), [draw(items)]]


def repeats_a_key(written: str) -> bool:
    body = written[written.index("[") : written.rindex("]") + 1]
    repeats: list[bool] = []
    json.loads(body, object_pairs_hook=lambda pairs: repeats.append(len(dict(pairs)) < len(pairs)))
    return any(repeats)


def spelled(answer: Any, style: JsonStyle, fence: tuple[str, str]) -> str:
    return f"{fence[0]}{style.dumps(answer)}{fence[1]}"


@quick
@given(object_lists(), st.sampled_from(STYLES), st.sampled_from(FENCES), st.integers(0, 99))
def test_grammars_of_any_json_accept_their_labels_and_nothing_unreadable(
    answers: Any, style: JsonStyle, fence: tuple[str, str], seed: int
) -> None:
    targets = [spelled(answer, style, fence) for answer in answers]
    form = AnswerForm.infer(targets, texts=[""] * len(targets))
    matcher = matcher_of(form_grammar(form) or "")
    assert [accepts(matcher, target) for target in targets] == [True] * len(targets)
    written, finished = walk(matcher, seed)
    if finished and not repeats_a_key(written):  # keys of inner objects are free where the labels show no small set
        assert form.write(form.parse(written)) == written


@quick
@given(st.lists(texts, min_size=1, max_size=6, unique=True), st.sampled_from(STYLES), st.data())
def test_labels_are_closed_and_never_repeat_where_no_label_list_repeats(
    labels: list[str], style: JsonStyle, data: st.DataObject
) -> None:
    subset = st.lists(st.sampled_from(labels), unique=True, max_size=4)
    lists = [*data.draw(st.lists(subset, max_size=4)), *([label] for label in labels for _ in range(3))]
    targets = [style.dumps(one) for one in lists]
    form = AnswerForm.infer(targets, texts=[""] * len(targets))
    assume(form.shape == "label list")
    matcher = matcher_of(form_grammar(form) or "")
    assert all(accepts(matcher, target) for target in targets)
    assert not accepts(matcher, style.dumps([labels[0] + "x"]))
    for answer in check_walks(form, seed=data.draw(st.integers(0, 99))):
        assert len(set(answer)) == len(answer)
        assert form.min_items <= len(answer) <= form.max_items
        assert set(answer) <= set(labels)


@quick
@given(st.lists(texts, min_size=2, max_size=6, unique=True))
def test_plain_labels_are_accepted_and_nothing_else(labels: list[str]) -> None:
    form = AnswerForm(shape="label", labels=tuple(labels))
    matcher = matcher_of(form_grammar(form) or "")
    assert all(accepts(matcher, label) for label in labels)
    other = labels[0] + "?"
    assert accepts(matcher, other) is (other in labels)


@quick
@given(st.integers() | st.floats(-1.796e308, 1.796e308))
def test_any_number_is_accepted_as_python_writes_it(number: float) -> None:
    form = AnswerForm.infer([json.dumps({"n": number})], texts=[""])
    assume(not (number == 0 and str(number).startswith("-")))
    assert accepts(matcher_of(form_grammar(form) or ""), json.dumps({"n": number}))


# ---- copied values --------------------------------------------------------------------------------------------

CLOSING = (
    '"',
    '"}',
    '"}]\n```',
    "\\",
    '\\"',
    "\n",
    "```",
    "<end_of_turn>",
    "<|im_end|>",
    "\x00",
    "\ud800",
    "😀",
    "\x7f",
)
hostile = st.lists(st.sampled_from(CLOSING) | st.text(max_size=4), max_size=8).map("".join)


def quoting(style: JsonStyle = STYLES[0], **changes: Any) -> AnswerForm:
    field = Field(key="q", kind="string", copied_share=1.0, **changes)
    return AnswerForm(shape="object", style=style, fields=(field,))


@settings(quick, max_examples=500)
@given(hostile, st.booleans(), st.booleans(), st.integers(0, 99))
def test_no_text_can_end_the_string_that_copies_it(text: str, ascii_only: bool, trimmed: bool, seed: int) -> None:
    style = JsonStyle(ensure_ascii=ascii_only)
    form = quoting(style, absent="没有", bounds=Bounds(trimmed=trimmed))
    for answer in check_walks(form, text, seed=seed, count=2):
        value = answer["q"]
        assert value == "没有" or (value and value in text)
        assert not trimmed or value == value.strip(" \n\t")


@settings(quick, max_examples=60)
@given(hostile, st.booleans(), st.data())
def test_every_piece_of_a_text_can_be_copied(text: str, ascii_only: bool, data: st.DataObject) -> None:
    clean = text.replace("\ud800", "")
    assume(clean)
    start = data.draw(st.integers(0, len(clean) - 1))
    piece = clean[start : data.draw(st.integers(start + 1, len(clean)))]
    form = quoting(JsonStyle(ensure_ascii=ascii_only))
    matcher = matcher_of(form_grammar(form, clean) or "")
    assert accepts(matcher, form.write({"q": piece}))
    other = piece + "≠"
    assert accepts(matcher, form.write({"q": other})) is (other in clean)


def test_a_copied_value_cuts_no_escape_and_no_pair_in_two() -> None:
    matcher = matcher_of(form_grammar(quoting(JsonStyle(ensure_ascii=True)), 'a\\n"\n😀') or "")
    assert [accepts(matcher, f'{{"q": "{inside}"}}') for inside in ("\\\\n", '\\"', "\\n", "\\ud83d\\ude00")] == [
        True
    ] * 4
    assert not any(accepts(matcher, f'{{"q": "{inside}"}}') for inside in ("n\\", "\\", "\\ud83d", "\\ude00", "u", ""))


def test_an_empty_text_leaves_the_word_for_absence() -> None:
    form = quoting(absent="无")
    matcher = matcher_of(form_grammar(form, "") or "")
    assert accepts(matcher, '{"q": "无"}')
    assert {answer["q"] for answer in check_walks(form, "")} == {"无"}


def test_where_nothing_can_be_copied_a_list_is_empty_or_the_refusal_says_why() -> None:
    item = Field(key="q", kind="string", copied_share=1.0)
    free = AnswerForm(shape="object list", fields=(item,), max_items=3)
    assert accepts(matcher_of(form_grammar(free, "") or ""), "[]")
    with pytest.raises(FormError, match=r"No answer of this form can be copied from the text '': q must be a piece"):
        form_grammar(AnswerForm(shape="object list", fields=(item,), min_items=1, max_items=3), "")
    assert form_grammar(AnswerForm(shape="object list", fields=(item,), min_items=1, max_items=3), "", ground=False)


def test_where_labels_leave_a_copied_value_empty_it_may_be_empty() -> None:
    rows = [({"q": f"甲{n}"}, f"是甲{n}的") for n in range(8)] + [({"q": ""}, "没有")]
    form = AnswerForm.infer([row for row, _ in rows], texts=[text for _, text in rows])
    assert form.fields[0].copied
    matcher = matcher_of(form_grammar(form, "乙丙") or "")
    assert [accepts(matcher, f'{{"q": "{value}"}}') for value in ("", "乙", "丁")] == [True, True, False]
    assert not AnswerForm.infer([{"q": ""}] * 3, texts=["a"] * 3).fields[0].copied


def test_a_slip_in_fifty_does_not_set_the_others_free() -> None:
    rows = [({"q": f"甲{n}"}, f"是甲{n}的" if n else "是別的") for n in range(60)]
    form = AnswerForm.infer([row for row, _ in rows], texts=[text for _, text in rows])
    assert not accepts(matcher_of(form_grammar(form, "乙丙") or ""), '{"q": "丁"}')


def test_a_word_for_absence_stands_alone_in_a_list_if_it_always_did() -> None:
    rows = [({"q": [f"甲{n}", "是"]}, f"是甲{n}的") for n in range(8)] + [({"q": ["无"]}, "乙")] * 2
    form = AnswerForm.infer([row for row, _ in rows], texts=[text for _, text in rows])
    matcher = matcher_of(form_grammar(form, "丙丁") or "")
    assert [accepts(matcher, f'{{"q": {items}}}') for items in ('["无"]', '["丙", "丁"]', '["丙"]')] == [True] * 3
    assert [accepts(matcher, f'{{"q": {items}}}') for items in ('["无", "无"]', '["丙", "无"]', "[]")] == [False] * 3
    assert {tuple(answer["q"]) for answer in check_walks(form, "")} == {("无",)}


def test_a_number_may_have_a_few_digits_more_than_the_labels() -> None:
    form = AnswerForm.infer([{"n": n} for n in (1, 25, 37)], texts=[""] * 3)
    matcher = matcher_of(form_grammar(form) or "")
    assert [accepts(matcher, f'{{"n": {n}}}') for n in ("7", "1024", "-3", "0")] == [True] * 4
    assert [accepts(matcher, f'{{"n": {n}}}') for n in ("10240", "1.5", "01", "-0", "1e5", "+1")] == [False] * 6


def test_one_row_does_not_make_a_word_for_absence() -> None:
    rows = [([{"q": f"甲{n}"}], f"是甲{n}的") for n in range(60)] + [([{"q": "java"}] * 4, "Java")]
    form = AnswerForm.infer([row for row, _ in rows], texts=[text for _, text in rows])
    assert form.fields[0].absent is None


def test_without_grounding_a_copied_field_is_free() -> None:
    matcher = matcher_of(form_grammar(quoting(), "甲", ground=False) or "")
    assert accepts(matcher, '{"q": "乙"}')
    assert not accepts(matcher_of(form_grammar(quoting(), "甲") or ""), '{"q": "乙"}')


# ---- known failures of constrained decoding -------------------------------------------------------------------


def test_there_is_no_room_for_white_space_outside_strings() -> None:
    form = AnswerForm.infer(['[{"a": 1}]', '[{"a": 2}, {"a": 3}]'], texts=["", ""])
    matcher = matcher_of(form_grammar(form) or "")
    assert accepts(matcher, '[{"a": 1}, {"a": 2}]')
    spaced = ('[ {"a": 1}]', '[{ "a": 1}]', '[{"a":  1}]', '[{"a": 1},  {"a": 2}]', '[{"a": 1}\n]', ' [{"a": 1}]')
    assert not any(accepts(matcher, text) for text in [*spaced, '[{"a": 1}]\n', '[{"a":1}]'])


@pytest.mark.parametrize("most", [0, 1, 5])
def test_lists_and_strings_come_to_an_end(most: int) -> None:
    """A model that never wants to stop is made to: the longest answer is a fixed number of characters away."""
    form = AnswerForm(
        shape="string list", max_items=most, item=Field(key="", kind="string", bounds=Bounds(max_length=2))
    )
    matcher = matcher_of(form_grammar(form) or "")
    written = b""
    while True:
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(1, 257) if mask[token // 8] >> (token % 8) & 1]
        if not allowed:
            break
        unwilling = (
            [token for token in allowed if token - 1 not in b'"]'] or [t for t in allowed if t - 1 != 93] or allowed
        )
        matcher.consume_token(unwilling[0])
        written += bytes([unwilling[0] - 1])
    answer = form.parse(written.decode())
    assert len(answer) == (most or MAX_ITEMS)
    assert {len(item) for item in answer} == {2 + 16}


def test_empty_strings_and_lists_are_allowed_only_where_a_label_is_empty() -> None:
    names = [{"n": [f"名{i}", f"名{i + 1}"], "s": f"句{i}"} for i in range(9)]
    full = AnswerForm.infer(names, texts=[""] * 9)
    some = AnswerForm.infer([*names, {"n": [], "s": ""}, {"n": [""], "s": " a"}], texts=[""] * 11)
    nearly_empty = ['{"n": [], "s": "句"}', '{"n": ["", "名"], "s": "句"}', '{"n": ["名", "名"], "s": ""}']
    nearly_empty += ['{"n": ["名", "名"], "s": " "}', '{"n": ["名", "名"], "s": "　"}']
    for text in nearly_empty:
        assert not accepts(matcher_of(form_grammar(full) or ""), text), text
        assert accepts(matcher_of(form_grammar(some) or ""), text), text


def test_unknown_bounds_are_finite_and_declared_fields_can_be_asked_for() -> None:
    anything = Field(key="k", kind="boolean|list|list of strings|null|number|object|string")
    form = AnswerForm(shape="object list", fields=(anything,))
    matcher = matcher_of(form_grammar(form) or "")
    for value in (True, None, 1.5, -3, "x", ["a", "b"], [1, "a", [None]], {"a": {"b": [1]}}, [], {}):
        assert accepts(matcher, form.write([{"k": value}])), value
    assert not accepts(matcher, form.write([{"k": [[[[1]]]]}]))
    assert not accepts(matcher, form.write([{"k": 1}] * (MAX_ITEMS + 1)))
    assert not accepts(matcher, form.write([{"k": "x" * 1001}]))


def test_keys_of_inner_objects_are_the_labelled_ones_and_stand_once() -> None:
    rows = [{"arg": {"city": f"城{i}", "day": i}} for i in range(6)] + [{"arg": {"city": "城"}}] * 3
    form = AnswerForm.infer(rows, texts=[""] * len(rows))
    matcher = matcher_of(form_grammar(form) or "")
    assert accepts(matcher, '{"arg": {"day": 1, "city": "城"}}')
    assert not accepts(matcher, '{"arg": {"day": 1, "day": 2}}')
    assert not accepts(matcher, '{"arg": {"hour": 1}}')
    check_walks(form, count=4)


def test_half_a_surrogate_pair_in_a_label_is_named() -> None:
    with pytest.raises(FormError, match="half of a surrogate pair"):
        form_grammar(AnswerForm(shape="label", labels=("\ud800", "b")))


def test_long_texts_and_large_sets_stay_within_the_engines_limits() -> None:
    text = "".join(random.Random(0).choices("天地玄黄宇宙洪荒日月盈昃", k=8_000))
    form = AnswerForm(
        shape="object list",
        max_items=60,
        fields=(
            Field(key="t", kind="string", values=tuple(f"类型{n}" for n in range(64))),
            Field(key="q", kind="string", copied_share=1.0),
        ),
    )
    matcher = matcher_of(form_grammar(form, text) or "")
    answer = [{"t": f"类型{n}", "q": text[n * 100 : n * 100 + 90]} for n in range(60)]
    assert accepts(matcher, form.write(answer))


def test_masks_of_long_texts_come_with_a_large_vocabulary_too(starter_folder_or_skip: Path) -> None:
    text = "".join(random.Random(0).choices("天地玄黄宇宙洪荒日月盈昃 the quick brown", k=20_000))
    form = AnswerForm(shape="object", fields=(Field(key="q", kind="string", copied_share=1.0),))
    grammar = LLMatcher.grammar_from_lark(form_grammar(form, text) or "")
    limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, step_lexer_fuel=LEXER_FUEL)
    tokens = starter_tokens(starter_folder_or_skip)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    for token in tokens.tokenize_str(form.write({"q": text[5_000:5_100].strip()})):
        matcher.compute_bitmask()
        assert matcher.consume_token(token), matcher.get_error()[:100]
    assert matcher.is_accepting()
