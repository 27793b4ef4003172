"""Forms that users give: JSON Schemas, expressions, grammars, bounds; what is held to, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from schema_features import FEATURES, PAGE, Feature, page
from weitiao.dataset import merge_tasks
from weitiao.errors import FormError, RecipeError
from weitiao.recipe import DeclaredTask, make_recipe
from weitiao.tasks.asking import describe_answer
from weitiao.tasks.base import Task
from weitiao.tasks.byte_matcher import accepts, complaint
from weitiao.tasks.forms import AnswerForm, JsonStyle
from weitiao.tasks.grammar import form_grammar
from weitiao.tasks.schema import ANNOTATIONS, ENFORCED, REFUSED, check_schema, ordered

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "skills": {"type": "array", "items": {"enum": ["写作", "绘画", "编程"]}, "maxItems": 3},
    },
    "required": ["name", "skills"],
}


def declare(known: AnswerForm | None = None, **parts: Any) -> AnswerForm:
    (task,) = merge_tasks([Task(name="t", form=known)] if known else [], [DeclaredTask(name="t", **parts)])
    return task.form


def takes(form: AnswerForm, text: str, *, source: str = "") -> bool:
    grammar = form_grammar(form, source)
    assert grammar is not None
    assert complaint(grammar) == ""
    return accepts(grammar, text) is None


# ---- features of JSON Schema ----------------------------------------------------------------------------------

HELD = [feature for feature in FEATURES if not feature.refused]


@pytest.mark.parametrize("feature", HELD, ids=lambda one: one.name)
def test_answers_follow_the_schema_as_the_standard_means_it(feature: Feature) -> None:
    form = declare(json_schema=dict(feature.schema), fence="json")
    standard = jsonschema.Draft202012Validator(
        feature.schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for answer in feature.valid:
        assert standard.is_valid(answer), answer
        text = form.write(answer)
        assert takes(form, text), text
        assert form.parse(text) == answer
    for answer in feature.invalid:
        text = f"{form.fence_open}{form.style.dumps(answer)}{form.fence_close}"
        assert not takes(form, text), text
        if "format" not in feature.schema:  # formats that need further packages are checked by the engine alone
            assert not standard.is_valid(answer), answer
            with pytest.raises(FormError, match="does not follow the schema"):
                form.parse(text)


@pytest.mark.parametrize("feature", [one for one in FEATURES if one.refused], ids=lambda one: one.name)
def test_what_cannot_be_enforced_is_refused_with_its_place(feature: Feature) -> None:
    with pytest.raises(RecipeError) as refusal:
        declare(json_schema=dict(feature.schema))
    assert str(refusal.value).startswith("tasks: t: json_schema cannot be used:\n  ")
    assert feature.refused in str(refusal.value)
    inside = {"type": "array", "items": dict(feature.schema)}
    assert check_schema(inside) or "#" in feature.schema.values()


def test_every_keyword_is_in_the_list_of_features() -> None:
    told = json.dumps([one.schema for one in FEATURES]) + " ".join(one.name for one in FEATURES)
    untold = {"additionalItems", "$recursiveAnchor", "$recursiveRef", "$dynamicAnchor"}  # other drafts' spellings
    assert [word for word in (*ENFORCED, *REFUSED) if f'"{word}"' not in told and word not in untold] == []
    assert not set(ENFORCED) & {*REFUSED, *ANNOTATIONS}


def test_the_page_of_features_is_the_table_that_is_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/schema_features.py"


def test_a_schema_leaves_no_answer_without_end() -> None:
    form = declare(json_schema={"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}})
    assert takes(form, form.write({"a": ["x" * 1000] * 64}))
    assert not takes(form, form.write({"a": ["x"] * 65}))
    assert not takes(form, form.write({"a": ["x" * 1001]}))
    assert not takes(form, form.write({"a": [], "b": 1}))
    assert not takes(form, '{"a":  []}')
    assert not takes(form, '{ "a": []}')
    assert not takes(form, '{"a": []}\n')


# ---- schemas as forms -----------------------------------------------------------------------------------------


def test_a_schema_is_a_form_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON), encoding="utf-8")
    form = declare(json_schema=str(file), fence="json")
    assert form == declare(json_schema=PERSON, fence="json")
    assert AnswerForm.from_json(json.loads(json.dumps(form.to_json()))) == form
    answer = {"skills": ["绘画"], "name": "甲"}
    assert form.write(answer) == '```json\n{"name": "甲", "skills": ["绘画"]}\n```'
    assert form.read_target(json.dumps(answer).join(["```json\n", "\n```"])) == answer
    assert form.describe().startswith('JSON in a code fence that follows the schema {"type": "object"')
    assert '"maximum": 150' in describe_answer(form)
    with pytest.raises(FormError, match=r"^\$\.age does not follow the schema: 200 is greater than the maximum of 150"):
        form.parse('```json\n{"name": "甲", "age": 200, "skills": []}\n```')
    with pytest.raises(FormError, match="The key name is given twice"):
        form.parse('```json\n{"name": "甲", "name": "乙", "skills": []}\n```')


def test_answers_of_a_schema_are_scored_by_their_values() -> None:
    task = Task(name="t", form=declare(json_schema=PERSON))
    gold = {"name": "甲", "age": 3, "skills": ["写作", "绘画"]}
    right = task.score(gold, '{"skills": ["绘画", "写作"], "name": "甲", "age": 3}')
    half = task.score(gold, '{"name": "甲", "skills": ["写作"]}')
    assert task.summarise(right.counts)["f1"] == 1
    assert task.summarise(half.counts)["recall"] == 0.5
    assert not task.score(gold, "{}").valid


def test_a_schema_is_written_as_the_labels_are_but_on_one_line() -> None:
    known = AnswerForm.infer(['```\n{"name":"甲"}\n```'] * 3, texts=[""] * 3)
    form = declare(known, json_schema=PERSON)
    assert form.write({"name": "甲", "skills": []}) == '```\n{"name":"甲","skills":[]}\n```'
    indented = AnswerForm.infer(['{\n  "name": "甲"\n}'] * 3, texts=[""] * 3)
    form = declare(indented, json_schema=PERSON)
    assert form.style.indent is None
    assert takes(form, form.write({"name": "甲", "skills": ["编程"]}))


@pytest.mark.parametrize("ascii_only", [False, True])
def test_escapes_of_a_schema_follow_the_labels(ascii_only: bool) -> None:
    style = JsonStyle(ensure_ascii=ascii_only)
    form = declare(AnswerForm(shape="object", style=style), json_schema=PERSON)
    answer = {"name": "甲😀\n", "skills": []}
    assert takes(form, form.write(answer))
    assert form.parse(form.write(answer)) == answer


def test_keys_are_ordered_through_references_and_alternatives() -> None:
    schema = {
        "$defs": {"p": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}},
        "type": "object",
        "properties": {
            "list": {"type": "array", "items": {"$ref": "#/$defs/p"}},
            "either": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/p"}]},
        },
        "required": ["list", "more"],
        "additionalProperties": {"type": "integer"},
    }
    answer = {"z": 1, "more": 2, "either": {"y": 1, "x": 2}, "list": [{"y": 3, "x": 4}]}
    form = declare(json_schema=schema)
    text = '{"list": [{"x": 4, "y": 3}], "either": {"x": 2, "y": 1}, "more": 2, "z": 1}'
    assert json.dumps(ordered(form.definition, answer)) == form.write(answer) == text
    assert takes(form, text)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ("missing.json", r"json_schema missing\.json: there is no such file\. Paths are relative to"),
        ({"type": "strin"}, r"\$\.type is no JSON Schema: 'strin' is not valid"),
        ({"type": "object", "x-guidance": {"lenient": True}}, r"\$\.x-guidance: there is no keyword x-guidance"),
        ({"const": float("nan")}, "holds a value that JSON has not"),
        (
            {"properties": {"a": {"items": {"not": {}}}, "b": {"uniqueItems": True}}},
            r"\$\.properties\.a\.items\.not: the keyword not cannot.*\n.*\$\.properties\.b\.uniqueItems",
        ),
        (
            {"properties": {"a": {"type": "string", "pattern": "(?!b)"}}},
            r"\$\.properties\.a cannot be held to while an answer is written: look-around",
        ),
    ],
)
def test_a_schema_that_cannot_be_used_is_named(schema: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        declare(json_schema=schema)


def test_a_file_that_holds_no_schema_is_named(tmp_path: Path) -> None:
    for text, sentence in (("[1]", "must hold a JSON object"), ("{", "cannot be read")):
        (tmp_path / "s.json").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=sentence):
            declare(json_schema=str(tmp_path / "s.json"))


# ---- expressions and grammars ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"第[0-9]{1,3}号", ["第1号", "第999号"], ["第号", "1", "第1号 ", "x第1号"]),
        (r"^(是|否)$", ["是", "否"], ["是否", ""]),
        (r"a/b\.c|\\boxed\{[A-D]\}", ["a/b.c", "\\boxed{B}"], ["a/bxc", "\\boxed{E}"]),
        (r"ends\$", ["ends$"], ["ends"]),
    ],
)
def test_an_expression_is_a_form(pattern: str, right: list[str], wrong: list[str]) -> None:
    form = declare(regex=pattern)
    assert AnswerForm.from_json(form.to_json()) == form
    for text in right:
        assert takes(form, text)
        assert form.parse(form.write(text)) == text == form.read_target(text)
    for text in wrong:
        assert not takes(form, text)
        with pytest.raises(FormError, match="does not match the pattern"):
            form.parse(text)
    assert form.describe() == f"text that follows the pattern {pattern}"


def test_an_expression_without_end_has_one() -> None:
    form = declare(regex="a+")
    assert takes(form, "a" * 4_000)
    assert not takes(form, "a" * 4_001)


def test_a_grammar_is_a_form() -> None:
    lark = 'start: sum\nsum: NUM ("+" NUM){0,3}\nNUM: /[1-9][0-9]{0,2}/'
    form = declare(lark=lark)
    assert AnswerForm.from_json(form.to_json()) == form
    assert form.parse("1+22") == "1+22" == form.write("1+22")
    assert takes(form, "1+22")
    with pytest.raises(FormError, match=r"does not follow the grammar: after '1\+', 'x' cannot stand"):
        form.parse("1+x")
    with pytest.raises(FormError, match="it breaks off"):
        form.parse("1+")
    with pytest.raises(FormError, match="at the very beginning, it breaks off"):
        form.parse("")


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"regex": "(a"}, r"tasks: t: regex '\(a' cannot be used: missing \)"),
        ({"regex": "(?=a)b"}, "regex .* cannot be used: .*look-around"),
        ({"regex": r"(a)\1"}, "regex .* cannot be used: .*back"),
        ({"lark": "start: nothing"}, "lark 'start: nothing' cannot be used"),
        ({"lark": 'start: "a" <end_of_turn>'}, "lark .* cannot be used"),
        ({"regex": "a", "lark": "b"}, "regex says all of an answer. Leave out lark"),
        (
            {"json_schema": {}, "keys": ("a",), "max_items": 3},
            "json_schema says all of an answer. Leave out keys, max_",
        ),
        ({"regex": "a", "fence": "json"}, "regex says all of an answer. Leave out fence"),
        ({}, "has no rows to tell its shape from"),
        ({"shape": "object"}, "of shape 'object' needs keys"),
        ({"shape": "label"}, "of shape 'label' needs labels"),
        ({"labels": ("a",), "max_items": 2}, "min_items and max_items are for lists, but an answer is one label"),
        ({"shape": "string list", "min_items": 4, "max_items": 2}, "min_items 4 is more than max_items 2"),
    ],
)
def test_a_declaration_that_cannot_be_used_is_a_sentence(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        declare(**parts)


# ---- bounds and grounding -------------------------------------------------------------------------------------

ROWS = [[{"q": f"甲{n}"}] for n in range(8)]
COPIED = AnswerForm.infer(ROWS, texts=[f"是甲{n}" for n in range(8)])


def test_lists_are_as_long_as_the_labels_show_unless_widened() -> None:
    two = '[{"q": "乙"}, {"q": "丙"}]'
    assert not takes(declare(COPIED, wordings=("谁？",)), two, source="乙丙")
    assert takes(declare(COPIED, max_items=2), two, source="乙丙")
    assert not takes(declare(COPIED, max_items=2), "[]", source="乙丙")
    assert takes(declare(COPIED, min_items=0), "[]", source="乙丙")


def test_grounding_can_be_switched_off_for_a_task() -> None:
    assert not takes(declare(COPIED), '[{"q": "丁"}]', source="乙丙")
    assert takes(declare(COPIED, ground=False), '[{"q": "丁"}]', source="乙丙")


def test_keys_and_labels_tell_the_shape() -> None:
    assert declare(keys=("a", "b")).shape == "object"
    assert declare(COPIED, keys=("q", "r")).shape == "object list"
    assert declare(labels=("好", "坏")).shape == "label"
    assert takes(declare(labels=("好", "坏")), "坏")
    listed = AnswerForm.infer([["好"], ["坏", "好"]] * 4, texts=[""] * 8)
    assert declare(listed, labels=("好", "坏", "中")).shape == "label list"
    assert takes(declare(listed, labels=("好", "坏", "中")), '["中", "好"]')


def test_a_form_of_another_shape_lends_its_spelling() -> None:
    known = AnswerForm.infer(['```json\n["a","b"]\n```', '```json\n["c"]\n```'], texts=["", ""])
    form = declare(known, shape="label list", labels=("a", "b"))
    assert form.write(["a", "b"]) == '```json\n["a","b"]\n```'
    assert (form.min_items, form.max_items) == (1, 2)


def test_a_recipe_may_declare_all_of_it() -> None:
    recipe = make_recipe(
        {
            "name": "r",
            "model": "m",
            "data": {"train": "rows.jsonl"},
            "tasks": [
                {"name": "a", "json_schema": PERSON, "fence": "json"},
                {"name": "b", "regex": "[0-9]+"},
                {"name": "c", "lark": 'start: "x"'},
                {"name": "d", "shape": "string list", "max_items": 4, "ground": False},
            ],
        }
    )
    forms = [task.form for task in merge_tasks([], recipe.tasks)]
    assert [form.shape for form in forms] == ["json", "pattern", "grammar", "string list"]
    assert not forms[3].ground
    with pytest.raises(RecipeError, match="max_items"):
        make_recipe({"name": "r", "model": "m", "data": {"train": "x"}, "tasks": [{"name": "a", "max_items": 0}]})
