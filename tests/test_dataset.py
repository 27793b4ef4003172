"""The data of a recipe: split, understood and checked, every problem named at once, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from weitiao.data.checks import input_key
from weitiao.dataset import Dataset, load_dataset
from weitiao.errors import DataError, RecipeError
from weitiao.init import describe_tasks
from weitiao.recipe import make_recipe

LABEL_QUESTION, TRIPLE_QUESTION = "选一个标签。", "找出人物关系。"
LABELS = ("体育", "科技", "财经")


def context(question: str, text: str) -> str:
    return f"Instruction: 请回答。\nInput: {question}\n\n{text}\nAnswer: "


def label_row(number: int, label: str | None = None, **more: object) -> dict[str, object]:
    target = json.dumps([label or LABELS[number % 3]], ensure_ascii=False)
    return {"context": context(LABEL_QUESTION, f"第{number}篇短文。"), "target": target, **more}


def triple_row(number: int) -> dict[str, object]:
    triples = [{"subject": f"第{number}人", "predicate": "住在", "object": "北京"}]
    answer = json.dumps(triples, ensure_ascii=False)
    return {"context": context(TRIPLE_QUESTION, f"第{number}人住在北京。"), "target": f"```json\n{answer}\n```"}


def write(path: Path, rows: Iterable[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(train: Any, *, dev: Any = (), held_out: float = 0.0, seed: int = 42, tasks: Any = ()) -> Dataset:
    data = {"train": train, "dev": dev, "held_out": held_out}
    return load_dataset(
        make_recipe({"name": "t", "model": "starter", "data": data, "train": {"seed": seed}, "tasks": tasks})
    )


def problems_of(train: Any, **more: Any) -> list[tuple[str, str, str]]:
    """(file:line, field, message) of every problem found."""
    with pytest.raises(DataError) as caught:
        load(train, **more)
    return [(Path(p.source).name, p.field, p.message) for p in caught.value.problems]


# ---- problems --------------------------------------------------------------------------------------------------


def test_one_input_with_two_answers_is_a_contradiction(tmp_path: Path) -> None:
    rows = [*map(label_row, range(9)), label_row(4, "体育"), label_row(4, "财经")]
    path = write(tmp_path / "rows.jsonl", rows)
    found = problems_of(path)
    assert [place for place, _, _ in found] == ["rows.jsonl:10", "rows.jsonl:11"]
    assert found[0][1] == "target"
    assert found[0][2] == f"""'["体育"]' answers the input of {path}:5, which is answered '["科技"]' there."""


def test_contradictions_are_found_in_dev_rows_too(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", map(label_row, range(9)))
    dev = write(tmp_path / "dev.jsonl", [label_row(20, "体育"), label_row(20, "科技")])
    assert [place for place, _, _ in problems_of(train, dev=dev)] == ["dev.jsonl:2"]


def test_a_dev_row_that_is_trained_on_is_a_leak(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", map(label_row, range(9)))
    spaced = label_row(3)
    spaced["context"] = f"{spaced['context']}  "  # blanks around it do not make another input
    dev = write(tmp_path / "dev.jsonl", [label_row(20), spaced])
    assert problems_of(train, dev=dev) == [
        ("dev.jsonl:2", "row", f"This dev row has the same input as the train row {train}:4.")
    ]


def test_an_answer_without_the_form_of_the_others_is_named_with_that_form(tmp_path: Path) -> None:
    rows = [*map(triple_row, range(30)), *map(label_row, range(30))]
    rows[7]["target"] = "第7人住在北京。"
    rows[11]["target"] = '```json\n[{"subject": "第11人", "predicate": "住在"}]\n```'
    found = problems_of(write(tmp_path / "rows.jsonl", rows))
    assert [(place, field) for place, field, _ in found] == [("rows.jsonl:8", "target"), ("rows.jsonl:12", "target")]
    assert all("does not have the form of the other triples answers" in message for _, _, message in found)


def test_all_problems_of_all_files_are_named_at_once_in_order(tmp_path: Path) -> None:
    rows = [*map(triple_row, range(30)), *map(label_row, range(30))]
    rows[7]["target"] = "第7人住在北京。"
    train = write(tmp_path / "train.jsonl", [*rows, label_row(4, "财经")])
    dev = write(tmp_path / "dev.jsonl", [label_row(2)])
    with pytest.raises(DataError, match=r"^3 of 62 rows cannot be trained on as they are\.") as caught:
        load(train, dev=dev)
    assert [Path(p.source).name for p in caught.value.problems] == ["dev.jsonl:1", "train.jsonl:8", "train.jsonl:61"]
    assert all(problem.fix for problem in caught.value.problems)


def test_unreadable_rows_of_several_files_are_named_together(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [label_row(1), {"context": "x"}])
    second = write(tmp_path / "b.jsonl", [{"contxt": "x", "target": "y"}])
    found = problems_of([first, second], dev=str(tmp_path / "none.jsonl"))
    assert {place for place, _, _ in found} == {"a.jsonl:2", "b.jsonl:1"}
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        load([first, second], dev=str(tmp_path / "none.jsonl"))


# ---- notes -----------------------------------------------------------------------------------------------------


def test_repeated_rows_are_noted_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*map(label_row, range(9)), label_row(4), label_row(4)])
    dataset = load(path)
    assert len(dataset.train) == 11
    assert dataset.notes == (f"1 train rows are given more than once: {path}:5 = {path}:10, {path}:11.",)


def test_answers_spelled_otherwise_are_noted(tmp_path: Path) -> None:
    rows = [label_row(number) for number in range(9)]
    rows[4]["target"] = '[ "科技" ]'
    (note,) = load(write(tmp_path / "rows.jsonl", rows)).notes
    assert note.startswith("1 answers are spelled differently")
    assert "rows.jsonl:5" in note


def test_labels_that_only_dev_rows_have_are_noted(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [label_row(n, LABELS[n % 2]) for n in range(12)])
    dev = write(tmp_path / "dev.jsonl", [label_row(n, LABELS[n % 3]) for n in range(20, 26)])
    assert load(train, dev=dev).notes == ("Labels of labels that only dev rows have: 财经.",)


# ---- the split -------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """60 label rows, 30 triple rows, shuffled into each other."""
    return write(tmp_path / "mixed.jsonl", [triple_row(n) if n % 3 == 0 else label_row(n) for n in range(90)])


def test_the_same_seed_holds_out_the_same_rows(mixed: str) -> None:
    first, again, other = load(mixed, held_out=0.2), load(mixed, held_out=0.2), load(mixed, held_out=0.2, seed=1)
    assert first == again
    assert first.fingerprint == again.fingerprint
    assert {r.source for r in first.dev} != {r.source for r in other.dev}
    assert first.fingerprint != other.fingerprint


def test_every_kind_of_question_is_held_out_in_the_same_share(mixed: str) -> None:
    dataset = load(mixed, held_out=0.2)
    assert dataset.count_rows() == {"labels": (48, 12), "triples": (24, 6)}
    assert Counter(task.name for task in dataset.dev_tasks) == {"labels": 12, "triples": 6}


def test_no_row_is_lost_or_doubled_by_the_split_and_order_is_kept(mixed: str) -> None:
    dataset = load(mixed, held_out=0.3)
    lines = [[int(record.source.rpartition(":")[2]) for record in side] for side in (dataset.train, dataset.dev)]
    assert sorted(lines[0] + lines[1]) == list(range(1, 91))
    assert all(side == sorted(side) for side in lines)


@pytest.mark.parametrize("seed", range(8))
def test_rows_with_one_input_fall_on_one_side(seed: int, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [label_row(n % 10) for n in range(40)])
    dataset = load(path, held_out=0.3, seed=seed)
    trained = {input_key(record) for record in dataset.train}
    assert dataset.dev
    assert not any(input_key(record) in trained for record in dataset.dev)


def test_rare_questions_share_one_pool(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"问题{n}？"}, {"role": "assistant", "content": f"答{n}。"}]}
            for n in range(40)]  # fmt: skip
    dataset = load(write(tmp_path / "rows.jsonl", rows), held_out=0.1)
    assert len(dataset.dev) == 4


def test_nothing_is_held_out_beside_dev_files_or_at_share_zero(mixed: str, tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.jsonl", map(label_row, range(100, 105)))
    assert [len(rows) for rows in (load(mixed, dev=dev, held_out=0.5).train, load(mixed, dev=dev).dev)] == [90, 5]
    assert load(mixed).dev == ()


def test_at_least_one_row_of_a_question_stays_to_learn_from(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "rows.jsonl", map(label_row, range(3))), held_out=0.99)
    assert len(dataset.train) == 1


def test_weights_follow_their_rows(mixed: str, tmp_path: Path) -> None:
    more = write(tmp_path / "more.jsonl", map(label_row, range(200, 210)))
    dataset = load([{"path": mixed, "weight": 0.5}, {"path": more, "weight": 3}], held_out=0.2)
    assert len(dataset.weights) == len(dataset.train)
    for record, weight in zip(dataset.train, dataset.weights, strict=True):
        assert weight == (3 if "more" in record.source else 0.5)


# ---- tasks -----------------------------------------------------------------------------------------------------


def test_a_declared_task_takes_the_place_of_the_inferred_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", map(label_row, range(12)))
    tasks = [{"name": "labels", "shape": "label list", "labels": [*LABELS, "娱乐"]}]
    (task,) = load(path, tasks=tasks).tasks
    assert task.form.labels == tuple(sorted((*LABELS, "娱乐")))
    assert task.wordings == (LABEL_QUESTION,)


def test_a_label_outside_the_declared_ones_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*map(label_row, range(12)), label_row(20, "体肓")])
    tasks = [{"name": "labels", "shape": "label list", "labels": list(LABELS)}]
    ((place, field, message),) = problems_of(path, tasks=tasks)
    assert (place, field) == ("rows.jsonl:13", "target")
    assert "体肓" in message


def test_rows_may_name_their_task(tmp_path: Path) -> None:
    rows = [label_row(n, task="topic") for n in range(12)] + [label_row(n, task="tone") for n in range(20, 32)]
    dataset = load(write(tmp_path / "rows.jsonl", rows))
    assert dataset.count_rows() == {"topic": (12, 0), "tone": (12, 0)}


def test_a_declared_task_is_known_by_its_wordings(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*map(label_row, range(12)), *map(triple_row, range(12))])
    tasks = [{"name": "who", "shape": "object list", "keys": ["subject", "predicate", "object"], "fence": "json",
              "wordings": [TRIPLE_QUESTION]},
             {"name": "triples", "shape": "object list", "keys": ["a"], "wordings": ["never asked"]}]  # fmt: skip
    dataset = load(path, tasks=tasks)
    assert dataset.count_rows()["who"] == (12, 0)


@pytest.mark.parametrize(("shape", "lacking"), [("label", "labels"), ("object list", "keys")])
def test_a_declared_task_without_what_makes_its_form_is_refused(shape: str, lacking: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", map(label_row, range(12)))
    with pytest.raises(RecipeError, match=rf"^tasks: extra of shape '{shape}' needs {lacking}: list them"):
        load(path, tasks=[{"name": "extra", "shape": shape}])


def test_what_was_understood_is_told_in_one_line_a_task(mixed: str) -> None:
    labels, triples = describe_tasks(load(mixed, held_out=0.2))
    assert labels.startswith("labels (48 train, 12 dev rows): ")
    assert f"Asked as '{LABEL_QUESTION}'." in labels
    assert triples.startswith("triples (24 train, 6 dev rows): ")


def test_the_fingerprint_follows_the_rows_and_their_side(tmp_path: Path) -> None:
    rows = [label_row(n) for n in range(12)]
    one = load(write(tmp_path / "a.jsonl", rows)).fingerprint
    assert load(write(tmp_path / "b.jsonl", rows)).fingerprint == one
    assert load(write(tmp_path / "b.jsonl", rows[::-1])).fingerprint != one
    train, dev = write(tmp_path / "c.jsonl", rows[:9]), write(tmp_path / "d.jsonl", rows[9:])
    assert load(train, dev=dev).fingerprint != one


def test_checking_data_loads_neither_torch_nor_transformers(sample_rows: Path) -> None:
    code = (
        "import sys, weitiao.dataset, weitiao.init, weitiao.cli\n"
        "from weitiao.recipe import make_recipe\n"
        "data = {'train': sys.argv[1]}\n"
        "dataset = weitiao.dataset.load_dataset(make_recipe({'name': 'a', 'model': 'starter', 'data': data}))\n"
        "print(len(dataset.train), *{'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(sample_rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == "22\n"
