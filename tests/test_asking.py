"""Asking without training: the form in words, examples well chosen, turns in order, nothing left out in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from weitiao.data.formats import row_to_record
from weitiao.data.neighbours import NeighbourIndex, searched_text, texts_alike
from weitiao.data.record import Record
from weitiao.data.records import read_records
from weitiao.errors import FormError
from weitiao.messages import Message, check_order
from weitiao.render.base import Conversation
from weitiao.render.shots import add_neighbours, add_shots, ask, with_shots
from weitiao.render.template import TemplateRenderer
from weitiao.tasks.asking import describe_answer, language_of
from weitiao.tasks.base import Task, assign_task, infer_tasks
from weitiao.tasks.choosing import can_be_shown, choose_shots
from weitiao.tasks.fields import Field
from weitiao.tasks.forms import AnswerForm, JsonStyle

ROOT = Path(__file__).parents[1]
PLENTY = 1 << 20


@pytest.fixture(scope="module")
def rows() -> list[Record]:
    return read_records(ROOT / "examples/starter/train.jsonl")


@pytest.fixture(scope="module")
def task_of(rows: list[Record]) -> list[Task]:
    tasks = infer_tasks(rows)
    return [assign_task(record, tasks) for record in rows]  # type: ignore[misc]


@pytest.fixture(scope="module")
def tasks(task_of: list[Task]) -> dict[str, Task]:
    return {task.name: task for task in task_of}


def record(row: dict[str, object]) -> Record:
    made = row_to_record(row, "rows.jsonl:1", require_target=True)
    assert isinstance(made, Record), made
    return made


def talk(*texts: str) -> Record:
    turns = [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)]
    return record({"messages": turns})


# --- The form in words ----------------------------------------------------------------------------------------------


def test_an_object_is_told_with_its_keys_absence_and_skeleton(tasks: dict[str, Task]) -> None:
    assert describe_answer(tasks["attributes"].form, "zh") == (
        "只输出一个 JSON 对象，前后不写别的文字。\n"
        '- "学历要求"、"专业要求"、"工作年限要求"、"编程语言"、"加分项"：字符串列表，照抄原文里的字句；'
        '原文没有时写 ["该JD未要求"]\n'
        "格式：\n"
        '{"学历要求": ["…"], "专业要求": ["…"], "工作年限要求": ["…"], "编程语言": ["…"], "加分项": ["…"]}'
    )


def test_a_list_of_objects_is_told_with_its_fence_and_closed_sets(tasks: dict[str, Task]) -> None:
    told = describe_answer(tasks["triples"].form, "en")
    lines = told.split("\n")
    assert lines[0] == "Write one JSON list in a code fence, and nothing before or after it."
    assert lines[2].startswith('- "predicate": a string, one of: ')
    assert set(lines[2].partition("one of: ")[2].split(", ")) == set(tasks["triples"].form.fields[0].values)
    assert lines[5] == '- "subject", "object": a string, copied word for word from the text'
    assert told.endswith(
        '```json\n[{"predicate": "…", "subject_type": "…", "object_type": "…", "subject": "…", "object": "…"}]\n```'
    )


@pytest.mark.parametrize(
    ("form", "zh", "en"),
    [
        (AnswerForm(shape="text"), "", ""),
        (
            AnswerForm(shape="pattern", definition="[A-Z]{2}"),
            "只输出答案本身，前后不写别的文字。\n须匹配这个正则表达式：\n[A-Z]{2}",
            "Write the answer itself, and nothing before or after it.\nIt matches this regular expression:\n[A-Z]{2}",
        ),
        (
            AnswerForm(shape="json", definition='{"type": "integer"}', fence_open="```\n", fence_close="\n```"),
            '只输出 JSON，写在代码块里，前后不写别的文字。\n须符合这个 JSON Schema：\n{"type": "integer"}',
            "Write JSON in a code fence, and nothing before or after it.\nIt follows this JSON Schema:\n"
            '{"type": "integer"}',
        ),
        (
            AnswerForm(shape="label", labels=("好", "坏")),
            "只输出下面标签中的一个，不写别的文字：好、坏。",
            "Write one of these labels and nothing else: 好, 坏.",
        ),
        (
            AnswerForm(shape="label list", labels=("a", "b"), min_items=0, max_items=2),
            "只输出一个 JSON 列表，前后不写别的文字。\n列表里有 0 到 2 个标签，只能从这些里选：a、b。\n"
            '没有可写的就输出 []。\n格式：\n["…"]',
            "Write one JSON list, and nothing before or after it.\nThe list holds 0 to 2 labels, out of: a, b.\n"
            'Write [] where there is nothing to list.\nThe form:\n["…"]',
        ),
        (
            AnswerForm(
                shape="string list", min_items=1, max_items=3, item=Field(key="", kind="string", copied_share=1.0)
            ),
            '只输出一个 JSON 列表，前后不写别的文字。\n每一项是一个字符串，照抄原文里的字句。\n格式：\n["…"]',
            "Write one JSON list, and nothing before or after it.\n"
            'Each item is a string, copied word for word from the text.\nThe form:\n["…"]',
        ),
    ],
    ids=lambda value: value.shape if isinstance(value, AnswerForm) else "",
)
def test_every_shape_is_told_in_both_languages(form: AnswerForm, zh: str, en: str) -> None:
    assert describe_answer(form, "zh") == zh
    assert describe_answer(form, "en") == en


def test_kinds_of_values_and_the_spelling_of_the_labels_are_told() -> None:
    form = AnswerForm(
        shape="object",
        style=JsonStyle(item_separator=",", key_separator=":", ensure_ascii=True),
        fields=(
            Field(key="n", kind="null|number"),
            Field(key="ok", kind="boolean"),
            Field(key="t", kind="string", values=("a, b", "c"), absent="无"),
            Field(key="x", kind="boolean|list|list of strings|null|number|object|string"),
            Field(key="l", kind="list"),
            Field(key="d", kind="string", pattern="[0-9]{4}年"),
        ),
    )
    assert describe_answer(form, "en") == (
        "Write one JSON object, and nothing before or after it.\n"
        '- "n": null or a number\n'
        '- "ok": true or false\n'
        '- "t": a string, one of: "a, b", "c"; "\\u65e0" where the text says nothing of it\n'
        '- "x": any JSON value\n'
        '- "l": a list\n'
        '- "d": a string, matching the regular expression [0-9]{4}年\n'
        "The form:\n"
        '{"n":0,"ok":true,"t":"\\u2026","x":"\\u2026","l":[],"d":"\\u2026"}'
    )


def test_the_skeleton_has_the_form_it_describes(tasks: dict[str, Task]) -> None:
    for name in ("attributes", "triples"):
        form = tasks[name].form
        skeleton = describe_answer(form).partition("格式：\n")[2]
        assert form.write(form.parse(skeleton)) == skeleton


def test_a_few_copied_values_are_no_closed_set() -> None:
    form = AnswerForm(shape="object", fields=(Field(key="k", kind="string", values=("北京",), copied_share=1.0),))
    assert "北京" not in describe_answer(form, "zh")
    assert "只能是：北京" in describe_answer(replace(form, ground=False), "zh"), "where nothing is held to the text"


def test_a_row_is_told_the_form_in_the_language_it_is_asked_in(rows: list[Record]) -> None:
    english = [row for row in rows if language_of(row) == "en"]
    assert {row.question.isascii() for row in english} == {True} and len(english) == 67
    assert [language_of(talk(asked, "a")) for asked in ("按三元组输出 JSON", "12345", "JSON, please")] == [
        "zh",
        "zh",
        "en",
    ]


# --- Which examples -------------------------------------------------------------------------------------------------


def test_examples_of_labels_show_each_label_before_any_comes_again(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task]
) -> None:
    task = tasks["labels"]
    shots = choose_shots(rows, task_of, task, 16, seed=3)
    labels = [task.gold(shot)[0] for shot in shots]
    assert sorted(labels[:8]) == sorted(labels[8:]) == sorted(task.form.labels)


def test_examples_of_triples_show_more_predicates_than_the_first_rows_do(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task]
) -> None:
    task = tasks["triples"]

    def shown(shots: list[Record]) -> set[str]:
        return {item["predicate"] for shot in shots for item in task.gold(shot)}

    first = [row for row, its in zip(rows, task_of) if its is task][:4]
    for seed in range(3):
        assert len(shown(choose_shots(rows, task_of, task, 4, seed=seed))) > len(shown(first))


def test_examples_of_attributes_show_presence_and_absence_of_every_key(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task]
) -> None:
    task = tasks["attributes"]
    answers = [task.gold(shot) for shot in choose_shots(rows, task_of, task, 4)]
    for field in task.form.fields:
        assert {answer[field.key] == [field.absent] for answer in answers} == {True, False}


def test_the_choice_is_the_same_each_time_grows_by_appending_and_hangs_on_the_seed(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task]
) -> None:
    task = tasks["labels"]
    four = choose_shots(rows, task_of, task, 4, seed=1)
    assert four == choose_shots(rows, task_of, task, 4, seed=1) == choose_shots(rows, task_of, task, 9, seed=1)[:4]
    assert four != choose_shots(rows, task_of, task, 4, seed=2)
    assert all(assign_task(shot, [task]) is task for shot in four)


def test_conversations_and_rows_with_tools_are_no_examples(tasks: dict[str, Task]) -> None:
    plain = talk("一", "二")
    several = talk("一", "二", "三", "四")
    tool = replace(plain, tools=({"name": "f", "description": "", "parameters": {}},))
    assert [can_be_shown(row) for row in (plain, several, tool)] == [True, False, False]
    task = Task(name="text", form=AnswerForm(shape="text"))
    assert choose_shots([several, tool, plain], [task] * 3, task, 3) == [plain]
    assert choose_shots([several], [task], task, 3) == []


# --- The turns ------------------------------------------------------------------------------------------------------


def test_examples_stand_before_the_question_in_exactly_the_labelled_form(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task]
) -> None:
    task = tasks["triples"]
    asked, *shots = [row for row, its in zip(rows, task_of) if its is task][:3]
    turns = ask(asked, task, shots)
    check_order(turns)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert [turn.text for turn in turns[1::2]] == [task.write_target(shot) for shot in shots]
    assert [turn.text for turn in turns[2::2]] == [shots[1].prompt, asked.prompt]
    told = describe_answer(task.form, language_of(asked))
    assert turns[0].text == f"{told}\n\n{shots[0].prompt}"


def test_without_examples_the_row_is_as_it_was_behind_the_description(rows: list[Record], task_of: list[Task]) -> None:
    for row, task in zip(rows[:20], task_of):
        told = with_shots(row, task, (), describe=True)
        assert told.prompt.endswith(row.prompt) and told.prompt != row.prompt
        assert told.text == row.text and told.prompt[slice(*told.text_span)] == row.text  # type: ignore[misc]
        assert with_shots(row, task, (), describe=False) == row


def test_the_description_joins_a_system_message_and_else_adds_none() -> None:
    task = Task(name="t", form=AnswerForm(shape="label", labels=("好", "坏")))
    shot = record({"messages": [{"role": "user", "content": "苹果甜"}, {"role": "assistant", "content": "好"}]})
    row = record(
        {
            "messages": [
                {"role": "system", "content": "你是评审。"},
                {"role": "user", "content": "梨子烂了"},
                {"role": "assistant", "content": "坏"},
            ]
        }
    )
    turns = ask(row, task, [shot])
    assert turns[0] == Message(role="system", text=f"你是评审。\n\n{describe_answer(task.form, 'zh')}")
    assert [turn.text for turn in turns[1:]] == ["苹果甜", "好", "梨子烂了"]
    assert "system" not in [turn.role for turn in ask(shot, task)]


def test_what_cannot_stand_among_examples_is_refused(tasks: dict[str, Task]) -> None:
    task = Task(name="text", form=AnswerForm(shape="text"))
    one, several = talk("一", "二"), talk("一", "二", "三", "四")
    with pytest.raises(ValueError, match="several turns or tools"):
        ask(several, task, [one])
    with pytest.raises(ValueError, match="several turns or tools"):
        ask(one, task, [several])
    assert ask(several, task) == several.messages
    with pytest.raises(FormError, match="is not one of the 2 labels"):
        ask(one, Task(name="t", form=AnswerForm(shape="label", labels=("a", "b"))), [one])


def test_training_never_learns_the_answers_of_examples(
    rows: list[Record], task_of: list[Task], tiny_qwen2_folder: Path
) -> None:
    renderer = TemplateRenderer(AutoTokenizer.from_pretrained(tiny_qwen2_folder))
    task = task_of[0]
    shot, row = [row for row, its in zip(rows, task_of) if its is task][:2]
    shown = with_shots(row, task, [shot], describe=False)
    answer = task.write_target(row)
    [example] = renderer.render_conversation(shown.messages, Message(role="assistant", text=answer))
    learnt = [token for token, learn in zip(example.token_ids, example.loss_mask) if learn]
    assert renderer.read_answer(learnt) == answer and example.num_answer == len(learnt)
    assert Conversation(messages=shown.messages, reply=Message(role="assistant", text=answer)).learnt_places(
        "flagged"
    ) == [len(shown.messages)]


# --- Many rows ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny_qwen2_folder", "tiny_llama_folder"])
def renderer(request: pytest.FixtureRequest) -> TemplateRenderer:
    """One with a chat template, one without."""
    return TemplateRenderer(AutoTokenizer.from_pretrained(request.getfixturevalue(request.param)))


def test_examples_that_do_not_fit_are_left_out_farthest_first_and_said(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task], renderer: TemplateRenderer
) -> None:
    index = NeighbourIndex.build(rows, groups=[task.name for task in task_of])
    some, theirs = rows[:30], task_of[:30]
    free = add_neighbours(
        some, theirs, index, 3, exclude_self=False, renderer=renderer, room=dict.fromkeys(tasks, PLENTY)
    )
    assert not free.notes() and {len(row.messages) for row in free.records} == {7}
    sizes = sorted(len(renderer.render_prompt(row.messages)) for row in free.records)
    room = sizes[len(sizes) // 2]
    tight = add_neighbours(
        some, theirs, index, 3, exclude_self=False, renderer=renderer, room=dict.fromkeys(tasks, room)
    )
    assert 0 < len(tight.left_out) < 30
    for whole, cut in zip(free.records, tight.records):
        assert cut.messages == whole.messages[2 * tight.left_out.get(cut.source, 0) :]
        assert len(renderer.render_prompt(cut.messages)) <= room or len(cut.messages) == 1
    [note] = tight.notes()
    assert note.startswith(f"{sum(tight.left_out.values())} examples left out of {len(tight.left_out)} prompts")
    assert next(iter(tight.left_out)) in note


def test_a_row_is_never_its_own_example_nor_is_a_near_repeat_of_it(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task], renderer: TemplateRenderer
) -> None:
    room = dict.fromkeys(tasks, PLENTY)
    chosen = {name: choose_shots(rows, task_of, task, 6) for name, task in tasks.items()}
    places = [place for place, row in enumerate(rows) if any(row is shot for mine in chosen.values() for shot in mine)]
    again = [replace(rows[place].with_text(rows[place].text + "！"), source=f"again:{place}") for place in places]
    asked = [rows[place] for place in places] + again
    theirs = [task_of[place] for place in places] * 2
    added = add_shots(asked, theirs, chosen, 4, renderer=renderer, room=room)
    index = NeighbourIndex.build(asked, groups=[task.name for task in theirs])
    near = add_neighbours(asked, theirs, index, 4, exclude_self=True, renderer=renderer, room=room)
    assert not added.fewer, "six are chosen, so that four are left when one is out"
    for row, shown, looked_up in zip(asked, added.records, near.records):
        for turn in (*shown.messages[:-1], *looked_up.messages[:-1]):
            assert turn.role == "assistant" or not texts_alike(searched_text(row), turn.text)
            assert row.text not in turn.text
    assert all(shown.text == row.text and shown.source == row.source for row, shown in zip(asked, added.records))


def test_the_nearest_example_stands_last(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task], renderer: TemplateRenderer
) -> None:
    index = NeighbourIndex.build(rows, groups=[task.name for task in task_of])
    added = add_neighbours(
        rows[:5], task_of[:5], index, 2, exclude_self=False, renderer=renderer, room=dict.fromkeys(tasks, PLENTY)
    )
    for row, shown in zip(rows, added.records):
        assert shown.messages[-3].text == row.prompt, "the index holds the row itself, which is nearest"


def test_rows_that_take_no_examples_or_find_too_few_are_named(renderer: TemplateRenderer) -> None:
    task = Task(name="text", form=AnswerForm(shape="text"))
    room = {"text": PLENTY}
    several = replace(talk("一", "二", "三", "四"), source="several:1")
    odd = replace(talk("xyz", "二"), source="odd:1")
    train = [talk("手机很好", "是"), talk("手机很坏", "否")]
    index = NeighbourIndex.build(train, groups=["text", "text"])
    added = add_neighbours(
        [several, odd, talk("手机", "?")], [task] * 3, index, 2, exclude_self=False, renderer=renderer, room=room
    )
    assert [len(row.messages) for row in added.records] == [3, 1, 5]
    assert added.notes() == [
        "1 rows with fewer than 2 examples, for lack of rows to show: odd:1",
        "1 rows asked without examples, being conversations of several turns or with tools: several:1",
    ]
    assert not add_shots([several, odd], [task] * 2, {}, 0, renderer=renderer, room=room).notes()
    with pytest.raises(ValueError, match="own 2 rows, but there are 1"):
        add_neighbours([odd], [task], index, 1, exclude_self=True, renderer=renderer, room=room)


def test_prompts_are_the_same_each_time(
    rows: list[Record], task_of: list[Task], tasks: dict[str, Task], renderer: TemplateRenderer
) -> None:
    room = dict.fromkeys(tasks, PLENTY)

    def prompts() -> str:
        index = NeighbourIndex.build(rows, groups=[task.name for task in task_of])
        chosen = {name: choose_shots(rows, task_of, task, 4, seed=5) for name, task in tasks.items()}
        near = add_neighbours(rows[:9], task_of[:9], index, 3, exclude_self=False, renderer=renderer, room=room)
        fixed = add_shots(rows[:9], task_of[:9], chosen, 3, renderer=renderer, room=room)
        return json.dumps([renderer.render_prompt(row.messages) for row in (*near.records, *fixed.records)])

    assert prompts() == prompts()
