"""Two models on the same rows: the same rows indeed, differences beyond chance, flips, what is shown of them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from test_report import CHAT, EVIL, FACTS, TOPICS, Page, fact, report, row
from weitiao.errors import DataError, RunError
from weitiao.evaluate.compare import Comparison, compare_runs, write_comparison
from weitiao.evaluate.compare_shown import show_comparison
from weitiao.evaluate.paired import mcnemar, paired_bootstrap
from weitiao.evaluate.report import write_report
from weitiao.evaluate.score import Prediction, score_side
from weitiao.tasks.base import RowScore, Task
from weitiao.tasks.forms import AnswerForm, JsonStyle

LABELS = ("手机", "水果", "酒店")


def topic_rows(right: list[bool], *, first: int = 1) -> list[Prediction]:
    return [
        row(TOPICS, [LABELS[n % 3]], [LABELS[(n + (not ok)) % 3]], line=n, prompt=f"文本 {n}")
        for n, ok in enumerate(right, start=first)
    ]


def evaluation(folder: Path, rows: list[Prediction], *, tasks: tuple[Task, ...] = (TOPICS,), run: str = "") -> Path:
    write_report(replace(report(tasks, tuned=rows), run=run or folder.name), folder)
    return folder


def compared(tmp_path: Path, a: list[Prediction], b: list[Prediction], **options: Any) -> Comparison:
    tasks = options.pop("tasks", (TOPICS,))
    one, two = (evaluation(tmp_path / name, rows, tasks=tasks) for name, rows in (("one", a), ("two", b)))
    return compare_runs(one, two, **{"resamples": 500, **options})


# ---- chance ---------------------------------------------------------------------------------------------------


def simulated(generator: np.random.Generator, rows: int, rise: float) -> tuple[list[RowScore], list[RowScore]]:
    """Scores of two models that share hard rows: right with a row's own ease, the second more often by `rise`."""
    kinds = {
        ok: TOPICS.score(["水果"], json.dumps(["水果" if ok else "手机"], ensure_ascii=False)) for ok in (True, False)
    }
    ease = generator.uniform(0.3, 0.7, rows)
    draws = (generator.random(rows) < ease), (generator.random(rows) < ease + rise)
    return [kinds[bool(ok)] for ok in draws[0]], [kinds[bool(ok)] for ok in draws[1]]


@pytest.mark.parametrize("rise", [0.0, 0.15])
def test_the_interval_holds_the_true_difference_about_as_often_as_it_says(rise: float) -> None:
    generator = np.random.default_rng(7)
    held, found, trials = 0, 0, 300
    for trial in range(trials):
        a, b = simulated(generator, 80, rise)
        one = paired_bootstrap((TOPICS, TOPICS), a, b, seed=trial, resamples=200).differences["accuracy"]
        held += one.interval[0] <= rise <= one.interval[1]
        found += one.p_value < 0.05
    assert 0.90 <= held / trials <= 0.985
    if rise == 0:
        assert 0.01 <= found / trials <= 0.10
    else:
        assert found / trials > 0.35


def test_pairing_finds_what_unpaired_intervals_hide() -> None:
    generator = random.Random(1)
    right = [generator.random() < 0.5 for _ in range(200)]
    better = [ok or n % 16 == 0 for n, ok in enumerate(right)]
    sides = [score_side(topic_rows(own), [TOPICS], resamples=500) for own in (right, better)]
    (low, high), (other, _) = (side.scores[0].intervals["accuracy"] for side in sides)
    assert other < high  # the two intervals overlap …
    one = paired_bootstrap((TOPICS, TOPICS), sides[0].rows, sides[1].rows, resamples=2000).differences["accuracy"]
    assert 0 < one.interval[0] < one.difference < one.interval[1]  # … and yet the difference is certain
    assert one.p_value < 0.05
    assert low < one.a < high


def test_equal_answers_differ_by_nothing() -> None:
    rows = score_side(topic_rows([True, False] * 5), [TOPICS], resamples=0).rows
    for one in paired_bootstrap((TOPICS, TOPICS), rows, rows, resamples=100).differences.values():
        assert (one.difference, one.interval, one.p_value) == (0, (0, 0), 1)


def test_mcnemar_is_the_two_sided_binomial_test() -> None:
    assert (mcnemar(0, 0), mcnemar(4, 4), mcnemar(5, 4)) == (1, 1, 1)
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 2**5
    assert mcnemar(2, 8) == 2 * (1 + 10 + 45) / 2**10
    assert mcnemar(4700, 5300) == pytest.approx(2.1e-9, rel=0.1)  # normal: z = 5.99 with the correction
    assert mcnemar(0, 5000) == 0


def test_ten_thousand_resamples_of_a_thousand_rows_take_seconds() -> None:
    import time

    generator = np.random.default_rng(0)
    a, b = simulated(generator, 1000, 0.1)
    start = time.perf_counter()
    one = paired_bootstrap((TOPICS, TOPICS), a, b, resamples=10_000).differences["accuracy"]
    assert time.perf_counter() - start < 8
    assert one.p_value < 0.001


# ---- the same rows --------------------------------------------------------------------------------------------


def test_rows_are_matched_whatever_their_order_and_the_spelling_of_their_labels(tmp_path: Path) -> None:
    wide = Task(
        name="topics", form=replace(TOPICS.form, style=JsonStyle(indent=2), fence_open="```\n", fence_close="\n```")
    )
    a = topic_rows([True, True, False, False])
    b = topic_rows([True, False, True, True])
    fenced = [replace(r, gold=f"```\n{r.gold}\n```", answer=f"```\n{r.answer}\n```") for r in reversed(b)]
    one, two = evaluation(tmp_path / "one", a), evaluation(tmp_path / "two", fenced, tasks=(wide,))
    found = compare_runs(one, two, resamples=100)
    assert [flip.b.source for flip in found.flips] == ["dev.jsonl:2", "dev.jsonl:3", "dev.jsonl:4"]
    assert [flip.kind for flip in found.flips] == ["right → wrong", "wrong → right", "wrong → right"]
    assert (found.compared[0].only_a, found.compared[0].only_b) == (1, 2)


CHANGES: dict[str, tuple[Callable[[list[Prediction]], list[Prediction]], str]] = {
    "a row less": (lambda rows: rows[:-1], "dev.jsonl:4: row: This row of topics stands in one only, not in two."),
    "a row more": (
        lambda rows: [*rows, replace(rows[0], source="dev.jsonl:9")],
        "dev.jsonl:9: row: This row of topics",
    ),
    "another label": (
        lambda rows: [replace(rows[0], gold=json.dumps(["手机"], ensure_ascii=False)), *rows[1:]],
        "dev.jsonl:1: gold: The label is not the same in one and two.",
    ),
    "another input": (
        lambda rows: [replace(rows[0], prompt="别的"), *rows[1:]],
        "dev.jsonl:1: prompt: The input is not the same in one and two.",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sets_that_differ_are_refused_and_the_rows_named(tmp_path: Path, change: str) -> None:
    altered, sentence = CHANGES[change]
    rows = topic_rows([True] * 4)
    with pytest.raises(DataError, match="were not scored on the same rows: 1 differ of 4") as error:
        compared(tmp_path, rows, altered(rows))
    assert sentence in str(error.value)
    assert len(error.value.problems) == 1


def test_sets_with_nothing_in_common_name_twenty_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"60 differ of 30 and 30. The first 20:") as error:
        compared(tmp_path, topic_rows([True] * 30), topic_rows([True] * 30, first=101))
    assert len(error.value.problems) == 20


def test_inputs_may_differ_when_asked_for(tmp_path: Path) -> None:
    rows = topic_rows([True, False, True])
    longer = [replace(one, prompt=f"请选一个标签：{one.prompt}", source=f"elsewhere/{one.source}") for one in rows]
    assert compared(tmp_path, rows, longer, any_prompt=True).compared[0].rows == 3


# ---- finding what to compare ----------------------------------------------------------------------------------


def test_runs_evaluations_and_files_are_the_same_thing_to_compare(tmp_path: Path) -> None:
    rows = [topic_rows([True, False]), topic_rows([True, True])]
    for name, own in zip(("one", "two"), rows):
        evaluation(tmp_path / name / "evaluations" / "dev", own, run=name)
        evaluation(tmp_path / name / "evaluations" / "test", topic_rows([False] * 3), run=name)
    runs = [tmp_path / "one", tmp_path / "two"]
    folders = [run / "evaluations" / "dev" for run in runs]
    files = [folder / "scored-tuned.jsonl" for folder in folders]
    found = [compare_runs(*pair, resamples=100).to_json() for pair in (runs, folders, files, (runs[0], files[1]))]
    assert all(one == found[0] for one in found)
    assert (found[0]["a"]["name"], found[0]["b"]["name"]) == ("one", "two")
    assert compare_runs(*runs, data="test", resamples=100).compared[0].rows == 3


def test_two_sides_of_one_evaluation_are_compared_by_their_names(tmp_path: Path) -> None:
    write_report(report((TOPICS,), base=topic_rows([False] * 4), tuned=topic_rows([True] * 4)), tmp_path / "e")
    found = compare_runs(tmp_path / "e", tmp_path / "e", side_a="base", resamples=100)
    assert (found.a, found.b, found.compared[0].only_b) == ("base", "tuned", 4)
    with pytest.raises(RunError, match="has no side 'best'; its sides are base, tuned"):
        compare_runs(tmp_path / "e", tmp_path / "e", side_a="best")


def test_what_cannot_be_found_is_said_with_what_to_do(tmp_path: Path) -> None:
    good = evaluation(tmp_path / "good", topic_rows([True]))
    with pytest.raises(RunError, match=r"There is nothing at .*missing"):
        compare_runs(tmp_path / "missing", good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"holds no evaluation. Make one with: weitiao evaluate"):
        compare_runs(tmp_path / "empty", good)
    for name, sets in (("one", ("a", "b")), ("two", ("a", "b")), ("three", ("c",))):
        for set_name in sets:
            evaluation(tmp_path / name / "evaluations" / set_name, topic_rows([True]))
    with pytest.raises(RunError, match=r"Both runs were evaluated on a, b. Say which with --data"):
        compare_runs(tmp_path / "one", tmp_path / "two")
    with pytest.raises(RunError, match=r"not evaluated on one set: .*one on a, b and .*three on c"):
        compare_runs(tmp_path / "one", tmp_path / "three")
    with pytest.raises(RunError, match="was not evaluated on dev, only on c"):
        compare_runs(tmp_path / "three", good, data="dev")
    (good / "scored-tuned.jsonl").unlink()
    with pytest.raises(RunError, match="keeps no labels with the answers of tuned"):
        compare_runs(good, good)
    (good / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunError, match="is not a report of this program"):
        compare_runs(good, good)


# ---- what is said ---------------------------------------------------------------------------------------------


def test_a_sentence_says_whether_the_difference_is_more_than_chance(tmp_path: Path) -> None:
    plain = [n % 2 == 0 for n in range(60)]
    better = [ok or n % 4 == 1 for n, ok in enumerate(plain)]
    (sure,) = compared(tmp_path, topic_rows(plain), topic_rows(better)).verdicts
    assert sure.startswith("topics: two is better, by more than chance: Accuracy 50.0 → 75.0 (+25.0, 95 % interval +")
    assert "p < 0.001" in sure
    (worse,) = compared(tmp_path, topic_rows(better), topic_rows(plain)).verdicts
    assert worse.startswith("topics: one is better, by more than chance: Accuracy 75.0 → 50.0 (−25.0")
    one_more = [True, *plain[1:-1], True]
    (unsure,) = compared(tmp_path, topic_rows(plain), topic_rows(one_more)).verdicts
    assert unsure.startswith("topics: no difference beyond chance: Accuracy 50.0 → 51.7 (+1.7, 95 % interval +0.0 to +")
    assert "p = 1.00); on 60 rows a difference below about" in unsure


def test_the_mean_of_several_tasks_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    facts = [row(FACTS, [fact("甲", "父亲", f"{n}")], [fact("甲", "父亲", f"{n}")], line=100 + n) for n in range(20)]
    wrong = [replace(one, answer="[]") for one in facts]
    a, b = [*topic_rows([False] * 20), *wrong], [*topic_rows([True] * 20), *facts]
    found = compared(tmp_path, a, b, tasks=(TOPICS, FACTS))
    assert found.overall is not None
    assert (found.overall.a, found.overall.b, len(found.verdicts), len(found.flips)) == (0, 1, 3, 40)
    assert found.verdicts[-1].startswith("all tasks: two is better, by more than chance: mean 0.0 → 100.0")


def test_the_terminal_shows_figures_verdict_and_both_kinds_of_flips(tmp_path: Path) -> None:
    found = compared(
        tmp_path, topic_rows([True] * 30 + [False] * 30), topic_rows([True] * 28 + [False, False] + [True] * 30)
    )
    console = Console(file=io.StringIO(), width=160, color_system=None)
    show_comparison(found, console, num_flips=10)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Accuracy" in shown and "50.0" in shown and "by more than chance" in shown
    assert (shown.count("right → wrong"), shown.count("wrong → right")) == (2 + 1, 8 + 1)
    assert "32 rows flipped: 30 wrong → right, 2 right → wrong. 22 more" in shown


def test_the_terminal_says_what_is_wrong_with_the_facts_of_a_flipped_row(tmp_path: Path) -> None:
    gold = [fact("甲", "父亲", "乙")]
    a, b = row(FACTS, gold, [fact("甲", "母亲", "丙")]), row(FACTS, gold, gold)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    show_comparison(compared(tmp_path, [a], [b], tasks=(FACTS,)), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "missing: 甲 · 父亲 · 乙; spurious: 甲 · 母亲 · 丙" in " ".join(shown.split())
    assert "│ right " in shown


def test_texts_of_models_are_no_markup_on_the_terminal_or_the_page(tmp_path: Path) -> None:
    evil = f"[bold red]{EVIL}[/]"
    a = [row(CHAT, "a", "a", prompt=evil), row(CHAT, "b", "c", line=2, prompt=evil)]
    b = [replace(a[0], answer=evil), replace(a[1], answer="b")]
    found = replace(compared(tmp_path, a, b, tasks=(CHAT,)), a=f"one{evil}")
    found = replace(found, sides=dict(zip((found.a, found.b), found.sides.values())))
    console = Console(file=io.StringIO(), width=200, color_system=None)
    show_comparison(found, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold red]" in shown and "\x1b" not in shown and "\u202e" not in shown
    html, data = write_comparison(found, tmp_path / "out")
    page = Page(html.read_text(encoding="utf-8"))
    assert (len(page.scripts), len(page.data)) == (1, 1)
    assert "img" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert [one["o"][0][2] for one in page.rows["rows"]] == ["right", "wrong"]
    flips = json.loads(data.read_text(encoding="utf-8"))["flips"]
    assert [flip["kind"] for flip in flips] == ["right → wrong", "wrong → right"]


def test_a_form_with_fewer_labels_still_compares(tmp_path: Path) -> None:
    small = Task(name="topics", form=AnswerForm(shape="label list", labels=("手机", "水果")))
    rows = [row(TOPICS, ["水果"], ["手机"]), row(TOPICS, ["手机"], ["手机"], line=2)]
    one, two = evaluation(tmp_path / "one", rows), evaluation(tmp_path / "two", rows, tasks=(small,))
    assert compare_runs(one, two, resamples=100).flips == ()
