"""Metrics of the user's own: loaded from where the recipe says, asked about every row, never failing in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weitiao.data.records import read_records
from weitiao.errors import RecipeError
from weitiao.evaluate.best import choose_figure, rehearse
from weitiao.evaluate.prediction import Prediction
from weitiao.evaluate.score import score_side
from weitiao.evaluate.user_metrics import copy_metric_files, load_metrics, measure_rows
from weitiao.recipe import load_recipe
from weitiao.tasks.base import Task
from weitiao.tasks.forms import AnswerForm, Field

CHAT = Task(name="chat", form=AnswerForm(shape="text"))
STRINGS = Task(name="lists", form=AnswerForm(shape="string list"))
TRIPLES = Task(
    name="triples",
    form=AnswerForm(
        shape="object list", fields=(Field(key="predicate", kind="string"), Field(key="object", kind="string"))
    ),
)

CODE = """
import math

SEEN = []

def length(gold, answer, row):
    SEEN.append((gold, answer, row))
    return -1 if answer is None else len(answer)

def several(gold, answer, row):
    return {"same": gold == answer, "wide": row["width"] / 2}

def spoils(gold, answer, row):
    gold.clear(); row["deep"].clear()
    return 1.0

def divides(gold, answer, row):
    return 1 / (len(gold) - 1)

def vague(gold, answer, row):
    return {"worth": math.nan} if gold else None

NUMBER = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "my_metrics.py"
    path.parent.mkdir()
    path.write_text(CODE, encoding="utf-8")
    return path


def prediction(task: Task, gold: str, answer: str, line: int, finish: Any = "stop") -> Prediction:
    return Prediction(source=f"dev.jsonl:{line}", task=task.name, prompt="…", gold=gold, answer=answer, finish=finish)


LISTS = [
    prediction(STRINGS, '["a", "b"]', '["a"]', 1),
    prediction(STRINGS, '["a"]', '["a"]', 2),
    prediction(STRINGS, '["a"]', '["a', 3),
    prediction(STRINGS, '["a"]', '["a"]', 4, "refused"),
]


def test_a_function_is_asked_about_every_row_with_parsed_answers(file: Path) -> None:
    metrics = load_metrics([f"{file}:length", f"{file}:several"])
    rows = [{"width": width, "id": width} for width in (2, 4, 6, 8)]
    measured = measure_rows(metrics, LISTS, [STRINGS], rows)
    assert [row["length"] for row in measured] == [1, 1, -1, -1]
    assert measured[1] == {"length": 1, "several.same": 1, "several.wide": 2}
    assert metrics[0].function.__globals__["SEEN"][2] == (  # type: ignore[attr-defined]
        ["a"],
        None,
        {"width": 6, "id": 6, "source": "dev.jsonl:3", "task": "lists", "prediction": '["a'},
    )
    (score,) = score_side(LISTS, [STRINGS], extra=measured, resamples=200).scores
    assert score.metrics["length"] == 0
    assert score.intervals["length"][0] < 0 < score.intervals["length"][1]
    assert score.metrics["several.wide"] == 2.5


def test_a_function_that_changes_what_it_is_given_changes_nothing(file: Path) -> None:
    metrics = load_metrics([f"{file}:spoils", f"{file}:length"])
    rows = [{"deep": [1, [2]]} for _ in LISTS]
    assert [row["length"] for row in measure_rows(metrics, LISTS, [STRINGS], rows)] == [1, 1, -1, -1]
    assert rows == [{"deep": [1, [2]]} for _ in LISTS]


def test_a_failing_function_is_named_with_its_rows_and_its_line(file: Path) -> None:
    with pytest.raises(RecipeError) as error:
        measure_rows(load_metrics([f"{file}:divides"]), LISTS[:2], [STRINGS], [{}, {}])
    assert str(error.value) == (
        f"The metric divides of {file} failed on 1 of 2 rows. Mend the function, or take it out of evaluate.metrics.\n"
        "  dev.jsonl:2: line 18: ZeroDivisionError: division by zero."
    )


def test_anything_but_a_finite_number_is_an_error(file: Path) -> None:
    rows = [*LISTS, prediction(STRINGS, "[]", "[]", 5)]
    with pytest.raises(RecipeError) as error:
        measure_rows(load_metrics([f"{file}:vague"]), rows, [STRINGS], [{}] * 5)
    told = str(error.value).splitlines()
    assert told[0].startswith(f"The metric vague of {file} failed on 5 of 5 rows.")
    assert told[1] == "  dev.jsonl:1: it must give a finite number under 'worth' and gave nan."
    assert told[-1] == "  and 2 more rows"
    with pytest.raises(RecipeError, match=r"it must give a finite number and gave None\."):
        measure_rows(load_metrics([f"{file}:vague"]), rows[4:], [STRINGS], [{}])


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("my_metrics.py", "Write FILE.py:FUNCTION"),
        ("my_metrics:length", "Write FILE.py:FUNCTION"),
        ("FOLDER/other.py:length", "but there is no file FOLDER/other.py."),
        ("FOLDER/my_metrics.py:wide", "has no function wide. Its functions: length, several, spoils, divides, vague."),
        ("FOLDER/my_metrics.py:NUMBER", "has no function NUMBER."),
        ("FOLDER/broken.py:f", "FOLDER/broken.py fails: line 2: '(' was never closed."),
        ("FOLDER/raises.py:f", "FOLDER/raises.py fails: line 1: ModuleNotFoundError: No module named 'nowhere'."),
    ],
)
def test_what_cannot_be_loaded_is_said(file: Path, spec: str, sentence: str) -> None:
    (file.parent / "broken.py").write_text("\nf = (\n", encoding="utf-8")
    (file.parent / "raises.py").write_text("import nowhere\n", encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_metrics([spec.replace("FOLDER", str(file.parent))])
    assert sentence.replace("FOLDER", str(file.parent)) in str(error.value)


def test_two_functions_of_one_name_are_refused(file: Path) -> None:
    other = file.with_name("other.py")
    other.write_text(CODE, encoding="utf-8")
    with pytest.raises(RecipeError, match="two functions length"):
        load_metrics([f"{file}:length", f"{other}:length"])


# ---- where the code comes from --------------------------------------------------------------------------------


def test_the_file_is_seen_from_the_recipe_and_its_copy_in_a_run_names_the_same_one(file: Path, tmp_path: Path) -> None:
    recipe = file.with_name("r.yaml")
    recipe.write_text(
        'model: starter\ndata: {train: rows.jsonl}\nevaluate: {metrics: ["my_metrics.py:length"]}\n', encoding="utf-8"
    )
    loaded = load_recipe(recipe)
    assert loaded.evaluate.metrics == (f"{file}:length",)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(loaded.to_yaml(), encoding="utf-8")
    again = load_recipe(run / "recipe.yaml")
    assert again.evaluate == loaded.evaluate
    assert load_metrics(again.evaluate.metrics, run=run)[0].path == file


def test_a_run_keeps_copies_and_their_code_is_never_run(file: Path, tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere" / file.name
    twin.parent.mkdir()
    twin.write_text("def other(gold, answer, row):\n    return 1\n", encoding="utf-8")
    metrics = load_metrics([f"{file}:length", f"{file}:several", f"{twin}:other"])
    run = tmp_path / "run"
    copies = copy_metric_files(metrics, run)
    assert [path.relative_to(run).as_posix() for path in copies] == [
        "metric_files/my_metrics.py",
        "metric_files/my_metrics-2.py",
    ]
    assert [path.read_bytes() for path in copies] == [file.read_bytes(), twin.read_bytes()]
    mark = tmp_path / "ran"
    copies[0].write_text(f"open({str(mark)!r}, 'w')\ndef length(*_): return 1\n", encoding="utf-8")
    (run / "recipe.yaml").write_text(
        'model: starter\ndata: {train: a.jsonl}\nevaluate: {metrics: ["metric_files/my_metrics.py:length"]}\n',
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match="a file inside the run folder"):
        load_metrics(load_recipe(run / "recipe.yaml").evaluate.metrics, run=run)
    assert not mark.exists()


def test_a_lost_file_is_told_with_the_place_of_its_copy(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"The run keeps a copy in .*metric_files; read it before"):
        load_metrics([f"{file.with_name('gone.py')}:f"], run=tmp_path / "run")


# ---- the figure that chooses the best step --------------------------------------------------------------------


def triples(predicate: str, value: str) -> str:
    return json.dumps([{"predicate": predicate, "object": value}], ensure_ascii=False)


SCORED = score_side(
    [prediction(TRIPLES, triples("父", "北京大学"), triples("父", "北京"), 1), prediction(CHAT, "a b", "a b", 2)],
    [TRIPLES, CHAT],
    extra=[{"polite": 0.25, "lines.long": 3.0}, {"polite": 0.75}],
    resamples=0,
).scores


@pytest.mark.parametrize(
    ("best_by", "figure"),
    [
        ("overall", 0.5),
        ("triples.f1_relaxed", 0.5),
        ("chat.rouge_l", 1),
        ("chat.valid", 1),
        ("-chat.repetition", 0),
        ("triples.polite", 0.25),
        ("-chat.polite", -0.75),
        ("triples.lines.long", 3),
    ],
)
def test_any_figure_can_choose_the_best_step(best_by: str, figure: float) -> None:
    assert choose_figure(SCORED, best_by) == figure


@pytest.mark.parametrize(
    ("best_by", "sentence"),
    [
        ("triples.f2", "Known: overall, triples.f1, triples.precision"),
        ("f1", "have no such figure"),
        ("-overall", "Write overall."),
        ("chat.repetition", "less of repetition is better, so the worst step would be chosen. Write -chat.repetition."),
        ("-triples.f1", "more of f1 is better, so the worst step would be chosen. Write triples.f1."),
    ],
)
def test_a_figure_that_is_not_there_or_would_choose_the_worst_step_is_refused(best_by: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        choose_figure(SCORED, best_by)
    assert sentence in str(error.value)
    if best_by == "triples.f2":
        assert "-chat.repetition" in str(error.value)
        assert "chat.polite" in str(error.value)


def test_a_task_without_rows_has_no_figure_to_choose_by() -> None:
    scores = score_side([prediction(CHAT, "a", "a", 1)], [TRIPLES, CHAT], resamples=0).scores
    with pytest.raises(RecipeError, match="the rows scored while training have no such figure"):
        choose_figure(scores, "triples.f1")


def test_a_mistake_in_the_figure_or_in_a_function_shows_before_training(file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": "Which?", "input": text, "output": label} for text, label in (("x", '["a"]'), ("y", "[]"))]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    records = read_records(rows)
    assigned = [STRINGS, STRINGS]
    rehearse(records, assigned, [STRINGS, CHAT])
    rehearse(records, assigned, [STRINGS], best_by="lists.length", metrics=load_metrics([f"{file}:length"]))
    with pytest.raises(RecipeError, match=r"'chat\.rouge_l', but the rows scored while training have no such figure"):
        rehearse(records, assigned, [STRINGS, CHAT], best_by="chat.rouge_l")
    with pytest.raises(RecipeError, match=r"divides of .* failed on 1 of 2 rows"):
        rehearse(records, assigned, [STRINGS], metrics=load_metrics([f"{file}:divides"]))
