"""Answer forms read from labels, and the tasks that rows are sorted into."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.data.records import Record, read_records
from weitiao.errors import FormError, Problem
from weitiao.messages import Message
from weitiao.tasks.base import Task, assign_task, infer_tasks, nearest_wording
from weitiao.tasks.forms import (
    MAX_LABEL_LENGTH,
    MAX_LABELS,
    STYLES,
    AnswerForm,
    Field,
    JsonStyle,
    is_closed_set,
    split_fence,
)

SHARED = Path(os.environ.get("WEITIAO_SHARED") or Path(__file__).parents[2] / "shared")
ROWS = SHARED / "data" / "spo_and_topics" / "train.jsonl"
needs_rows = pytest.mark.skipif(not ROWS.exists(), reason=f"{ROWS} is not here; set WEITIAO_SHARED")

FENCES = (("", ""), ("```json\n", "\n```"), ("```\n", "\n```"), ("```JSON\n", "```"))

TRIPLES = AnswerForm(
    shape="object list",
    fence_open="```json\n",
    fence_close="\n```",
    fields=(Field(key="predicate", kind="string"), Field(key="object", kind="string")),
)
TOPICS = AnswerForm(shape="label list", labels=("手机", "水果"), min_items=1, max_items=1)
PERSON = AnswerForm(
    shape="object",
    fields=(Field(key="name", kind="string"), Field(key="age", kind="null|number")),
)


def record(
    target: Any,
    *,
    text: str = "一段文字",
    question: str = "",
    instruction: str = "",
    task: str | None = None,
    line: int = 1,
) -> Record:
    return Record(
        messages=(Message(role="user", text=f"{instruction}\n{question}\n\n{text}"),),
        target=target,
        source=f"rows.jsonl:{line}",
        task=task,
        instruction=instruction,
        question=question,
        text=text,
        text_span=None,
        raw={},
    )


def triples(count: int, *, question: str = "抽取三元组。") -> list[Record]:
    return [
        record(
            f'[{{"subject": "甲{n}", "predicate": "父亲", "object": "乙{n}"}}]',
            text=f"甲{n}是乙{n}的父亲",
            question=question,
        )
        for n in range(count)
    ]


def topics(labels: Sequence[str], *, question: str = "关于什么的评论？", each: int = 5) -> list[Record]:
    return [record(json.dumps([label], ensure_ascii=False), question=question) for label in labels for _ in range(each)]


# ---- properties of forms --------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5
)


@st.composite
def objects(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """Answers of one task: lists of objects that share keys and key order."""
    keys = draw(st.lists(st.text(), min_size=1, max_size=4, unique=True))
    items = st.tuples(*[values for _ in keys]).map(lambda row: dict(zip(keys, row)))
    return [*draw(st.lists(st.lists(items, max_size=3))), [draw(items)]]


labels_strategy = st.lists(
    st.text(max_size=MAX_LABEL_LENGTH).filter(lambda label: "\n" not in label),
    min_size=1,
    max_size=MAX_LABELS,
    unique=True,
)
spellings = st.tuples(st.sampled_from(STYLES), st.sampled_from(FENCES))


def spelled(answer: Any, spelling: tuple[JsonStyle, tuple[str, str]]) -> str:
    style, (opening, closing) = spelling
    return f"{opening}{style.dumps(answer)}{closing}"


@settings(deadline=None)
@given(objects(), spellings)
def test_object_lists_of_any_json_style_and_fence_are_written_byte_for_byte(answers: Any, spelling: Any) -> None:
    targets = [spelled(answer, spelling) for answer in answers]
    form = AnswerForm.infer(targets, texts=[""] * len(targets))
    assert form.shape == "object list"
    for answer, target in zip(answers, targets):
        assert form.parse(target) == answer
        assert form.write(answer) == target


@settings(deadline=None)
@given(objects(), spellings)
def test_single_objects_are_written_byte_for_byte(answers: Any, spelling: Any) -> None:
    singles = [item for answer in answers for item in answer]
    targets = [spelled(item, spelling) for item in singles]
    form = AnswerForm.infer(targets, texts=[""] * len(targets))
    assert form.shape == "object"
    assert [form.write(form.parse(target)) for target in targets] == targets
    assert [form.parse(form.write(item)) for item in singles] == singles


@settings(deadline=None)
@given(labels_strategy, spellings)
def test_label_lists_are_written_byte_for_byte_and_know_their_labels(labels: list[str], spelling: Any) -> None:
    targets = [spelled([label], spelling) for label in labels for _ in range(3)]
    form = AnswerForm.infer(targets, texts=[""] * len(targets))
    assert form.shape == "label list"
    assert form.labels == tuple(sorted(labels))
    assert [form.write(form.parse(target)) for target in targets] == targets


@settings(deadline=None)
@given(labels_strategy.filter(lambda labels: all(split_fence(label)[1] is None for label in labels)))
def test_plain_labels_read_back_as_written(labels: list[str]) -> None:
    form = AnswerForm.infer(labels * 3, texts=[""] * len(labels) * 3)
    assert form.shape == "label"
    assert [form.parse(form.write(label)) for label in labels] == labels


@settings(deadline=None)
@given(st.text())
def test_free_text_is_never_changed(text: str) -> None:
    form = AnswerForm(shape="text")
    assert form.parse(text) == text == form.write(text) == form.read_target(text)


@settings(deadline=None)
@given(objects(), spellings, st.data())
def test_an_answer_that_was_cut_is_never_accepted(answers: Any, spelling: Any, data: st.DataObject) -> None:
    targets = [spelled(answer, spelling) for answer in answers]
    form = AnswerForm.infer(targets, texts=[""] * len(targets))
    whole = targets[0]
    cut = data.draw(st.integers(min_value=0, max_value=len(whole) - 1))
    with pytest.raises(FormError):
        form.parse(whole[:cut])


@settings(deadline=None)
@given(objects(), st.sampled_from(STYLES), st.randoms(use_true_random=False))
def test_spacing_and_key_order_of_an_answer_are_free(answers: Any, style: JsonStyle, random: Any) -> None:
    form = AnswerForm.infer([spelled(answer, (STYLES[0], FENCES[1])) for answer in answers], texts=[""] * len(answers))
    for answer in answers:
        shuffled = [dict(random.sample(list(item.items()), len(item))) for item in answer]
        parsed = form.parse(f"```json\n{style.dumps(shuffled)}\n\n```\n")
        assert parsed == answer
        assert [list(item) for item in parsed] == [[field.key for field in form.fields]] * len(answer)


@settings(deadline=None)
@given(objects(), spellings)
def test_a_form_survives_its_json_copy(answers: Any, spelling: Any) -> None:
    form = AnswerForm.infer([spelled(answer, spelling) for answer in answers], texts=["a"] * len(answers))
    assert AnswerForm.from_json(json.loads(json.dumps(form.to_json()))) == form


def test_targets_already_parsed_give_the_plain_json_style() -> None:
    form = AnswerForm.infer([["a"], ["b"]] * 4, texts=[""] * 8)
    assert (form.shape, form.fence_open, form.write(["a"])) == ("label list", "", '["a"]')
    assert form.read_target(["b"]) == ["b"]


def test_the_form_follows_the_majority_where_labels_are_spelled_differently() -> None:
    targets = ['{"a":1,"b":2}', '{"a":3,"b":4}', '{"a": 5, "b": 6}', '```\n{"a":7,"b":8}\n```']
    form = AnswerForm.infer(targets, texts=[""] * 4)
    assert [form.write(form.read_target({"b": 1, "a": 0}))] == ['{"a":0,"b":1}']


def test_a_fenced_program_is_plain_text() -> None:
    assert split_fence("```python\nprint([1])\n```") == ("", None, "")
    assert AnswerForm.infer(["```python\nprint(1)\n```"], texts=[""]).shape == "text"


@pytest.mark.parametrize(
    "targets",
    [
        ['[{"a": 1}]', '[{"b": 1}]'],  # other keys
        ['[{"a": 1}]', '{"a": 1}'],  # list and object
        ['["a"]', "a sentence of its own"],
        ['["a", 1]', '["a", 2]'],  # not only strings
        ['{"a": 1, "a": 2}', '{"a": 1}'],  # one key twice
    ],
)
def test_labels_without_a_common_shape_are_free_text(targets: list[str]) -> None:
    assert AnswerForm.infer(targets, texts=[""] * len(targets)).shape == "text"


# ---- what the labels show -------------------------------------------------------------------------------------


def test_a_set_of_labels_is_closed_up_to_64_labels_seen_two_and_a_half_times_each() -> None:
    names = [f"label {number}" for number in range(MAX_LABELS)]
    assert is_closed_set([*names, *names, *names[:32]])
    assert not is_closed_set([*names, *names, *names[:31]])
    assert not is_closed_set([*names, "one more"] * 3)


@pytest.mark.parametrize(
    ("label", "closed"), [("长" * 40, True), ("长" * 41, False), ("two\nlines", False), ("", True)]
)
def test_labels_are_short_and_stand_on_one_line(label: str, closed: bool) -> None:
    assert is_closed_set([label] * 3) is closed


def test_no_strings_are_no_closed_set() -> None:
    assert not is_closed_set([])


def test_fields_tell_kinds_closed_values_and_what_is_copied_from_the_text() -> None:
    people = [{"类型": "人物", "名字": f"张{n}", "别名": [f"老{n}"], "岁数": n or None} for n in range(6)]
    rows = [(person, f"{person['名字']}，人称老{n}") for n, person in enumerate(people)]
    form = AnswerForm.infer([[row] for row, _ in rows], texts=[text for _, text in rows])
    kind, name, alias, age = form.fields
    assert [field.key for field in form.fields] == ["类型", "名字", "别名", "岁数"]
    assert (kind.values, kind.copied) == (("人物",), False)
    assert (name.values, name.copied, name.kind) == ((), True, "string")
    assert (alias.kind, alias.copied) == ("list of strings", True)
    assert age.kind == "null|number"


def test_the_placeholder_of_absence_is_found_and_left_out_of_the_copied_share() -> None:
    rows = [({"品牌": f"牌子{n}"}, f"我买了牌子{n}的鞋") for n in range(10)] + [({"品牌": "未提及"}, "我买了鞋")] * 3
    (brand,) = AnswerForm.infer([row for row, _ in rows], texts=[text for _, text in rows]).fields
    assert (brand.absent, brand.copied, brand.values) == ("未提及", True, ())


def test_a_form_describes_itself_in_one_line() -> None:
    assert TRIPLES.describe() == "a JSON list in a code fence of 0 object(s) with the keys predicate, object"
    assert TOPICS.describe() == "a JSON list of 1 label(s) out of 2: 手机, 水果"
    assert PERSON.describe() == "a JSON object with the keys name, age"
    assert AnswerForm(shape="label", labels=("a", "b")).describe() == "one label out of 2: a, b"
    assert AnswerForm(shape="text").describe() == "free text"


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "text", "sentence"),
    [
        (TOPICS, '["飞机"]', '"飞机" is not one of the 2 labels. Labels: 手机, 水果.'),
        (TOPICS, '["水果", 1]', "Item 2 must be a string but is a JSON number."),
        (TOPICS, '{"水果": 1}', "The answer must be a list but is a JSON object."),
        (TOPICS, "水果", "Not JSON at character 1, near '水果': Expecting value."),
        (TOPICS, '["水果"', "The JSON is never closed: it breaks off after '[\"水果\"' (Expecting ',' delimiter)."),
        (TOPICS, '["水', "The JSON is never closed: it breaks off after '[\"水' (Unterminated string starting at)."),
        (TOPICS, "[NaN]", "NaN is not a JSON value."),
        (TRIPLES, "[]", "The answer must open with '```json' but starts with '[]'."),
        (TRIPLES, "```json\n[]", "The code fence is never closed: the answer must end with '```', not '```json\\n[]'."),
        (
            TRIPLES,
            '```json\n[{"predicate": "a"}]\n```',
            "Item 1 lacks object. Keys of the form: predicate, object.",
        ),
        (
            TRIPLES,
            '```json\n[{"predicate": "a", "object": "b"}, {"predicate": "a", "objekt": "b"}]\n```',
            "Item 2 lacks object and has the unknown key objekt. Keys of the form: predicate, object.",
        ),
        (TRIPLES, '```json\n["a"]\n```', "Item 1 must be an object but is a JSON string."),
        (
            TRIPLES,
            '```json\n[{"predicate": "a", "object": null}]\n```',
            "Item 1: object must be a string but is a null.",
        ),
        (PERSON, '{"name": "a", "age": "3"}', "The answer: age must be a null or number but is a string."),
        (PERSON, '{"name": "a", "name": "b", "age": 1}', "The key name is given twice in one object."),
        (PERSON, "[]", "The answer must be an object but is a JSON list of strings."),
        (AnswerForm(shape="label", labels=("a", "b")), "c", '"c" is not one of the 2 labels. Labels: a, b.'),
    ],
)
def test_a_refusal_says_where_and_why(form: AnswerForm, text: str, sentence: str) -> None:
    with pytest.raises(FormError) as refusal:
        form.parse(text)
    assert str(refusal.value) == sentence


def test_a_gold_answer_of_the_wrong_json_kind_is_refused() -> None:
    with pytest.raises(FormError, match="is a JSON object, but the other targets of its task are plain text"):
        AnswerForm(shape="text").read_target({"a": 1})
    with pytest.raises(FormError, match="The answer must be plain text but is a JSON list"):
        AnswerForm(shape="text").write(["a"])


@pytest.mark.parametrize("junk", ["", "  ", "好的：[]", "[] 以上", "[]]", "[,]", "null", '"水果"', "```\n[]\n```"])
def test_anything_around_the_json_is_refused(junk: str) -> None:
    with pytest.raises(FormError):
        TOPICS.parse(junk)


def test_space_around_an_answer_is_free() -> None:
    assert TOPICS.parse('\n ["水果"] \n') == ["水果"]
    assert AnswerForm(shape="label", labels=("a", "b")).parse(" a\n") == "a"


# ---- which task a row belongs to ------------------------------------------------------------------------------


def test_triples_and_topics_in_one_file_are_two_tasks_named_after_their_answers() -> None:
    tasks = infer_tasks([*triples(12), *topics(["手机", "水果"])])
    assert [(task.name, task.kind, task.wordings) for task in tasks] == [
        ("triples", "extraction", ("抽取三元组。",)),
        ("labels", "labels", ("关于什么的评论？",)),
    ]


def test_rows_that_name_their_task_are_grouped_by_that_name() -> None:
    rows = [record("是", task="a"), record("否", task="a"), record("随便写一句", task="b")] * 3
    assert [(task.name, task.form.shape) for task in infer_tasks(rows)] == [("a", "label"), ("b", "label")]


def test_questions_that_share_no_label_are_different_tasks_and_paraphrases_are_one() -> None:
    rows = [
        *topics(["手机", "水果"], question="关于什么？", each=6),
        *topics(["手机", "书籍"], question="是什么类别？", each=6),
        *topics(["好", "坏"], question="语气如何？"),
    ]
    tasks = infer_tasks(rows)
    assert [(task.name, task.form.labels) for task in tasks] == [
        ("labels", ("书籍", "手机", "水果")),
        ("labels-2", ("坏", "好")),
    ]
    assert set(tasks[0].wordings) == {"关于什么？", "是什么类别？"}


def test_plain_labels_hidden_among_free_text_are_found_by_their_question() -> None:
    chats = [record(f"第{n}个很长的回答，各不相同。", question="你怎么看？") for n in range(9)]
    feelings = [record(label, question="语气如何？") for label in ("好", "坏") for _ in range(4)]
    found = infer_tasks([*chats, *feelings])
    assert [(task.name, task.kind) for task in found] == [("text", "text"), ("labels", "labels")]


def test_a_few_odd_rows_under_another_tasks_question_are_mistakes_not_a_task() -> None:
    odd = record('[{"subject": "甲", "predicat": "父亲", "object": "乙"}]', question="抽取三元组。", line=41)
    (task,) = infer_tasks([*triples(40), odd])
    assert [field.key for field in task.form.fields] == ["subject", "predicate", "object"]
    assert assign_task(odd, [task]) == task
    with pytest.raises(FormError, match="Item 1 lacks predicate and has the unknown key predicat"):
        task.gold(odd)


def test_many_rows_of_another_shape_under_one_question_are_a_task() -> None:
    others = [record(f'{{"name": "张{n}"}}', question="抽取三元组。") for n in range(10)]
    assert [task.name for task in infer_tasks([*triples(40), *others])] == ["triples", "attributes"]


def test_a_row_with_an_empty_list_does_not_hide_the_task() -> None:
    (task,) = infer_tasks([*triples(40), record("[]", question="抽取三元组。")])
    assert task.form.shape == "object list"
    assert task.form.parse("[]") == []


def test_questions_that_differ_in_every_row_are_no_signal() -> None:
    (task,) = infer_tasks([record(f"回答{n}", question=f"问题{n}") for n in range(50)])
    assert (task.kind, task.wordings) == ("text", ())


def test_the_inferred_tasks_do_not_depend_on_the_order_of_rows() -> None:
    rows = [*triples(12), *topics(["手机", "水果"])]
    assert infer_tasks(rows[::-1]) == infer_tasks(rows)


def test_a_task_survives_its_json_copy() -> None:
    for task in infer_tasks([*triples(12), *topics(["手机", "水果"])]):
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_a_row_is_assigned_by_its_task_field_before_anything_else() -> None:
    tasks = infer_tasks([*triples(12), *topics(["手机", "水果"])])
    assert assign_task(record(None, question="抽取三元组。", task="labels"), tasks) == tasks[1]


def test_an_unknown_task_field_is_a_problem_with_the_nearest_name() -> None:
    tasks = infer_tasks([*triples(12), *topics(["手机", "水果"])])
    near, far = assign_task(record("", task="triple"), tasks), assign_task(record("", task="情感"), tasks)
    assert isinstance(near, Problem)
    assert isinstance(far, Problem)
    assert str(near) == "rows.jsonl:1: task: There is no task 'triple'. Fix: Did you mean 'triples'?"
    assert far.fix == "Use one of: triples, labels."


def test_a_row_without_a_label_is_assigned_by_its_question() -> None:
    tasks = infer_tasks([*triples(12), *topics(["手机", "水果"])])
    assert assign_task(record(None, question="关于什么的评论？"), tasks) == tasks[1]
    assert assign_task(record(None, question="请抽取三元组。"), tasks) == tasks[0]


def test_a_labelled_row_with_a_new_question_is_assigned_by_its_answer() -> None:
    tasks = infer_tasks([*triples(12), *topics(["手机", "水果"])])
    assert assign_task(record('["水果"]', question="What is this about?"), tasks) == tasks[1]


def test_a_structured_task_is_preferred_to_free_text_that_would_fit_as_well() -> None:
    tasks = infer_tasks([*topics(["手机", "水果"]), *[record(f"回答{n}。", question="聊聊") for n in range(6)]])
    assigned = assign_task(record('["水果"]', question="全新的问题"), tasks)
    assert isinstance(assigned, Task)
    assert assigned.kind == "labels"


def test_a_row_that_could_be_anything_is_a_problem() -> None:
    tasks = infer_tasks([*triples(12), *topics(["手机", "水果"])])
    problem = assign_task(record(None, question="Translate this, please", line=7), tasks)
    assert isinstance(problem, Problem)
    assert str(problem) == (
        "rows.jsonl:7: task: The question 'Translate this, please' fits none of the tasks triples, labels. "
        'Fix: Add a "task" field with one of these names to the row.'
    )


def test_the_only_task_takes_every_row() -> None:
    tasks = infer_tasks(triples(12))
    assert assign_task(record(None, question="Translate this, please"), tasks) == tasks[0]


def test_the_nearest_wording_must_be_alike_enough() -> None:
    tasks = infer_tasks([*triples(12), *topics(["手机", "水果"])])
    assert nearest_wording(record(None, question="抽取一下三元组。"), tasks) == tasks[0]
    assert nearest_wording(record(None, question="抽取一下三元组。"), tasks, least=0.99) is None
    assert nearest_wording(record(None, question="抽取"), ()) is None


@needs_rows
def test_every_row_of_the_main_data_set_is_reproduced_byte_for_byte() -> None:
    rows = read_records(ROWS)
    tasks = infer_tasks(rows)
    assert len(rows) == 802
    assert [(task.name, len(task.wordings)) for task in tasks] == [("triples", 12), ("labels", 3)]
    assert [field.key for field in tasks[0].form.fields if field.copied] == ["object", "subject"]
    for row in rows:
        task = assign_task(row, tasks)
        assert isinstance(task, Task)
        assert task.write_target(row) == row.target
        assert task.form.parse(task.form.write(task.gold(row))) == task.gold(row)


# ---- known faults ---------------------------------------------------------------------------------------------


def test_an_endless_run_of_brackets_is_refused() -> None:
    with pytest.raises(FormError):
        TOPICS.parse("[" * 5000)


def test_a_number_too_large_for_json_is_refused() -> None:
    with pytest.raises(FormError):
        PERSON.parse('{"name": "a", "age": 1e999}')


def test_a_fence_with_windows_line_ends_is_a_fence() -> None:
    targets = ['```json\r\n["a"]\r\n```', '```json\r\n["b"]\r\n```'] * 4
    assert AnswerForm.infer(targets, texts=[""] * 8).shape == "label list"


@pytest.mark.parametrize("empty", ["[]", []])
def test_many_empty_lists_belong_to_the_object_lists_asked_with_the_same_question(empty: Any) -> None:
    (task,) = infer_tasks([*triples(20), *[record(empty, question="抽取三元组。")] * 5])
    assert (task.form.shape, task.form.min_items) == ("object list", 0)


def test_an_empty_list_seen_once_is_within_the_bounds_of_the_form() -> None:
    (task,) = infer_tasks([*triples(40), record("[]", question="抽取三元组。")])
    assert task.form.min_items == 0
