"""Facts that nearly agree: spelling, overlap, one-to-one matching, kinds of errors, absent attributes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.tasks.base import Task, add_counts
from weitiao.tasks.fact_errors import FactError, error_kinds
from weitiao.tasks.facts import Fact
from weitiao.tasks.forms import AnswerForm, Field
from weitiao.tasks.relaxed import _most_pairs, match, normalise, overlap

TRIPLES = Task(
    name="triples",
    form=AnswerForm(
        shape="object list",
        fields=tuple(Field(key=key, kind="string") for key in ("predicate", "object_type", "object", "subject")),
    ),
)
ENTITIES = Task(
    name="entities",
    form=AnswerForm(shape="object list", fields=(Field(key="type", kind="string"), Field(key="text", kind="string"))),
)
STRINGS = Task(name="strings", form=AnswerForm(shape="string list"))
PERSON = Task(
    name="person",
    form=AnswerForm(
        shape="object",
        fields=(
            Field(key="name", kind="string"),
            Field(key="town", kind="null|string", absent="未提及"),
            Field(key="aliases", kind="list of strings"),
        ),
    ),
)


def triple(predicate: str, value: str, *, type_: str = "人物") -> dict[str, str]:
    return {"predicate": predicate, "object_type": type_, "object": value, "subject": "甲"}


def figures(task: Task, gold: Any, answer: Any) -> dict[str, float]:
    return task.summarise(task.score(gold, json.dumps(answer)).counts)


# ---- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("ＧＰＴ－４", "gpt-4"),
        ("  New   York ", "new york"),
        ("北京 大学", "北京大学"),
        ("《红楼梦》", "红楼梦"),
        ("“「x」”", "x"),
        ("(a) and (b)", "(a) and (b)"),
        ('"a" and "b"', '"a" and "b"'),
        ("（）", "()"),
        ("O'Neil'", "o'neil'"),
    ],
)
def test_spelling_is_what_width_case_blanks_and_brackets_around_are(value: str, plain: str) -> None:
    assert normalise(value) == plain


@pytest.mark.parametrize(
    ("a", "b", "share"),
    [
        ("《红楼梦》", "红楼梦", 1),
        ("北京大学", "北京", 1 / 2),
        ("New York City", "new york", 2 / 3),
        ("北京大", "京大学", 2 / 3),
        ("北京", "京东", 0),
        ("1", "2019", 0),
        ("art", "Bart Simpson", 0),
        ("", "北京", 0),
        ("?!", "?", 1 / 2),
    ],
)
def test_values_overlap_where_one_holds_the_other_or_most_of_its_edge(a: str, b: str, share: float) -> None:
    assert overlap(a, b) == overlap(b, a) == pytest.approx(share)


@given(st.text(max_size=8), st.text(max_size=8))
def test_overlap_is_one_for_equal_spelling_alone(a: str, b: str) -> None:
    assert overlap(a, a) == 1
    assert (overlap(a, b) == 1) == (normalise(a) == normalise(b))
    assert 0 <= overlap(a, b) == overlap(b, a)


# ---- matching -------------------------------------------------------------------------------------------------


def best_by_trying(golds: Sequence[Fact], givens: Sequence[Fact], links: dict[tuple[Fact, Fact], float]) -> float:
    """The most credit that any one-to-one matching has."""
    padded = [*givens, *([None] * len(golds))]
    return max(
        sum(
            1.0 if links.get((gold, other)) == 1 else 0.5  # type: ignore[arg-type]
            for gold, other in zip(golds, order)
            if links.get((gold, other))  # type: ignore[arg-type]
        )
        for order in itertools.permutations(padded, len(golds))
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_matching_has_the_most_credit_there_is(data: st.DataObject) -> None:
    golds = [(f"g{n}",) for n in range(data.draw(st.integers(0, 3)))]
    givens = [(f"a{n}",) for n in range(data.draw(st.integers(0, 4)))]
    # Equality is an equivalence: facts of one class are equal, those of others overlap or do not.
    classes = {fact: data.draw(st.integers(0, 2)) for fact in (*golds, *givens)}
    near = {frozenset(pair): data.draw(st.booleans()) for pair in itertools.combinations(range(3), 2)}

    def link(a: Fact, b: Fact) -> float:
        pair = frozenset({classes[a], classes[b]})
        return 1.0 if len(pair) == 1 else 0.5 * near[pair]

    links = {(a, b): link(a, b) for a in golds for b in givens}
    pairs = match(golds, givens, link)
    assert len({gold for gold, _, _ in pairs}) == len({given for _, given, _ in pairs}) == len(pairs)
    credit = sum(1.0 if value == 1 else 0.5 for _, _, value in pairs)
    assert credit == best_by_trying(golds, givens, links) if golds else credit == 0


def test_a_long_chain_of_overlaps_is_matched_whole() -> None:
    golds, givens = [(f"g{n}",) for n in range(2000)], [(f"a{n}",) for n in range(2000)]
    # Each overlaps its own and the one before, most like the latter: only the last to be asked has to move them all.
    near = {(f"g{n}", f"a{n}"): 0.4 for n in range(2000)} | {(f"g{n}", f"a{n - 1}"): 0.5 for n in range(1, 2000)}
    links: dict[Fact, dict[Fact, float]] = {}
    for (gold, other), value in near.items():
        links.setdefault((gold,), {})[(other,)] = value
    pairs = _most_pairs({gold: sorted(row, key=row.__getitem__, reverse=True) for gold, row in reversed(links.items())})
    assert len(pairs) == 2000
    assert match(golds[:3], givens[:3], lambda a, b: links[a].get(b, 0)) == [
        (("g0",), ("a0",), 0.4), (("g1",), ("a1",), 0.4), (("g2",), ("a2",), 0.4)
    ]  # fmt: skip


# ---- scores ---------------------------------------------------------------------------------------------------


def test_an_overlapping_value_earns_half_and_other_spelling_all() -> None:
    gold = [triple("父亲", "北京大学"), triple("作品", "红楼梦"), triple("国籍", "中国")]
    answer = [triple("父亲", "北京"), triple("作品", "《红楼梦》"), triple("国籍", "中国"), triple("生日", "五月")]
    found = figures(TRIPLES, gold, answer)
    assert found["f1"] == pytest.approx(2 * 1 / 7)
    assert found["f1_relaxed"] == pytest.approx(2 * 2.5 / 7)
    assert found["precision_relaxed"] == pytest.approx(2.5 / 4)
    assert found["recall_relaxed"] == pytest.approx(2.5 / 3)


def test_a_labelled_fact_is_earned_once_however_many_answers_overlap_it() -> None:
    found = figures(
        ENTITIES, [{"type": "地", "text": "北京大学"}], [{"type": "地", "text": t} for t in ("北京", "大学")]
    )
    assert found["f1_relaxed"] == pytest.approx(2 * 0.5 / 3)


def test_the_kind_of_a_fact_must_be_equal_even_where_its_value_is_compared_freely() -> None:
    assert figures(ENTITIES, [{"type": "LOC", "text": "x"}], [{"type": "loc", "text": "x"}])["f1_relaxed"] == 0
    assert figures(STRINGS, ["北京大学", "b"], ["北京", "B"])["f1_relaxed"] == pytest.approx(2 * 1.5 / 4)


def test_the_relaxed_breakdown_has_the_rows_of_the_strict_one() -> None:
    gold = [triple("父亲", "北京大学"), triple("母亲", "丙")]
    counts = TRIPLES.score(
        gold, json.dumps([triple("父亲", "北京"), triple("母亲", "丙"), triple("生日", "丁")])
    ).counts
    strict, relaxed = (
        {row["name"]: row for row in rows(counts)} for rows in (TRIPLES.breakdown, TRIPLES.relaxed_breakdown)
    )
    assert {name: row["support"] for name, row in relaxed.items()} == {
        name: row["support"] for name, row in strict.items()
    }
    assert (strict["父亲"]["f1"], relaxed["父亲"]["f1"]) == (0, 0.5)
    assert (strict["母亲"]["f1"], relaxed["母亲"]["f1"], relaxed["生日"]["f1"]) == (1, 1, 0)


# ---- kinds of errors ------------------------------------------------------------------------------------------


def test_errors_are_missing_spurious_of_the_wrong_type_or_of_the_wrong_extent() -> None:
    gold = [
        triple("父亲", "北京大学"),
        triple("母亲", "丙"),
        triple("国籍", "中国"),
        triple("住在", "苏州", type_="地点"),
    ]
    answer = [
        triple("父亲", "北京"),
        triple("姐姐", "丙"),
        triple("生日", "五月"),
        triple("住在", "苏州", type_="城市"),
    ]
    assert sorted(error_kinds(TRIPLES.form, gold, answer), key=lambda error: error.kind) == [
        FactError("boundary", ("父亲", "人物", "北京大学", "甲"), ("父亲", "人物", "北京", "甲")),
        FactError("missing", ("国籍", "人物", "中国", "甲"), None),
        FactError("spurious", None, ("生日", "人物", "五月", "甲")),
        FactError("wrong type", ("住在", "地点", "苏州", "甲"), ("住在", "城市", "苏州", "甲")),
        FactError("wrong type", ("母亲", "人物", "丙", "甲"), ("姐姐", "人物", "丙", "甲")),
    ]
    counts = TRIPLES.score(gold, json.dumps(answer)).counts
    assert TRIPLES.errors(counts) == {"missing": 1, "spurious": 1, "wrong type": 2, "boundary": 1}
    assert TRIPLES.errors(add_counts([counts, counts]))["wrong type"] == 4


def test_everything_is_missing_from_a_refused_answer() -> None:
    assert error_kinds(STRINGS.form, ["a", "b"], None) == [
        FactError("missing", ("a",), None), FactError("missing", ("b",), None)
    ]  # fmt: skip


def test_a_value_under_another_key_is_of_the_wrong_type() -> None:
    gold = {"name": "张三", "town": "未提及", "aliases": []}
    errors = error_kinds(PERSON.form, gold, {"name": "", "town": "张三", "aliases": ["老张"]})
    assert errors == [
        FactError("wrong type", ("name", "张三"), ("town", "张三")),
        FactError("spurious", None, ("aliases", "老张")),
    ]


def test_facts_of_other_json_are_named_by_their_path() -> None:
    task = Task(name="nested", form=AnswerForm(shape="json"))
    gold, answer = {"a": {"b": "北京大学"}, "c": ["x", "y"]}, {"a": {"b": "北京"}, "c": ["y"], "d": "x"}
    assert error_kinds(task.form, gold, answer) == [
        FactError("boundary", ("a.b", "北京大学"), ("a.b", "北京")),
        FactError("wrong type", ("c[]", "x"), ("d", "x")),
    ]


values = st.sampled_from(["北京", "北京大学", "《北京》", "丙", "b"])
answers = st.lists(
    st.builds(triple, st.sampled_from(["父亲", "母亲"]), values, type_=st.sampled_from("人地")), max_size=5
)


@settings(deadline=None)
@given(answers, answers)
def test_every_difference_is_one_error_and_relaxed_is_never_below_strict(gold: Any, answer: Any) -> None:
    row = TRIPLES.score(gold, json.dumps(answer))
    errors = TRIPLES.errors(row.counts)
    shared = errors["wrong type"] + errors["boundary"]
    assert errors["missing"] + shared == row.counts["fn_typed"]
    assert errors["spurious"] + shared == row.counts["fp_typed"]
    found = TRIPLES.summarise(row.counts)
    assert found["f1"] <= found["f1_relaxed"] <= 1
    again = TRIPLES.summarise(TRIPLES.score(answer, json.dumps(gold)).counts)
    assert again["f1_relaxed"] == pytest.approx(found["f1_relaxed"])
    assert again["recall_relaxed"] == pytest.approx(found["precision_relaxed"])


# ---- absence --------------------------------------------------------------------------------------------------


def person(name: str | None, town: str | None, *aliases: str) -> dict[str, Any]:
    return {"name": name or "", "town": town, "aliases": list(aliases)}


@pytest.mark.parametrize("nothing", ["未提及", None, "", " "])
def test_null_empty_text_empty_list_and_the_placeholder_are_all_absence(nothing: str | None) -> None:
    row = PERSON.score(person("张三", "未提及"), json.dumps(person("张三", nothing)))
    assert (row.counts["tp"], row.counts["fp"], row.counts["fn"]) == (1, 0, 0)
    assert PERSON.summarise(row.counts)["absence_accuracy"] == 1


def test_inventing_is_spurious_leaving_out_is_missing_and_rightly_absent_is_right() -> None:
    rows = [
        PERSON.score(person("张三", "未提及"), json.dumps(person("张三", "北京", "老张"))),  # invents two
        PERSON.score(person("张三", "苏州"), json.dumps(person("张三", "未提及"))),  # leaves one out, one rightly empty
        PERSON.score(person("张三", "未提及"), "{"),  # refused: absence is not earned
    ]
    total = add_counts([row.counts for row in rows])
    assert PERSON.errors(total) == {"missing": 2, "spurious": 2, "wrong type": 0, "boundary": 0}
    assert PERSON.summarise(total)["absence_accuracy"] == pytest.approx(1 / 5)
    assert PERSON.absence(total) == [
        {"name": "aliases", "support": 3, "right": 1},
        {"name": "town", "support": 2, "right": 0},
    ]


def test_where_nothing_is_absent_there_is_no_such_figure() -> None:
    row = PERSON.score(person("a", "b", "c"), json.dumps(person("a", "b", "c")))
    assert "absence_accuracy" not in PERSON.summarise(row.counts)
    assert PERSON.absence(row.counts) == []
    assert TRIPLES.absence(row.counts) == []
