"""What an answer is worth: counting per task, summing, intervals, and the predictions file."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weitiao.errors import DataError
from weitiao.evaluate.metric_texts import METRICS
from weitiao.evaluate.score import (
    PartScore,
    Prediction,
    TaskScore,
    group_reasons,
    overall,
    read_predictions,
    row_scores,
    row_value,
    score_predictions,
    score_side,
    write_predictions,
)
from weitiao.tasks import extraction, labels
from weitiao.tasks.base import LOWER_IS_BETTER, Task, add_counts, prf
from weitiao.tasks.forms import AnswerForm, Field

TRIPLES = Task(
    name="triples",
    form=AnswerForm(
        shape="object list",
        fields=tuple(Field(key=key, kind="string") for key in ("predicate", "object_type", "object", "subject")),
    ),
)
TOPICS = Task(name="topics", form=AnswerForm(shape="label list", labels=("手机", "水果", "酒店")))
CHAT = Task(name="chat", form=AnswerForm(shape="text"))
PERSON = Task(
    name="person",
    form=AnswerForm(
        shape="object",
        fields=(
            Field(key="name", kind="string"),
            Field(key="town", kind="string", absent="未提及"),
            Field(key="aliases", kind="list of strings"),
        ),
    ),
)
ALL = (TRIPLES, TOPICS, CHAT)


def triple(predicate: str, value: str, *, type_: str = "人物", subject: str = "甲") -> dict[str, str]:
    return {"predicate": predicate, "object_type": type_, "object": value, "subject": subject}


def dumps(answer: Any) -> str:
    return json.dumps(answer, ensure_ascii=False)


def prediction(task: Task, gold: Any, answer: Any, *, line: int = 1, finish: Any = "stop") -> Prediction:
    gold, answer = (value if isinstance(value, str) else dumps(value) for value in (gold, answer))
    return Prediction(source=f"dev.jsonl:{line}", task=task.name, prompt="…", gold=gold, answer=answer, finish=finish)


# ---- counting facts -------------------------------------------------------------------------------------------


def test_a_fact_counts_only_when_subject_predicate_and_object_are_all_equal() -> None:
    gold = [triple("父亲", "乙"), triple("母亲", "丙"), triple("国籍", "中国")]
    answer = [triple("父亲", "乙"), triple("母亲", "丁"), triple("生日", "中国")]
    row = TRIPLES.score(gold, dumps(answer))
    figures = TRIPLES.summarise(row.counts)
    assert (row.counts["tp"], row.counts["fp"], row.counts["fn"]) == (1, 2, 2)
    assert figures["f1"] == figures["precision"] == figures["recall"] == pytest.approx(1 / 3)
    assert (figures["valid"], figures["exact"]) == (1, 0)


def test_types_count_only_in_the_typed_figure() -> None:
    row = TRIPLES.score([triple("父亲", "乙")], dumps([triple("父亲", "乙", type_="地点")]))
    figures = TRIPLES.summarise(row.counts)
    assert (figures["f1"], figures["f1_typed"], figures["exact"]) == (1, 0, 0)


def test_order_and_repetition_of_facts_change_no_figure_but_exact() -> None:
    gold = [triple("父亲", "乙"), triple("母亲", "丙")]
    row = TRIPLES.score(gold, dumps([gold[1], gold[0], gold[0]]))
    figures = TRIPLES.summarise(row.counts)
    assert (figures["f1"], figures["exact"]) == (1, 0)


def test_a_refused_answer_finds_nothing_and_invents_nothing() -> None:
    row = TRIPLES.score([triple("父亲", "乙")], "[{")
    assert (row.valid, row.exact) == (False, False)
    assert row.reason.startswith("The JSON is never closed")
    assert (row.counts["tp"], row.counts["fp"], row.counts["fn"]) == (0, 0, 1)


def test_the_breakdown_is_per_predicate() -> None:
    gold, answer = [triple("父亲", "乙"), triple("父亲", "丙")], [triple("父亲", "乙"), triple("生日", "丙")]
    lines = {line["name"]: line for line in TRIPLES.breakdown(TRIPLES.score(gold, dumps(answer)).counts)}
    assert lines["父亲"] == {"name": "父亲", "support": 2, "precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert lines["生日"] == {"name": "生日", "support": 0, "precision": 0, "recall": 0, "f1": 0}


def test_objects_without_a_naming_key_have_no_breakdown() -> None:
    form = AnswerForm(shape="object list", fields=(Field(key="from", kind="string"), Field(key="to", kind="string")))
    task = Task(name="routes", form=form)
    assert extraction.naming_key(form) is None
    assert task.breakdown(task.score([{"from": "a", "to": "b"}], '[{"from": "a", "to": "b"}]').counts) == []


def test_attributes_are_key_and_value_pairs_and_absence_is_no_fact() -> None:
    gold = {"name": "张三", "town": "未提及", "aliases": ["老张", "小张"]}
    wanted = {("name", "张三"), ("aliases", "老张"), ("aliases", "小张")}
    assert extraction.facts(PERSON.form, gold, typed=False) == wanted
    honest = PERSON.score(gold, dumps({"name": "张三", "town": "未提及", "aliases": ["老张"]}))
    inventive = PERSON.score(gold, dumps({"name": "张三", "town": "北京", "aliases": ["老张", "小张"]}))
    assert (honest.counts["tp"], honest.counts["fp"], honest.counts["fn"]) == (2, 0, 1)
    assert (inventive.counts["tp"], inventive.counts["fp"], inventive.counts["fn"]) == (3, 1, 0)
    assert {line["name"] for line in PERSON.breakdown(inventive.counts)} == {"name", "town", "aliases"}


def test_null_is_no_fact() -> None:
    form = AnswerForm(shape="object", fields=(Field(key="town", kind="null|string"),))
    assert extraction.facts(form, {"town": None}, typed=False) == set()


# ---- counting labels ------------------------------------------------------------------------------------------


def test_labels_count_accuracy_macro_f1_and_confusions() -> None:
    pairs = [("水果", "水果"), ("水果", "手机"), ("手机", "手机"), ("酒店", "飞机")]
    total = add_counts([TOPICS.score([gold], dumps([given])).counts for gold, given in pairs])
    figures = TOPICS.summarise(total)
    assert figures["accuracy"] == 0.5
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert figures["valid"] == 0.75
    assert labels.confusion(total) == {
        "水果": {"水果": 1, "手机": 1},
        "手机": {"手机": 1},
        "酒店": {labels.INVALID: 1},
    }


def test_several_labels_are_right_only_as_a_whole_set_in_any_order() -> None:
    swapped = TOPICS.score(["手机", "水果"], dumps(["水果", "手机"]))
    half = TOPICS.score(["手机", "水果"], dumps(["水果"]))
    assert (swapped.counts["correct"], swapped.exact) == (1, False)
    assert (half.counts["correct"], half.counts["tp:水果"], half.counts["fn:手机"]) == (0, 1, 1)
    assert labels.confusion(half.counts) == {"手机, 水果": {"水果": 1}}


def test_labels_have_micro_f1_and_balanced_accuracy_where_a_row_has_one() -> None:
    task = Task(name="topic", form=AnswerForm(shape="label", labels=("手机", "水果", "酒店")))
    pairs = [("水果", "水果"), ("水果", "水果"), ("水果", "手机"), ("手机", "手机"), ("酒店", "不知道")]
    figures = task.summarise(add_counts([task.score(gold, given).counts for gold, given in pairs]))
    assert figures["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))  # a refused answer gives no label at all
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert "jaccard" not in figures


def test_several_labels_have_a_jaccard_index_of_each_row() -> None:
    pairs = [(["手机", "水果"], ["水果"]), (["手机"], ["手机"]), ([], []), ([], ["水果"]), (["酒店"], "[")]
    rows = [TOPICS.score(gold, given if isinstance(given, str) else dumps(given)).counts for gold, given in pairs]
    figures = TOPICS.summarise(add_counts(rows))
    assert figures["jaccard"] == pytest.approx((1 / 2 + 1 + 1 + 0 + 0) / 5)
    assert figures["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert "balanced_accuracy" not in figures


# ---- what is shown --------------------------------------------------------------------------------------------


LABEL = Task(name="topic", form=AnswerForm(shape="label", labels=("手机", "水果")))
STRINGS = Task(name="strings", form=AnswerForm(shape="string list"))


@pytest.mark.parametrize("task", [*ALL, PERSON, LABEL, STRINGS])
def test_few_metrics_are_shown_first_and_every_metric_has_a_name(task: Task) -> None:
    gold: Any = {"name": "a", "town": "未提及", "aliases": []} if task is PERSON else "手机" if task is LABEL else []
    gold = "a" if task is CHAT else gold
    figures = task.summarise(task.score(gold, "").counts)
    assert tuple(figures) == task.metric_names
    assert task.main_metrics[0] == task.primary_metric
    assert set(task.main_metrics) <= set(task.metric_names)
    assert len(set(task.main_metrics)) == len(task.main_metrics) <= 8


def test_every_metric_has_words_for_people_and_a_row_on_the_page_of_metrics() -> None:
    named = {name for task in (*ALL, PERSON, LABEL, STRINGS) for name in (*task.metric_names, *task.set_figures([]))}
    assert named <= METRICS.keys()
    assert {name for name, words in METRICS.items() if words.less_is_better} == LOWER_IS_BETTER
    page = (Path(__file__).parents[1] / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = [name.strip(" `") for row in rows for name in row.split(",")]
    assert sorted(listed) == sorted(named)


def test_only_text_has_figures_of_a_whole_set() -> None:
    assert CHAT.set_figures(["a b", "a c"]) == {"distinct_1": 3 / 4, "distinct_2": 1}
    assert CHAT.set_figures([]) == {"distinct_1": 0, "distinct_2": 0}
    assert TOPICS.set_figures(["[]"]) == {}


# ---- sums -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("甲乙丙"), st.sampled_from("甲乙丙丁")), min_size=1, max_size=30))
def test_counts_of_a_set_are_the_sums_of_its_rows(pairs: list[tuple[str, str]]) -> None:
    rows = [TRIPLES.score([triple("父亲", gold)], dumps([triple("父亲", given)])).counts for gold, given in pairs]
    assert add_counts([add_counts(rows[:5]), add_counts(rows[5:])]) == add_counts(rows)
    figures = TRIPLES.summarise(add_counts(rows))
    assert figures["f1"] == pytest.approx(prf(*(add_counts(rows)[part] for part in ("tp", "fp", "fn")))[2])
    assert all(0 <= value <= 1 for value in figures.values())


@pytest.mark.parametrize("task", [*ALL, PERSON])
def test_the_primary_metric_stands_first_and_no_rows_have_no_metrics(task: Task) -> None:
    gold: Any = {"name": "a", "town": "b", "aliases": []} if task is PERSON else "a" if task is CHAT else []
    assert next(iter(task.summarise(task.score(gold, "").counts))) == task.primary_metric
    assert task.summarise({}) == {}


# ---- the score of a set of predictions ------------------------------------------------------------------------


def test_predictions_of_several_tasks_are_scored_task_by_task() -> None:
    rows = [
        prediction(TOPICS, ["水果"], ["水果"], line=1),
        prediction(TRIPLES, [triple("父亲", "乙")], [triple("父亲", "乙")], line=2),
        prediction(TOPICS, ["水果"], ["手机"], line=3),
        prediction(TOPICS, ["酒店"], '["酒', line=4, finish="length"),
    ]
    facts, topics, chat = score_predictions(rows, ALL)
    assert (facts.task, facts.kind, facts.rows, facts.primary) == ("triples", "extraction", 1, "f1")
    assert facts.metrics["f1"] == 1
    assert facts.confusion is None
    assert (topics.rows, topics.cut) == (3, 1)
    assert topics.metrics["accuracy"] == pytest.approx(1 / 3)
    assert topics.breakdown[0] == PartScore(name="水果", support=2, precision=1, recall=0.5, f1=1 / 1.5)
    assert topics.confusion == {"水果": {"手机": 1, "水果": 1}, "酒店": {labels.INVALID: 1}}
    (reason,) = topics.refusals
    assert reason == "The JSON is never closed: it breaks off after '…' (Unterminated string starting at)."
    assert (chat.rows, chat.metrics, chat.intervals, chat.refusals) == (0, {}, {}, {})


def test_the_overall_figure_is_the_unweighted_mean_of_tasks_that_have_rows() -> None:
    rows = [prediction(TOPICS, ["水果"], ["手机"])] * 9 + [prediction(CHAT, "a b", "a b")]
    assert overall(score_predictions(rows, ALL, resamples=0)) == 0.5
    assert overall(score_predictions([], ALL)) == 0


def test_all_predictions_that_cannot_be_scored_are_named_at_once() -> None:
    rows = [
        prediction(TOPICS, ["飞机"], ["水果"], line=3),
        prediction(TOPICS, ["水果"], ["水果"], line=4),
        prediction(PERSON, "{}", "{}", line=5),
    ]
    with pytest.raises(DataError) as error:
        score_predictions(rows, ALL)
    assert str(error.value).splitlines() == [
        "2 of 3 predictions cannot be scored.",
        '  dev.jsonl:3: gold: "飞机" is not one of the 3 labels. Labels: 手机, 水果, 酒店. '
        "Fix: Correct the label to be a JSON list of 0 label(s) out of 3: 手机, 水果, 酒店.",
        "  dev.jsonl:5: task: There is no task 'person'. "
        "Fix: Score it with the tasks it was predicted with; these are triples, topics, chat.",
    ]


def test_reasons_are_grouped_without_the_answers_own_words() -> None:
    reasons = [
        '"a. b" is not one of the 2 labels. Labels: x, y.',
        '"c" is not one of the 2 labels. Labels: x, y.',
        "Item 3 lacks object. Keys of the form: predicate, object.",
        "Item 12 lacks object. Keys of the form: predicate, object.",
        "Not JSON at character 7, near 'it\\'s': Expecting ',' delimiter.",
        """Not JSON at character 9, near "it's": Expecting ',' delimiter.""",
        "The answer must open with '```json' but starts with 'Sure: '.",
    ]
    assert group_reasons(reasons) == {
        '"…" is not one of the 2 labels.': 2,
        "Item N lacks object.": 2,
        "Not JSON at character N, near \"…\": Expecting ',' delimiter.": 1,
        "Not JSON at character N, near '…': Expecting ',' delimiter.": 1,
        "The answer must open with '```json' but starts with '…'.": 1,
    }
    assert list(group_reasons(["b", "a", "b"])) == ["b", "a"]


def test_a_row_is_worth_its_own_primary_metric() -> None:
    gold = [triple("父亲", "乙"), triple("母亲", "丙")]
    answers = {"right": gold, "half": gold[:1], "wrong": [], "refused": "[{"}
    rows = [prediction(TRIPLES, gold, answer) for answer in answers.values()]
    values = [row_value(TRIPLES, row) for row in row_scores(rows, ALL)]
    assert values == [1, pytest.approx(2 / 3), 0, 0]
    assert row_value(TRIPLES, TRIPLES.score([], "[]")) == 1
    assert row_value(TRIPLES, TRIPLES.score([], dumps(gold))) == 0


# ---- intervals ------------------------------------------------------------------------------------------------


def noisy_rows(count: int, *, seed: int = 0) -> list[Prediction]:
    chooser = random.Random(seed)
    rows = []
    for line in range(count):
        gold, given = (chooser.choice(TOPICS.form.labels) for _ in range(2))
        rows.append(prediction(TOPICS, [gold], [gold if chooser.random() < 0.7 else given], line=line))
    return rows


def test_intervals_hold_the_metric_and_shrink_with_more_rows() -> None:
    few, many = (score_predictions(noisy_rows(count), [TOPICS])[0] for count in (50, 800))
    for score in (few, many):
        assert list(score.intervals) == list(score.metrics)
        for name, (low, high) in score.intervals.items():
            assert 0 <= low <= score.metrics[name] <= high <= 1
    low, high = many.intervals["accuracy"]
    assert high - low < 0.4 * (few.intervals["accuracy"][1] - few.intervals["accuracy"][0])


def test_the_accuracy_interval_is_the_binomial_one() -> None:
    rows = [prediction(TOPICS, ["水果"], ["水果"] if line < 320 else ["手机"], line=line) for line in range(400)]
    low, high = score_predictions(rows, [TOPICS], resamples=4000)[0].intervals["accuracy"]
    half_width = 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert low == pytest.approx(0.8 - half_width, abs=0.004)
    assert high == pytest.approx(0.8 + half_width, abs=0.004)


def test_the_same_seed_gives_the_same_intervals_whatever_other_tasks_there_are() -> None:
    rows = noisy_rows(60)
    first = score_predictions(rows, [TOPICS], seed=3)[0]
    again = score_predictions([prediction(CHAT, "a", "b"), *rows], [CHAT, TOPICS], seed=3)[1]
    assert first == again
    assert score_predictions(rows, [TOPICS], seed=4)[0].intervals != first.intervals


def test_resamples_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noisy_rows(60)
    whole = score_predictions(rows, [TOPICS])
    monkeypatch.setattr("weitiao.evaluate.score.CHUNK_CELLS", 200)
    assert score_predictions(rows, [TOPICS]) == whole


def test_a_label_that_a_resample_lacks_does_not_lower_macro_f1() -> None:
    rows = [prediction(TOPICS, [label], [label]) for label in TOPICS.form.labels]
    assert score_predictions(rows, [TOPICS])[0].intervals["macro_f1"] == (1, 1)


def test_no_resamples_leave_the_intervals_out() -> None:
    assert score_predictions(noisy_rows(5), [TOPICS], resamples=0)[0].intervals == {}


def test_a_thousand_resamples_of_some_hundred_rows_take_less_than_two_seconds() -> None:
    names = tuple(f"标签{number}" for number in range(64))
    task = Task(name="many", form=AnswerForm(shape="label list", labels=names))
    rows = [prediction(task, [names[line % 64]], [names[line * 7 % 64]], line=line) for line in range(400)]
    start = time.perf_counter()
    score_predictions(rows, [task])
    assert time.perf_counter() - start < 2


# ---- files ----------------------------------------------------------------------------------------------------


def test_predictions_read_back_as_written(tmp_path: Path) -> None:
    rows = (
        prediction(CHAT, "a\u2028b\r\n", "\ud800 \x00 \U0001f34e", line=1, finish="length"),
        prediction(TOPICS, ["水果"], "", line=2),
        replace(prediction(CHAT, "a", "b", line=3), before=(("system", "S"), ("user", "U\n"), ("assistant", ""))),
    )
    write_predictions(rows, tmp_path / "predictions.jsonl")
    assert read_predictions(tmp_path / "predictions.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert "水果" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")


def test_every_line_that_is_no_prediction_is_named(tmp_path: Path) -> None:
    good = prediction(CHAT, "a", "b").to_json()
    bad = [good | {"finish": "tired"}, good | {"gold": 1}, {"answer": "a"}, good | {"before": [["user", 1]]}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([dumps(good), *map(dumps, bad), "{"]) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_predictions(path)
    assert [problem.source for problem in error.value.problems] == [f"p.jsonl:{line}" for line in range(2, 7)]
    assert error.value.problems[0].message == 'finish is "stop", "length" or "refused", not \'tired\'.'
    assert error.value.problems[1].message == "gold must be text."


def test_a_score_survives_its_json_copy() -> None:
    rows = [*noisy_rows(20), prediction(TRIPLES, [triple("父亲", "乙")], "[{", finish="length")]
    for score in score_side(rows, ALL).scores:
        assert TaskScore.from_json(json.loads(json.dumps(score.to_json()))) == score


# ---- known faults ---------------------------------------------------------------------------------------------


def test_a_label_may_hold_a_tab() -> None:
    task = Task(name="tabs", form=AnswerForm(shape="label", labels=("a\tb", "c")))
    assert labels.confusion(task.score("a\tb", "c").counts) == {"a\tb": {"c": 1}}


def test_finding_nothing_where_there_is_nothing_is_perfect() -> None:
    assert TRIPLES.summarise(TRIPLES.score([], "[]").counts)["f1"] == 1
